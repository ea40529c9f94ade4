"""Multi-scale testing end to end, against OpenMMLab's ``MultiScaleFlipAug`` written again with OpenCV and NumPy.

Its `img_scale` and `img_ratios` are our `test_size` and `tta_scales`; mmsegmentation 0.x resizes the original picture
once per scale, mirrors the result, normalises it, and averages the probabilities at the picture's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lk_backbones.data import (
    ADE20KDataModule,
    CityscapesDataModule,
    PictureFolderDataModule,
    SegmentationFolderDataModule,
    SyntheticScenesDataModule,
)
from lk_backbones.tasks import SegmentationTask
from tests.data.conftest import CAMVID, save_image

MakeRoot = Callable[..., Path]

PUBLISHED = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


# --- mmsegmentation, written again ----------------------------------------------------------------------------------


def copies_of(
    bgr: np.ndarray, img_scale: tuple[int, int] | None, ratios: Sequence[float], flip: bool
) -> list[tuple[np.ndarray, bool]]:
    """The copies of a picture, and whether each is mirrored."""
    height, width = bgr.shape[:2]
    copies = []
    for ratio in ratios:
        first, second = img_scale or (height, width)
        limits = int(first * ratio), int(second * ratio)
        factor = min(max(limits) / max(height, width), min(limits) / min(height, width))
        size = int(width * factor + 0.5), int(height * factor + 0.5)
        scaled = cv2.resize(bgr, size, interpolation=cv2.INTER_LINEAR)
        copies.append((scaled, False))
        if flip:
            copies.append((scaled[:, ::-1], True))
    return copies


def normalised(bgr: np.ndarray, mean: np.ndarray, std: np.ndarray) -> torch.Tensor:
    rgb = cv2.cvtColor(np.ascontiguousarray(bgr), cv2.COLOR_BGR2RGB).astype(np.float32)
    return torch.from_numpy((rgb - mean) / std).permute(2, 0, 1)[None].contiguous()


def slide(network: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, crop: int, stride: int) -> torch.Tensor:
    height, width = image.shape[2:]
    total, count = torch.zeros(()), torch.zeros(1, 1, height, width)
    for row in range(max(height - crop + stride - 1, 0) // stride + 1):
        for column in range(max(width - crop + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + crop, height), min(column * stride + crop, width)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            logits = network(image[:, :, top:bottom, left:right])
            total = total + F.pad(logits, (left, width - right, top, height - bottom))
            count[:, :, top:bottom, left:right] += 1
    return total / count


@torch.no_grad()
def reference(
    task: SegmentationTask,
    bgr: np.ndarray,
    img_scale: tuple[int, int] | None,
    ratios: Sequence[float],
    flip: bool,
    window: tuple[int, int] | None = None,
) -> np.ndarray:
    """Probabilities `(H, W, classes)` at the picture's own size."""
    mean, std = (np.float32(task.hparams[key]) * 255 for key in ("mean", "std"))

    def network(image: torch.Tensor) -> torch.Tensor:
        return F.interpolate(task.model(image), image.shape[2:], mode="bilinear")

    task.eval()
    copies = copies_of(bgr, img_scale, ratios, flip)
    total = np.zeros((*bgr.shape[:2], task.hparams["num_classes"]), np.float64)
    for copy, mirrored in copies:
        image = normalised(copy, mean, std)
        logits = network(image) if window is None else slide(network, image, *window)
        logits = F.interpolate(logits, bgr.shape[:2], mode="bilinear")
        probabilities = logits.softmax(1)[0].permute(1, 2, 0).double().numpy()
        total += probabilities[:, ::-1] if mirrored else probabilities
    return total / len(copies)


def assert_same_labels(actual: np.ndarray, probabilities: np.ndarray) -> None:
    """Every pixel's label is the most probable one, or as probable up to the rounding of float32."""
    best = probabilities.max(axis=-1)
    chosen = np.take_along_axis(probabilities, actual[..., None].astype(int), axis=-1)[..., 0]
    assert actual.shape == probabilities.shape[:2]
    assert (best - chosen).max() < 2e-5


def mean_iou(pairs: Sequence[tuple[np.ndarray, np.ndarray]], classes: int) -> float:
    """From label maps and truths with 255 for ignored pixels."""
    labels, truth = (np.concatenate([pair[k].ravel() for pair in pairs]).astype(int) for k in (0, 1))
    labels, truth = labels[truth != 255], truth[truth != 255]
    union = np.array([((labels == c) | (truth == c)).sum() for c in range(classes)])
    both = np.array([((labels == c) & (truth == c)).sum() for c in range(classes)])
    return float(np.mean(both[union > 0] / union[union > 0]))


# --- ours -----------------------------------------------------------------------------------------------------------


