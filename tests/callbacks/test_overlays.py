"""Pictures of validations, tests and predictions, through real trainers."""

import io
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from lk_backbones.tasks import Overlays, SegmentationTask

from ..blocks import NUM_CLASSES, TRAIN_SIZES, UNEVEN_SIZES, Blocks, loader, trainer


def make(**kwargs: Any) -> SegmentationTask:
    return SegmentationTask("unet", "resnet18", **({"num_classes": NUM_CLASSES, "lr": 1e-3} | kwargs))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_overlays_of_validation_and_test(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    overlays = Overlays(num_pictures=2)
    fitter = trainer(tmp_path, logger=logger, callbacks=[overlays], max_epochs=2)
    task = make()
    fitter.fit(task, loader(TRAIN_SIZES, 4), loader(UNEVEN_SIZES))
    fitter.test(task, loader(UNEVEN_SIZES), verbose=False)
    folder = Path(logger.log_dir) / "overlays"
    # two of five pictures, evenly spread
    pictures = ["block_0.png", "block_2.png"]
    expected = [f"{part}/{p}" for part in ("test", "val/step_00000002", "val/step_00000004") for p in pictures]
    assert files(folder) == expected
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == ["val/block_0", "val/block_2", "test/block_0", "test/block_2"]
    assert [e.step for e in events.Images("val/block_0")] == [2, 4]
    png = np.array(Image.open(io.BytesIO(events.Images("test/block_0")[0].encoded_image_string)))
    assert np.array_equal(png, np.array(Image.open(folder / "test" / "block_0.png")))


def test_more_pictures_than_batches(tmp_path: Path) -> None:
    tester = trainer(tmp_path, callbacks=[Overlays(str(tmp_path / "out"), num_pictures=3)])
    tester.test(make(), loader([(32, 48)] * 4, 2), verbose=False)
    assert files(tmp_path / "out") == [f"test/block_{i}.png" for i in range(4)]


def test_predictions_become_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    items = [{k: v for k, v in item.items() if k != "mask"} for item in Blocks(UNEVEN_SIZES)]
    items[1]["path"] = "other/block_0.png"  # a second picture of the same name
    for item in items:
        item["original_size"] = (60, 90)
        item["image"] = item["image"][None]
        item["path"], item["original_size"] = [item["path"]], [item["original_size"]]
    task = make()
    data = torch.utils.data.DataLoader(items, batch_size=None)
    predictor = trainer(tmp_path, callbacks=[Overlays(str(tmp_path / "out"))])
    results = predictor.predict(task, data)
    names = ["block_0", "other_block_0", "block_2", "block_3", "block_4"]
    assert files(tmp_path / "out") == sorted(f"{d}/{n}.png" for d in ("label_maps", "overlays") for n in names)
    for name, result in zip(names, results, strict=True):
        labels = np.array(Image.open(tmp_path / "out" / "label_maps" / f"{name}.png"))
        assert labels.dtype == np.uint8
        assert labels.shape == (60, 90)
        assert np.array_equal(labels, result["label_map"][0].numpy())


def test_overlays_refuse_other_modules_and_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"draws a task that has a method figures.*; LightningModule has none"):
        Overlays().setup(trainer(tmp_path), L.LightningModule(), "fit")
    with pytest.raises(ValueError, match="opacity=2 in"):
        Overlays(opacity=2)
