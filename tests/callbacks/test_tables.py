"""When tables of results are printed, through real trainers."""

from pathlib import Path

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from lk_backbones.tasks import MetricsTable, SegmentationTask

from ..blocks import NUM_CLASSES, TRAIN_SIZES, UNEVEN_SIZES, loader, trainer


def test_tables_come_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = SegmentationTask("unet", "resnet18", num_classes=NUM_CLASSES, class_names=list("abcd"))
    with_table = trainer(tmp_path, callbacks=[MetricsTable()])
    with_table.validate(task, loader(UNEVEN_SIZES), verbose=False)
    assert "Validation" in capsys.readouterr().out
    with_table.test(task, loader(UNEVEN_SIZES), verbose=False)
    assert "Test" in capsys.readouterr().out
    for every, times in ((False, 1), (True, 2)):
        fitter = trainer(tmp_path, callbacks=[MetricsTable(every)], max_epochs=2)
        fitter.fit(task, loader(TRAIN_SIZES, 4), loader(UNEVEN_SIZES))
        assert capsys.readouterr().out.count("mean IoU") == times


def test_a_task_without_a_table_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, callbacks=[MetricsTable()]).validate(BoringModel(), verbose=False)
    assert capsys.readouterr().out == ""