def make_task(picture: np.ndarray, num_classes: int, **kwargs: Any) -> SegmentationTask:
    """A network with random weights whose answer to a picture has several classes in it."""
    torch.manual_seed(0)
    encoder = {"kernel_sizes": 3, "depths": [1, 1, 1, 1]}
    small: dict[str, Any] = {"encoder_kwargs": encoder, "architecture_kwargs": {"decoder_channels": 16}}
    task = SegmentationTask(encoder="replknet_31n", num_classes=num_classes, **small, **kwargs).eval()
    head = task.model.segmentation_head[0]
    mean, std = (np.float32(task.hparams[key]) * 255 for key in ("mean", "std"))
    with torch.no_grad():
        logits = task.model(normalised(picture, mean, std)).transpose(0, 1).flatten(1)
        head.bias.data -= logits.mean(1)
        for parameter in (head.weight, head.bias):
            parameter.data /= logits.std(1).view(-1, *[1] * (parameter.ndim - 1))
    return task


class LabelMaps(L.Callback):
    """Keeps the label map of every picture by its path."""

    def __init__(self) -> None:
        self.maps: dict[str, np.ndarray] = {}

    def on_validation_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.maps |= {path: labels.numpy() for path, labels in zip(batch["path"], outputs["label_map"], strict=True)}

    def on_predict_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.maps |= {path: labels.numpy() for path, labels in zip(outputs["path"], outputs["label_map"], strict=True)}

    on_test_batch_end = on_validation_batch_end


def make_trainer(folder: Path, *callbacks: L.Callback) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **quiet)


WINDOW: dict[str, Any] = {"inference": "slide", "slide_crop": (100, 100), "slide_stride": (67, 67)}


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID}")
@pytest.mark.parametrize(
    ("test_size", "ratios", "window"),
    [((400, 200), PUBLISHED, {}), (None, [0.31, 0.77], {}), ((320, 160), [0.75, 1.4], WINDOW)],
)
def test_real_pictures(
    tmp_path: Path, test_size: tuple[int, int] | None, ratios: list[float], window: dict[str, Any]
) -> None:
    files = sorted((CAMVID / "images" / "val").iterdir())[::60]
    root = tmp_path / "camvid"
    for split in ("train", "val"):
        for file in files:
            picture = Image.open(file).crop((0, 0, 471 + len(split), 353))  # odd sides, so that rounding matters
            mask = Image.open(CAMVID / "masks" / "val" / f"{file.stem}.png").crop((0, 0, 471 + len(split), 353))
            for folder, image in (("images", picture), ("masks", mask)):
                (root / folder / split).mkdir(parents=True, exist_ok=True)
                image.save(root / folder / split / f"{file.stem}.png")
    (root / "classes.json").write_bytes((CAMVID / "classes.json").read_bytes())
    data = SegmentationFolderDataModule(str(root), test_size=test_size, num_workers=2)
    pictures = {str(path): cv2.imread(str(path)) for path in sorted((root / "images" / "val").iterdir())}
    task = make_task(next(iter(pictures.values())), data.num_classes, tta_scales=ratios, tta_flip=True, **window)
    found = LabelMaps()
    (metrics,) = make_trainer(tmp_path, found).validate(task, data, verbose=False)
    assert found.maps.keys() == pictures.keys()
    pairs = []
    for i, (path, picture) in enumerate(pictures.items()):
        crop = (100, 67) if window else None
        probabilities = reference(task, picture, test_size, ratios, True, crop)
        assert_same_labels(found.maps[path], probabilities)
        assert len(np.unique(found.maps[path])) >= 4
        pairs.append((probabilities.argmax(-1), data.dataset("val").load(i)[1]))
    assert len(pairs) == 2
    assert metrics["val/mean_iou"] == pytest.approx(mean_iou(pairs, data.num_classes), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "num_workers"), [("folder", 1), ("cityscapes", 0), ("ade20k", 0), ("pictures", 1), ("pictures", 0)]
)
def test_every_data_module(
    kind: str, num_workers: int, folder_root: MakeRoot, cityscapes_root: Path, ade20k_root: Path, tmp_path: Path
) -> None:
    size = (131, 67)
    data: Any
    root = folder_root({"train": 1, "val": 2}, size=(45, 71))
    if kind == "folder":
        data = SegmentationFolderDataModule(str(root), test_size=size, num_workers=num_workers)
    elif kind == "cityscapes":
        data = CityscapesDataModule(str(cityscapes_root), test_size=size, num_workers=num_workers)
    elif kind == "ade20k":
        data = ADE20KDataModule(str(ade20k_root), test_size=size, num_workers=num_workers)
    else:
        data = PictureFolderDataModule(str(root / "images"), test_size=size, num_workers=num_workers)
    classes = data.num_classes if hasattr(data, "num_classes") else 3
    ratios = [0.5, 0.9, 1.7]
    first = np.ascontiguousarray(save_image(tmp_path / "first.png", 45, 71, seed=0)[..., ::-1])
    task = make_task(first, classes, tta_scales=ratios, tta_flip=True)
    for stage in ["predict"] if kind == "pictures" else ["validate", "test", "predict"]:
        found = LabelMaps()
        getattr(make_trainer(tmp_path, found), stage)(task, datamodule=data)
        assert len(found.maps) >= 2
        for path, labels in found.maps.items():
            assert_same_labels(labels, reference(task, cv2.imread(path), size, ratios, True))
    assert len(np.unique(labels)) >= 3
    # and without augmentation the same loader gives no copies
    task.hparams["tta_scales"], task.hparams["tta_flip"] = None, False
    task.trainer = make_trainer(tmp_path)
    task.trainer.datamodule = data  # type: ignore[attr-defined]
    task.setup("predict")
    assert all("scaled" not in batch for batch in data.predict_dataloader())


