"""Two processes measure what one process measures, even when they see different numbers of pictures."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lk_backbones.tasks import SegmentationTask

from ..blocks import UNEVEN_SIZES, loader, trainer


def test_two_processes_give_the_metrics_of_one(tmp_path: Path) -> None:
    # A hang is the failure to fear here: DDP waits for the process that has fewer pictures.
    script = Path(__file__).parents[1] / "blocks.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    distributed = json.loads((tmp_path / "metrics.json").read_text())

    task = SegmentationTask.load_from_checkpoint(tmp_path / "last.ckpt")
    single = trainer(tmp_path)
    single.validate(task, loader(UNEVEN_SIZES), verbose=False)
    expected = {key: value.item() for key, value in single.callback_metrics.items()}
    assert len(expected) == 7
    for key, value in expected.items():
        if math.isnan(value):
            assert math.isnan(distributed[key])
        else:
            assert distributed[key] == pytest.approx(value, rel=1e-6), key
            assert distributed[key.replace("val/", "test/")] == pytest.approx(value, rel=1e-6), key
    assert {"train/loss", "train/auxiliary_loss"} <= distributed.keys()
