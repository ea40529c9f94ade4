"""Results files while something goes wrong: bad pictures, pictures without a detection, a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from lk_backbones.data import CocoDataModule, PictureFolderDataModule
from lk_backbones.tasks import CocoResults, DetectionTask, Overlays

from ..blocks import trainer
from ..data.conftest import CocoMaker, save_image
from ..oracle import make, oracle_task

# height and width: of every shape, of which a small detector (64 to 96 pixels) must make something
SHAPES = {"a": (40, 50), "b": (3, 600), "c": (1, 1), "d": (1, 5000), "e": (700, 2), "f": (30, 40)}


class OneBox(nn.Module):
    """Finds one object in pictures of at least 30 rows, none in others; stops at the picture that it is told."""

    needs_masks = False

    def __init__(self, stop_at: int = -1, how: Any = None) -> None:
        super().__init__()
        self.left, self.how = stop_at, how

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        if self.left == 0:
            self.how()
        self.left -= 1
        counts = [int(image.shape[1] >= 30) for image in images]
        return [
            {
                "boxes": torch.tensor([[1.0, 2, 11, 22]])[:count],
                "labels": torch.ones(count, dtype=torch.int64),
                "scores": torch.full((count,), 0.5),
            }
            for count in counts
        ]


def one_box(*args: Any) -> DetectionTask:
    task = make("faster_rcnn")
    task.model = OneBox(*args)
    task.setup = lambda stage: None  # type: ignore[method-assign] # which looks for an encoder
    return task


def folder_of(root: Path) -> Path:
    root.mkdir()
    for name, (height, width) in SHAPES.items():
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


def broken(folder: Path) -> Path:
    """Two files that cannot be read between others of all kinds."""
    (folder / "b2.jpg").write_bytes(b"")
    whole = (folder / "f.png").read_bytes()
    (folder / "e2.png").write_bytes(whole[: len(whole) // 2])
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 4), np.uint8)
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    Image.fromarray(pixels, "CMYK").save(folder / "ink.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(folder / "deep.png")
    return folder


@pytest.mark.parametrize("architecture", ["mask_rcnn", "cascade_mask_rcnn", "fcos", "retinanet"])
def test_a_real_detector_passes_over_bad_pictures_and_takes_every_shape(architecture: str, tmp_path: Path) -> None:
    data = PictureFolderDataModule(str(broken(folder_of(tmp_path / "pictures"))), num_workers=0)
    callbacks = [CocoResults(str(tmp_path / "out")), Overlays(str(tmp_path / "out"))]
    with pytest.warns(UserWarning, match="pictures could not be read") as warned:
        predictions = trainer(tmp_path, callbacks=callbacks).predict(make(architecture), data)
    said = " ".join(str(warning.message) for warning in warned)
    assert "b2.jpg cannot be read as a picture: it is empty" in said
    assert "e2.png cannot be read" in said
    assert "2 pictures could not be read" in said
    found = [prediction for batch in predictions for prediction in batch]
    names = [Path(prediction["path"]).name for prediction in found]
    assert names == ["a.png", "b.png", "c.png", "d.png", "deep.png", "e.png", "f.png", "grey.png", "ink.jpg"]
    assert [prediction["original_size"] for prediction in found][:4] == list(SHAPES.values())[:4]
    assert [prediction["image_id"] for prediction in found] == [1, 3, 4, 5, 6, 8, 9, 10, 11]
    for prediction in found:
        height, width = prediction["original_size"]
        assert torch.isfinite(prediction["boxes"]).all()
        assert (prediction["boxes"] <= torch.tensor([width, height, width, height]) + 1e-3).all()
    assert isinstance(json.loads((tmp_path / "out" / "predictions.json").read_text()), list)
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 9


def test_numbers_do_not_move_when_a_picture_has_no_detection(tmp_path: Path) -> None:
    data = PictureFolderDataModule(str(broken(folder_of(tmp_path / "pictures"))), num_workers=0)
    with pytest.warns(UserWarning, match="cannot be read"):
        trainer(tmp_path, callbacks=[CocoResults(str(tmp_path))]).predict(one_box(), data, return_predictions=False)
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert {r["image_id"]: Path(r["file_name"]).name for r in results} == {
        1: "a.png",
        6: "deep.png",
        8: "e.png",
        9: "f.png",
        10: "grey.png",
        11: "ink.jpg",
    }
    assert results[0]["bbox"] == [1, 2, 10, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "predictions.json"]


def test_pictures_of_others_are_counted_too(tmp_path: Path) -> None:
    batches = [{"image": torch.zeros(1, 3, height, 40), "path": [f"{height}.png"]} for height in (30, 5, 6, 50)]
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer(tmp_path, callbacks=[CocoResults(str(tmp_path))]).predict(one_box(), loader)
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert [(r["image_id"], r["file_name"]) for r in results] == [(1, "30.png"), (4, "50.png")]


def test_nothing_but_bad_pictures_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"no picture")
    data = PictureFolderDataModule(str(tmp_path / "pictures"), num_workers=0)
    with (
        pytest.warns(UserWarning, match=r"a.png cannot be read"),
        pytest.raises(ValueError, match=r"None of the 1 pictures can be read. .*a.png"),
    ):
        trainer(tmp_path).predict(one_box(), data)


def test_a_bad_picture_counts_as_one_without_detections(tmp_path: Path) -> None:
    for number in range(10, 14):
        save_image(tmp_path / "coco" / "val2017" / f"{number}.png", 60, 80, seed=number)
    root = CocoMaker(tmp_path / "coco").write()
    data = CocoDataModule(str(root), num_workers=0)
    expected = trainer(tmp_path).test(oracle_task(data, silent=[11]), datamodule=data, verbose=False)
    task = oracle_task(CocoDataModule(str(root), num_workers=0))
    (root / "val2017" / "11.png").write_bytes(b"no picture")
    data = CocoDataModule(str(root), num_workers=0)
    callbacks = [CocoResults(str(tmp_path / "out")), Overlays(str(tmp_path / "out"))]
    with pytest.warns(UserWarning, match=r"11.png cannot be read .* It is skipped: there are no detections in it"):
        measured = trainer(tmp_path, callbacks=callbacks).test(task, datamodule=data, verbose=False)
    assert measured[0] == pytest.approx(expected[0], abs=0, nan_ok=True)
    results = json.loads((tmp_path / "out" / "test" / "predictions.json").read_text())
    assert {r["image_id"] for r in results} == {10, 12, 13}
    with pytest.warns(UserWarning, match=r"11.png cannot be read"):
        predictions = trainer(tmp_path).predict(task, datamodule=data)
    assert ["error" in p for batch in predictions for p in batch] == [False, True, False, False]
    with pytest.raises(ValueError, match=r"11.png cannot be read"):  # training is another matter
        trainer(tmp_path).fit(task, datamodule=CocoDataModule(str(root), num_workers=0))


def fail() -> None:
    raise RuntimeError("the model fails here")


def test_an_error_leaves_what_was_done(tmp_path: Path) -> None:
    data = PictureFolderDataModule(str(folder_of(tmp_path / "pictures")), num_workers=0)
    part = tmp_path / "predictions.part0.jsonl"
    with pytest.warns(UserWarning, match=f"The detections of 5 pictures are in {part}"), pytest.raises(RuntimeError):
        trainer(tmp_path, callbacks=[CocoResults(str(tmp_path))]).predict(one_box(5, fail), data)
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    assert [[entry["image_id"] for entry in line] for line in lines] == [[1], [], [], [], [5]]
    assert not (tmp_path / "predictions.json").exists()
    trainer(tmp_path, callbacks=[CocoResults(str(tmp_path))]).predict(one_box(), data)
    assert not part.exists()
    assert [r["image_id"] for r in json.loads((tmp_path / "predictions.json").read_text())] == [1, 5, 6]


def kill() -> None:
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def test_a_killed_run_leaves_what_was_done(tmp_path: Path) -> None:
    folder_of(tmp_path / "pictures")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.callbacks.test_coco_results", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert run.returncode != 0
    lines = [json.loads(line) for line in (tmp_path / "predictions.part0.jsonl").read_text().splitlines()]
    assert [[entry["image_id"] for entry in line] for line in lines] == [[1], [], [], [], [5]]
    assert not (tmp_path / "predictions.json").exists()


def main(root: Path) -> None:
    data = PictureFolderDataModule(str(root / "pictures"), num_workers=0)
    trainer(root, callbacks=[CocoResults(str(root))]).predict(one_box(5, kill), data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
