from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lk_backbones.data import ADE20KDataModule
from tests.data.conftest import random_labels, save_mask


def make(root: Path, **options: object) -> ADE20KDataModule:
    return ADE20KDataModule(str(root), num_workers=0, batch_size=2, **options)


def test_defaults_are_the_published_ones(ade20k_root: Path) -> None:
    data = make(ade20k_root)
    assert data.crop_size == (512, 512)
    assert data.base_size == data.test_size == (2048, 512)
    assert (data.num_classes, data.ignore_index) == (150, 255)
    assert data.class_names[:2] == ["wall", "building"]


def test_pictures_are_resized_and_masks_are_not(ade20k_root: Path) -> None:
    data = make(ade20k_root, test_size=(200, 96))
    data.setup("test")
    for i, batch in enumerate(data.test_dataloader()):
        height = 48 + 8 * i
        labels = random_labels(height, 64, range(151), seed=i)
        assert np.array_equal(batch["mask"][0].numpy(), np.where(labels == 0, 255, labels - 1))
        assert batch["original_size"] == [(height, 64)]
        scale = 96 / min(height, 64)
        assert batch["image"].shape == (1, 3, int(height * scale + 0.5), int(64 * scale + 0.5))
    assert i == 2


def test_base_size_sets_the_scale_of_training(ade20k_root: Path) -> None:
    # Ratio 1 of base size 32 shrinks every picture to a short side of 32, so a crop of 64 is padded from there on.
    data = make(ade20k_root, base_size=(999, 32), scale_range=(1, 1), crop_size=64)
    data.setup("fit")
    for i in range(3):
        mask = data.dataset("train")[i]["mask"]
        assert mask.shape == (64, 64)
        assert (mask[:32, :32] != 255).any()
        height = 48 + 8 * i
        short_is_height = height < 64
        beyond = mask[32:] if short_is_height else mask[:, 32:] if height > 64 else mask[32:, 32:]
        assert (beyond == 255).all()


def test_different_sizes_cannot_share_a_batch(ade20k_root: Path) -> None:
    data = make(ade20k_root, val_batch_size=3)
    data.setup("validate")
    with pytest.raises(ValueError, match=r"ADE_val_00000001\.jpg is .*Set val_batch_size=1"):
        next(iter(data.val_dataloader()))


def test_wrong_root_and_labels(ade20k_root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Did you mean root='.*/ADEChallengeData2016'\?"):
        make(ade20k_root.parent).setup("fit")
    path = ade20k_root / "annotations/validation/ADE_val_00000002.png"
    save_mask(path, np.full((56, 64), 151))
    with pytest.raises(
        ValueError, match=rf"{path} has labels .*: 151 .*Labels may be 1\.\.150 \(wall to flag\), ignored: 0\."
    ):
        make(ade20k_root).setup("validate")
    make(ade20k_root, check_files="headers").setup("validate")  # found when it is loaded


def test_mask_without_image(ade20k_root: Path) -> None:
    (ade20k_root / "images/training/ADE_train_00000002.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 3 masks have no image: .*ADE_train_00000002\.png\. Add the images"
    ):
        make(ade20k_root).setup("fit")