def test_scenes_in_batches(tmp_path: Path) -> None:
    data = SyntheticScenesDataModule((64, 96), 2, 3, 2, num_workers=0, val_batch_size=3)
    data.setup("validate")
    pictures = {data.dataset("val").path(i): data.dataset("val").load(i)[0][..., ::-1] for i in range(3)}
    task = make_task(np.ascontiguousarray(pictures["scene_val_00000"]), 9, tta_scales=[0.5, 1.0, 1.3])
    found = LabelMaps()
    make_trainer(tmp_path, found).validate(task, data, verbose=False)
    for path, labels in found.maps.items():
        assert_same_labels(labels, reference(task, pictures[path], None, [0.5, 1.0, 1.3], False))


def test_the_validations_of_a_training_are_not_augmented(tmp_path: Path) -> None:
    data = SyntheticScenesDataModule((64, 64), 4, 2, 2, num_workers=0, batch_size=2)
    task = SegmentationTask("fpn", "resnet18", num_classes=9, tta_scales=[0.5, 1.0])
    seen: dict[str, list[bool]] = {"fit": [], "validate": []}

    class Watch(L.Callback):
        def on_validation_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, *_: Any) -> None:
            seen["fit" if trainer.state.fn == "fit" else "validate"].append("scaled" in batch)

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[Watch()],
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **quiet,
    )
    trainer.fit(task, data)
    trainer.validate(task, data, verbose=False)
    assert (set(seen["fit"]), set(seen["validate"])) == ({False}, {True})
    trainer.fit_loop.max_epochs = 2  # type: ignore[misc]
    trainer.fit(task, data)
    assert set(seen["fit"]) == {False}


def test_pictures_that_were_resized_before_are_mentioned(tmp_path: Path) -> None:
    """A bare loader knows no scales; where it resizes, the copies are blurred, as they all were once."""
    save_image(tmp_path / "a.png", 30, 40, seed=0)
    data = PictureFolderDataModule(str(tmp_path), num_workers=0, test_size=(80, 60))
    data.setup("predict")
    task = SegmentationTask("fpn", "resnet18", num_classes=3, tta_scales=[0.5, 1.0])
    with pytest.warns(UserWarning, match="resized before, from 30x40 to 60x80 pixels, which blurs"):
        make_trainer(tmp_path).predict(task, data.predict_dataloader())


def test_pictures_whose_copies_differ_in_size_cannot_share_a_batch(tmp_path: Path) -> None:
    for i, size in enumerate([(30, 55), (30, 56)]):
        save_image(tmp_path / f"{i}.png", *size, seed=i)
    data = PictureFolderDataModule(str(tmp_path), batch_size=2, num_workers=0, test_size=(70, 40))
    data.setup("predict")
    assert [tuple(batch["image"].shape) for batch in data.predict_dataloader()] == [(2, 3, 38, 70)]
    data.set_test_scales([1.0, 1.5])
    with pytest.raises(ValueError, match=r"a batch: .*0\.png is 57×105, .*1\.png is 56×105"):
        list(data.predict_dataloader())


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (3, 200), (1, 1)])
def test_extreme_shapes(tmp_path: Path, size: tuple[int, int]) -> None:
    save_image(tmp_path / "a.png", *size, seed=0)
    data = PictureFolderDataModule(str(tmp_path), num_workers=0)
    task = SegmentationTask("fpn", "resnet18", num_classes=3, tta_scales=[0.25, 1.0, 2.0], tta_flip=True)
    found = LabelMaps()
    make_trainer(tmp_path, found).predict(task, data)
    assert [labels.shape for labels in found.maps.values()] == [size]


def test_tensors_of_other_channels() -> None:
    task = SegmentationTask("unet", "resnet18", num_classes=3, in_channels=5, tta_scales=[0.5, 1.0, 1.7], tta_flip=True)
    image = torch.rand(2, 5, 37, 53)
    with torch.no_grad():
        scores = task.eval().predict_scores(image, (37, 53))
        expected = torch.zeros(2, 3, 37, 53)
        for size in ((18, 26), (37, 53), (62, 89)):
            copy = F.interpolate(image, size, mode="bilinear")
            for dims in ([], [3]):
                logits = F.interpolate(task(copy.flip(dims)).flip(dims), (37, 53), mode="bilinear")
                expected += logits.softmax(1) / 6
    torch.testing.assert_close(scores.exp(), expected)
