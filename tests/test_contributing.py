"""The walk in CONTRIBUTING.md: a real picture passes the listed files in the listed order."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import pytest
from PIL import Image

import lk_backbones
from lk_backbones.callbacks import Overlays
from lk_backbones.data import PictureFolderDataModule
from lk_backbones.tasks import SegmentationTask

PACKAGE = Path(lk_backbones.__file__).parent
GUIDE = Path(__file__).parent.parent / "CONTRIBUTING.md"


def walk(heading: str) -> list[tuple[str, str]]:
    """Files and functions of a numbered list of the guide."""
    text = GUIDE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    steps = re.findall(r"^(\d+)\. `([\w/]+\.py)`, `([\w.]+)`: ", text, re.MULTILINE)
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    return [(file, function) for _, file, function in steps]


def test_a_picture_passes_the_files_in_the_listed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = walk("One picture from disk to label map")
    assert len(steps) > 8
    assert len({file for file, _ in steps}) == len(steps), "a file is visited twice"
    size = (40, 56)
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    task = SegmentationTask("upernet_openmmlab", "replknet_31n", num_classes=4)
    data = PictureFolderDataModule(str(tmp_path / "a.png"), num_workers=0)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    callbacks: list[L.Callback] = [Overlays(str(tmp_path / "out"))]
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **quiet)

    handed_on: list[tuple[str, str]] = []
    wanted = {(str(PACKAGE / file), function.rpartition(".")[2]): (file, function) for file, function in steps}

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "return":
            step = wanted.get((frame.f_code.co_filename, frame.f_code.co_name))
            owner = type(frame.f_locals.get("self")).__mro__ if "self" in frame.f_locals else ()
            classes = {cls.__name__ for cls in owner}
            if step and step not in handed_on and ("." not in step[1] or step[1].partition(".")[0] in classes):
                handed_on.append(step)

    sys.setprofile(watch)
    try:
        trainer.predict(task, data, return_predictions=False)
    finally:
        sys.setprofile(None)
    assert handed_on == steps
    labels = np.asarray(Image.open(tmp_path / "out/label_maps/a.png"))
    assert labels.shape == size
