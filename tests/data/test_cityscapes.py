from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lk_backbones.data import CityscapesDataModule
from tests.data.conftest import random_labels, save_mask

TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
             28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip


def make(root: Path, **options: object) -> CityscapesDataModule:
    """The data module; its pictures keep their size, which is tiny here."""
    own_size = {"base_size": None, "test_size": None}
    return CityscapesDataModule(str(root), num_workers=0, batch_size=2, **(own_size | options))


def test_defaults_are_the_published_ones(cityscapes_root: Path) -> None:
    data = CityscapesDataModule(str(cityscapes_root))
    assert data.crop_size == (769, 769)
    assert data.scale_range == (0.5, 2.0)
    assert data.base_size == data.test_size == (2049, 1025)
    assert (data.num_classes, data.ignore_index) == (19, 255)
    assert data.class_names[:3] == ["road", "sidewalk", "building"]
    assert data.class_colors[0] == (128, 64, 128)


def test_every_split(cityscapes_root: Path) -> None:
    data = make(cityscapes_root, crop_size=(24, 40))
    data.setup()
    assert [Path(data.dataset("train").path(i)).name for i in range(4)] == [
        "aachen_000000_000019_leftImg8bit.png",
        "aachen_000001_000019_leftImg8bit.png",
        "bochum_000000_000019_leftImg8bit.png",
        "bochum_000001_000019_leftImg8bit.png",
    ]
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 24, 40)
    assert batch["mask"].shape == (2, 24, 40)
    assert batch["mask"].dtype == torch.int64
    assert "original_size" not in batch

    batches = list(data.val_dataloader())
    assert [Path(path).parent.name for batch in batches for path in batch["path"]] == ["munster", "munster"]
    for i, batch in enumerate(batches):
        labels = random_labels(32, 64, range(34), seed=i)
        expected = np.vectorize(lambda label: TRAIN_IDS.get(label, 255))(labels)
        assert np.array_equal(batch["mask"][0].numpy(), expected)
        picture = np.asarray(Image.open(batch["path"][0]))
        assert np.array_equal((batch["image"][0] * 255).round().numpy(), picture.transpose(2, 0, 1))
        assert batch["original_size"] == [(32, 64)]
    assert [b["path"] for b in data.test_dataloader()] == [b["path"] for b in batches]

    predicted = list(data.predict_dataloader())
    assert [Path(batch["path"][0]).parent.name for batch in predicted] == ["berlin", "berlin"]
    assert "mask" not in predicted[0]  # the label files of the test split are placeholders


def test_prediction_falls_back_to_validation(cityscapes_root: Path) -> None:
    (cityscapes_root / "leftImg8bit" / "test").rename(cityscapes_root / "elsewhere")
    data = make(cityscapes_root)
    data.setup("predict")
    assert "munster" in data.dataset("val").path(0)
    assert len(list(data.predict_dataloader())) == 2


def test_wrong_roots(cityscapes_root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere\. In .* there is: cityscapes/"):
        make(cityscapes_root.parent / "nowhere").setup("fit")
    expected = r"no sub-folder 'leftImg8bit/train'.*there is: cityscapes/\. Expected: leftImg8bit/\{train,val\}"
    with pytest.raises(FileNotFoundError, match=expected + r".*Did you mean root='.*/cityscapes'\?"):
        make(cityscapes_root.parent).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"Did you mean root='.*/cityscapes'\?"):
        make(cityscapes_root / "leftImg8bit").setup("fit")
    (cityscapes_root / "gtFine" / "val").rename(cityscapes_root / "gtFine" / "valid")
    with pytest.raises(
        FileNotFoundError, match=r"no sub-folder 'gtFine/val'\. In .*/gtFine there is: test/, train/, valid/"
    ):
        make(cityscapes_root).setup("fit")


def test_image_without_mask(cityscapes_root: Path) -> None:
    name = "bochum/bochum_000001_000019_gtFine_labelIds.png"
    (cityscapes_root / "gtFine" / "train" / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"1 of 4 images have no mask: .*bochum_000001.*should be .*train/{name}"
    ):
        make(cityscapes_root).setup("fit")


def test_unknown_id(cityscapes_root: Path) -> None:
    path = cityscapes_root / "gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png"
    save_mask(path, np.full((32, 64), 34))
    with pytest.raises(ValueError, match=rf"{path} has labels that belong to no class: 34 \(2048 pixels\)"):
        make(cityscapes_root).setup("validate")
