"""CPU time of a training sample with masks, against a plain pipeline of cv2 and pycocotools, side by side.

    python benchmarks/coco_loading.py --root data/coco_mini

The plain pipeline draws the same numbers (mirror, crop, short side) and does what one would write by hand: decode with
OpenCV, resize and crop the picture, move the polygons as numbers, draw each once at its final size.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from lk_backbones.analysis.timing import interleave
from lk_backbones.data import CocoDataModule
from lk_backbones.data.detection_transforms import MULTI_SCALE, SIZES_BEFORE_CROP
from lk_backbones.data.sampling import SampleKey


class Plain:
    """The pipeline by hand."""

    def __init__(self, annotations: Path, folder: Path, seed: int = 0) -> None:
        self.coco = COCO(str(annotations))
        self.folder = folder
        self.images = [image for image in self.coco.loadImgs(self.coco.getImgIds()) if self.coco.getAnnIds(image["id"])]
        self.random = random.Random(seed)

    def __call__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        info = self.images[index]
        annotations = self.coco.loadAnns(self.coco.getAnnIds(info["id"]))
        picture = cv2.cvtColor(cv2.imread(str(self.folder / info["file_name"])), cv2.COLOR_BGR2RGB)
        height, width = picture.shape[:2]
        polygons = [_polygons(annotation["segmentation"]) for annotation in annotations]
        boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64)
        boxes[:, 2:] += boxes[:, :2]
        scale, shift = np.ones(2), np.zeros(2)
        if self.random.random() < 0.5:
            picture = cv2.flip(picture, 1)
            scale, shift = np.array([-1.0, 1]), np.array([float(width), 0])
        if self.random.random() < 0.5:
            picture, factor = self._resized(picture, self.random.choice(SIZES_BEFORE_CROP))
            scale, shift = scale * factor, shift * factor
            rows, columns = (self.random.randint(min(side, 384), min(side, 600)) for side in picture.shape[:2])
            top, left = (
                self.random.randint(0, side - part)
                for side, part in zip(picture.shape[:2], (rows, columns), strict=True)
            )
            picture, shift = picture[top : top + rows, left : left + columns], shift - [left, top]
        picture, factor = self._resized(picture, self.random.choice(MULTI_SCALE))
        scale, shift = scale * factor, shift * factor
        height, width = picture.shape[:2]
        corners = boxes.reshape(-1, 2, 2) * scale + shift
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        boxes = boxes.clip(0, [width, height, width, height])
        kept = np.flatnonzero(((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1))
        masks = np.zeros((len(kept), height, width), np.uint8)
        for mask, i in zip(masks, kept, strict=True):
            if isinstance(polygons[i], dict):
                whole = mask_api.decode(mask_api.frPyObjects(polygons[i], info["height"], info["width"]))
                matrix = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]])
                mask[:] = cv2.warpAffine(whole, matrix, (width, height), flags=cv2.INTER_NEAREST)
            else:
                moved = [(p * scale + shift).ravel() for p in polygons[i]]
                mask[:] = mask_api.decode(mask_api.merge(mask_api.frPyObjects(moved, height, width)))
        image = torch.from_numpy(picture).permute(2, 0, 1).contiguous().float().div_(255)
        return image, {"boxes": torch.from_numpy(boxes[kept].astype(np.float32)), "masks": torch.from_numpy(masks)}

    def _resized(self, picture: np.ndarray, short: int) -> tuple[np.ndarray, np.ndarray]:
        height, width = picture.shape[:2]
        factor = min(short / min(height, width), 1333 / max(height, width))
        size = (int(width * factor + 0.5), int(height * factor + 0.5))
        return cv2.resize(picture, size), np.array([size[0] / width, size[1] / height])


def _polygons(segmentation: Any) -> Any:
    if isinstance(segmentation, dict):
        return segmentation
    return [np.array(polygon, np.float64).reshape(-1, 2) for polygon in segmentation]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="a data set in COCO's layout")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--samples", type=int, default=32, help="samples of one round")
    arguments = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    data = CocoDataModule(str(arguments.root), num_workers=0, check_files="off")
    data.setup("fit")
    dataset = data.dataset("train")
    plain = Plain(arguments.root / "annotations" / "instances_train2017.json", arguments.root / "train2017")
    seeds = random.Random(0)

    def ours() -> None:
        for i in range(arguments.samples):
            dataset[SampleKey(i % len(dataset), seeds.randrange(2**31))]

    def by_hand() -> None:
        for i in range(arguments.samples):
            plain(i % len(plain.images))

    timings = interleave({"ours": ours, "plain": by_hand}, arguments.seconds, time.process_time, float("inf"))
    for name, timing in timings.items():
        print(f"{name:6} {timing.best / arguments.samples:7.1f} ms per sample (best of {len(timing.calls)} rounds)")
    print(f"ratio  {timings['ours'].best / timings['plain'].best:7.2f}")


if __name__ == "__main__":
    main()
