"""Tables and sheets of a classifier: what names of files may hold, and what a run leaves that ends early."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lk_backbones.callbacks import ClassificationResults
from lk_backbones.tasks import ClassificationTask, SegmentationTask

NAMES = ['quote".jpg', "comma, and\nnewline.jpg", "=1+1.jpg", "日本.jpg", os.fsdecode(b"no text \xff.jpg")]


def batches(count: int = len(NAMES)) -> DataLoader[Any]:
    pictures = [{"image": torch.rand(3, 32, 32), "path": NAMES[i % len(NAMES)]} for i in range(count)]
    return DataLoader(pictures, 2)  # type: ignore[arg-type]


def task(num_classes: int = 3) -> ClassificationTask:
    kwargs = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    return ClassificationTask("tu-convnext_atto", None, kwargs, num_classes)


def trainer(folder: Path, callback: L.Callback, **arguments: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[callback], **arguments,
    )  # fmt: skip


def test_every_name_comes_back_from_the_table(tmp_path: Path) -> None:
    results = ClassificationResults(pictures_per_sheet=3, columns=2)
    trainer(tmp_path, results).predict(task(), batches(), return_predictions=False)
    folder = tmp_path / "predictions"
    with (folder / "predictions.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == NAMES
    assert list(rows[0]) == ["file", *(f"{k}_{i}" for i in (1, 2, 3) for k in ("class", "probability"))]
    assert all(sum(float(row[f"probability_{i}"]) for i in (1, 2, 3)) == pytest.approx(1, abs=1e-4) for row in rows)
    assert sorted(path.name for path in folder.iterdir()) == [
        "contact_sheet_001.png", "contact_sheet_002.png", "predictions.csv",
    ]  # fmt: skip
    assert results.files == [folder / "contact_sheet_001.png", folder / "predictions.csv"]


def test_what_was_found_until_an_error_stays(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, **_: Any):
            if batch_idx == 1:
                raise RuntimeError("power cut")

    results = ClassificationResults(str(tmp_path / "out"))
    runner = trainer(tmp_path, results)
    runner.callbacks.append(Fails())
    with pytest.raises(RuntimeError, match="power cut"), pytest.warns(UserWarning, match="classes of 4 pictures"):
        runner.predict(task(), batches(6), return_predictions=False)
    part = tmp_path / "out" / "predictions.part0.csv"
    assert len(list(csv.reader(part.open(encoding="utf-8", errors="surrogateescape", newline="")))) == 4
    trainer(tmp_path, results).predict(task(), batches(), return_predictions=False)
    assert not part.exists()


def test_other_tasks_write_nothing(tmp_path: Path) -> None:
    decoder = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    other = SegmentationTask("unet", "resnet18", architecture_kwargs=decoder, num_classes=3)
    trainer(tmp_path, ClassificationResults()).predict(other, batches(2), return_predictions=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [{"pictures_per_sheet": -1}, {"columns": 0}])
def test_arguments_that_cannot_be(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ClassificationResults(**arguments)
