"""DetectionTask through real trainers: losses, schedule, prediction, precision, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lk_backbones.data import CocoDataModule, PictureFolderDataModule, SyntheticScenesDetectionDataModule
from lk_backbones.heads import DETECTORS
from lk_backbones.metrics.masks import decode_masks
from lk_backbones.tasks import DetectionTask, Overlays

from ..blocks import trainer
from ..data.conftest import CocoMaker
from ..oracle import make, oracle_task


def scenes(**kwargs: Any) -> SyntheticScenesDetectionDataModule:
    defaults: dict[str, Any] = {
        "image_size": (64, 64),
        "train_images": 4,
        "val_images": 2,
        "batch_size": 2,
        "num_workers": 0,
    }
    return SyntheticScenesDetectionDataModule(**(defaults | kwargs))


@pytest.mark.parametrize("architecture", DETECTORS)
def test_every_detector_trains_and_measures(architecture: str, tmp_path: Path) -> None:
    fitter = trainer(tmp_path, limit_train_batches=1, limit_val_batches=1)
    task = make(architecture)
    fitter.fit(task, datamodule=scenes(val_batch_size=1))
    logged = {key: value.item() for key, value in fitter.callback_metrics.items()}
    terms = [value for key, value in logged.items() if key.startswith("train/") and key != "train/loss"]
    assert len(terms) >= 2
    assert logged["train/loss"] == pytest.approx(sum(terms), rel=1e-4)
    assert 0 < logged["train/loss"] < 100
    assert logged["val/box_ap"] >= 0
    assert ("val/mask_ap" in logged) == ("mask" in architecture)
    assert task.class_names == ["tree", "person", "signal", "moving vehicle", "stopped vehicle"]
    assert task.category_ids == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("architecture", DETECTORS)
def test_a_batch_without_objects_trains(architecture: str, tmp_path: Path) -> None:
    task = make(architecture)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": 1}
    empty["masks"] = torch.zeros(0, 64, 64, dtype=torch.uint8)
    crowd = {**empty, "boxes": torch.tensor([[4.0, 4, 60, 60]]), "labels": torch.ones(1, dtype=torch.int64)}
    crowd |= {"masks": torch.ones(1, 64, 64, dtype=torch.uint8), "iscrowd": torch.ones(1, dtype=torch.int64)}
    losses = []
    for target in (empty, crowd):  # a crowd is no object to learn
        torch.manual_seed(0)
        task.zero_grad()
        task.log = task.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
        images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        loss = task.train().training_step((images, [target, target]), 0)
        loss.backward()
        losses.append(loss.item())
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def test_bfloat16_works_end_to_end(tmp_path: Path) -> None:
    fitter = trainer(
        tmp_path,
        precision="bf16-mixed",
        limit_train_batches=1,
        callbacks=[Overlays(str(tmp_path / "out"), num_pictures=1)],
    )
    task = make("cascade_mask_rcnn", gradient_checkpointing=True)
    fitter.fit(task, datamodule=scenes())
    assert torch.isfinite(fitter.callback_metrics["train/loss"])
    assert fitter.callback_metrics["val/mask_ap"] >= 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1


def test_rates_drop_after_the_milestones(tmp_path: Path) -> None:
    rates: list[float] = []

    class Spy(DetectionTask):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return 0 * sum(p.sum() for p in self.parameters())

    task = make()
    task.__class__ = Spy
    task.hparams.update(milestones=[1, 3], gamma=0.5, warmup_steps=2, warmup_ratio=0.1)
    fitter = trainer(tmp_path, max_epochs=4, limit_val_batches=0, accumulate_grad_batches=2)
    fitter.fit(task, datamodule=scenes(train_images=8, batch_size=1))
    steps = rates[1::2]  # two batches per step, four steps per epoch
    assert steps == pytest.approx([1e-4, 5.5e-4, 1e-3, 1e-3] + [5e-4] * 8 + [2.5e-4] * 4)


def test_predictions_have_the_pictures_size(tmp_path: Path) -> None:
    data = CocoDataModule(str(CocoMaker(tmp_path / "coco").write()), num_workers=0)
    task = oracle_task(data)
    direct = trainer(tmp_path).predict(task, datamodule=data)
    first = direct[0][0]
    assert first["image_id"] == 10
    assert first["original_size"] == (60, 80)
    masks = decode_masks(first["segmentation"], (60, 80))
    assert masks.shape == (len(first["boxes"]), 60, 80)
    # the same picture in twice its size, as if it had been resized for the detector
    (images, targets) = next(iter(data.predict_dataloader()))
    doubled = task.predict_step((images, [{**targets[0], "original_size": (120, 160)}]), 0)[0]
    assert torch.allclose(doubled["boxes"], 2 * first["boxes"])
    larger = decode_masks(doubled["segmentation"], (120, 160))
    assert (larger[:, ::2, ::2] == masks).float().mean() > 0.97


def test_a_folder_of_pictures_will_do(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (50, 40), (200, 30, 30)).save(pictures / "a.png")
    predictions = trainer(tmp_path).predict(make("mask_rcnn"), PictureFolderDataModule(str(pictures), num_workers=0))
    assert predictions[0][0]["path"] == str(pictures / "a.png")
    assert predictions[0][0]["original_size"] == (40, 50)
    assert predictions[0][0]["image_id"] == 1


def test_a_checkpoint_rebuilds_the_task(tmp_path: Path) -> None:
    fitter = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    task = make("fcos", encoder="tu-resnet18", encoder_kwargs=None)
    fitter.fit(task, datamodule=scenes())
    fitter.save_checkpoint(tmp_path / "last.ckpt")
    loaded = DetectionTask.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert loaded.class_names[0] == "tree"
    assert loaded.category_ids == [1, 2, 3, 4, 5]
    for key, value in task.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"architecture": "faster_rcn"}, "unknown detector 'faster_rcn'"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"min_size": 900, "max_size": 800}, "min_size=900 must be positive and at most max_size=800"),
        ({"milestones": [8, 3]}, "milestones=.* ascending order"),
        ({"category_ids": [1, 1, 2, 3, 4]}, "category_ids must be 5 different numbers"),
        ({"optimizer": "adam"}, "optimizer='adam' must be one of adamw, sgd"),
        ({"architecture_kwargs": {"fpn_chanels": 3}}, "no argument 'fpn_chanels'.*fpn_channels"),
        ({"encoder": "replknet_31m"}, "unknown encoder 'replknet_31m'.*replknet_31"),
    ],
)
def test_impossible_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionTask(**({"architecture": "faster_rcnn", "num_classes": 5, "encoder": "replknet_31n"} | kwargs))


def test_data_must_fit_the_detector(tmp_path: Path) -> None:
    maker = CocoMaker(tmp_path / "coco")
    for content in maker.splits.values():
        for annotation in content["annotations"]:
            annotation["segmentation"] = []
    data = CocoDataModule(str(maker.write()), num_workers=0, batch_size=1)
    with pytest.raises(
        ValueError, match="architecture='mask_rcnn' predicts masks, but CocoDataModule has none: use 'fa"
    ):
        trainer(tmp_path).fit(make("mask_rcnn", num_classes=2), datamodule=data)
    with pytest.raises(ValueError, match=r"CocoDataModule has num_classes=2, but .* num_classes=5"):
        trainer(tmp_path).fit(make(), datamodule=data)
