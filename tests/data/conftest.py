"""Tiny data sets in the real layouts, drawn into temporary folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

CAMVID = Path(__file__).parents[2].parent / "shared" / "data" / "camvid"


def save_image(path: Path, height: int, width: int, seed: int) -> np.ndarray:
    """Write a smooth random RGB picture; return its pixels (exact for PNG)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    image.save(path)
    return np.asarray(image)


def save_mask(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.astype(np.uint8)).save(path)


def random_labels(height: int, width: int, values: Sequence[int], seed: int) -> np.ndarray:
    """Blocks of 8 pixels with labels out of ``values``."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice(np.asarray(values), (height // 8 + 1, width // 8 + 1))
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]


@pytest.fixture
def folder_root(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder data set: ``{split: number of pictures}``, or a number for the layout without splits."""

    def make(splits: dict[str, int] | int, size: tuple[int, int] = (40, 56), extension: str = ".png") -> Path:
        root = tmp_path / "own"
        parts = {"": splits} if isinstance(splits, int) else splits
        for number, (split, count) in enumerate(parts.items()):
            for i in range(count):
                name = f"picture_{i}"
                save_image(root / "images" / split / f"{name}{extension}", *size, seed=100 * number + i)
                labels = random_labels(*size, [0, 1, 2, 9], seed=100 * number + i)
                save_mask(root / "masks" / split / f"{name}.png", labels)
        classes = {"names": ["ground", "water", "wood"], "ignore_index": 9}
        (root / "classes.json").write_text(json.dumps(classes))
        return root

    return make


@pytest.fixture
def cityscapes_root(tmp_path: Path) -> Path:
    root = tmp_path / "cityscapes"
    cities = {"train": ["aachen", "bochum"], "val": ["munster"], "test": ["berlin"]}
    for split, names in cities.items():
        for city in names:
            for i in range(2):
                name = f"{city}_{i:06d}_000019"
                save_image(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", 32, 64, seed=i)
                labels = np.zeros((32, 64)) if split == "test" else random_labels(32, 64, range(34), seed=i)
                save_mask(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", labels)
                # The real folders hold these as well; they must not be taken for masks.
                save_mask(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", labels)
                save_image(root / "gtFine" / split / city / f"{name}_gtFine_color.png", 32, 64, seed=i)
    return root


@pytest.fixture
def ade20k_root(tmp_path: Path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    for folder, prefix in (("training", "ADE_train"), ("validation", "ADE_val")):
        for i in range(3):
            name, size = f"{prefix}_{i + 1:08d}", (48 + 8 * i, 64)
            save_image(root / "images" / folder / f"{name}.jpg", *size, seed=i)
            save_mask(root / "annotations" / folder / f"{name}.png", random_labels(*size, range(151), seed=i))
    return root


COCO_MINI = CAMVID.parent / "coco_mini"
BCCD = CAMVID.parent / "bccd"


class CocoMaker:
    """A small data set in COCO format, to be changed before it is written.

    Two categories with a gap between their ids; per split four pictures of 60×80: two objects (a polygon and one of two
    parts), one object and a crowd as uncompressed RLE, nothing, one object as compressed RLE.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.splits = {"train2017": self._content(0), "val2017": self._content(10)}

    @property
    def train(self) -> dict[str, Any]:
        return self.splits["train2017"]

    def _content(self, first: int) -> dict[str, Any]:
        images = [{"id": first + i, "file_name": f"{first + i}.png", "height": 60, "width": 80} for i in range(4)]
        crowd = [60 * 40, 60 * 20, 60 * 20]  # columns 40 to 59
        part = np.zeros((60, 80), np.uint8)
        part[5:15, 10:30] = 1
        rle = mask_api.encode(np.asfortranarray(part))
        square, corner = [10, 10, 30, 10, 30, 40, 10, 40], [70, 50, 80, 50, 80, 60, 70, 60]
        annotations = [
            self.annotation(0, first, 7, [10, 10, 20, 30], [square]),
            self.annotation(1, first, 3, [10, 10, 70, 50], [square, corner], area=700),
            self.annotation(2, first + 1, 3, [2, 2, 30, 30], [[2, 2, 32, 2, 32, 32, 2, 32]]),
            self.annotation(
                3, first + 1, 7, [40, 0, 20, 60], {"size": [60, 80], "counts": crowd}, iscrowd=1, area=1200
            ),
            self.annotation(4, first + 3, 7, [10, 5, 20, 10], {"size": [60, 80], "counts": rle["counts"].decode()}),
        ]
        categories = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]
        return {"images": images, "annotations": annotations, "categories": categories}

    @staticmethod
    def annotation(number: int, image: int, category: int, box: list[float], segmentation: Any, **more: Any) -> Any:
        annotation = {"id": 100 + number, "image_id": image, "category_id": category, "bbox": box}
        return annotation | {"segmentation": segmentation, "area": box[2] * box[3], "iscrowd": 0} | more

    def write(self) -> Path:
        for number, (split, content) in enumerate(self.splits.items()):
            for image in content.get("images", []) if isinstance(content, dict) else []:
                if "file_name" in image and not (self.root / split / image["file_name"]).exists():
                    save_image(self.root / split / image["file_name"], 60, 80, seed=number)
            path = self.root / "annotations" / f"instances_{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        return self.root


@pytest.fixture
def coco(tmp_path: Path) -> CocoMaker:
    return CocoMaker(tmp_path / "coco")
