"""Masks that are drawn once, at their final size, are those that were drawn first and resized after."""

from __future__ import annotations

from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from lk_backbones.data.detection_transforms import ResizeShortSide, box_pipeline, detection_train_transform, keeps_frame
from lk_backbones.data.outlines import Outlines, Polygons, RunLengths
from lk_backbones.data.run_lengths import decompress
from lk_backbones.data.sampling import SampleKey

from .conftest import COCO_MINI, CocoMaker
from .test_coco import make


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="needs the COCO pictures, which are not shipped")
def test_real_masks_are_those_of_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # OpenCV's nearest neighbour is half a pixel off, so the long way resizes masks as it resizes the picture
    def smooth(self: Any, mask: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        return cv2.resize(mask * 255, size[::-1], interpolation=cv2.INTER_LINEAR) // 128

    monkeypatch.setattr(ResizeShortSide, "apply_to_mask", smooth)
    data = make(COCO_MINI)
    data.setup("fit")
    dataset = data.dataset("train")
    overlaps: list[float] = []
    for index in range(len(dataset)):
        key = SampleKey(index, 3 * index)
        image, once = dataset[key]
        dataset._keeps_frame = False  # masks are drawn at the size of the picture, and go through every transform
        same, long = dataset[key]
        dataset._keeps_frame = True
        assert torch.equal(image, same)
        pairs = [(i, j) for i in range(len(once["boxes"])) for j in range(len(long["boxes"]))]
        pairs = [(i, j) for i, j in pairs if torch.equal(once["boxes"][i], long["boxes"][j])]
        assert len(pairs) >= len(long["boxes"]) - 1  # an object of hardly a pixel may be seen in one way only
        for i, j in pairs:
            one, other = once["masks"][i].bool(), long["masks"][j].bool()
            if other.sum() > 400:
                overlaps.append(float((one & other).sum() / (one | other).sum()))
            assert once["labels"][i] == long["labels"][j]
            assert once["area"][i] == one.sum()
    assert len(overlaps) > 60
    assert np.mean(overlaps) > 0.97
    assert min(overlaps) > 0.8


def test_every_step_moves_the_masks_with_the_picture() -> None:
    # the picture is the mask of an object that has corners on whole pixels and is drawn large, so that both agree
    polygon = np.array([30, 20, 90, 20, 90, 50, 60, 50, 60, 80, 30, 80], np.float64)
    (rle,) = mask_api.frPyObjects([polygon.tolist()], 100, 120)
    shapes = [Polygons([polygon]), RunLengths(decompress([rle["counts"].decode()])[0])]
    outlines = Outlines((100, 120), shapes, ["a", "b"])
    drawn = outlines.draw()
    assert np.array_equal(drawn[0], drawn[1])
    picture = np.repeat(drawn[0][..., None] * 255, 3, axis=2)
    transform = detection_train_transform((150, 210), 400, crop_range=(60, 90))
    assert keeps_frame(transform)
    shapes_seen = set()
    for seed in range(30):
        transform.set_random_seed(seed)
        frame = np.array([1.0, 0.0, 1.0, 0.0])
        out = transform(image=picture, bboxes=np.array([[30, 20, 90, 80]]), places=np.arange(1), frame=frame)
        seen = out["image"][0].numpy() > 0.5
        shapes_seen.add(seen.shape)
        for mask in outlines.draw([0, 1], out["frame"], seen.shape):
            assert (mask.astype(bool) == seen).mean() > 0.98
    assert len(shapes_seen) > 5


def test_a_pipeline_of_ones_own_turns_pixels(coco: CocoMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(coco.write())
    monkeypatch.setattr(data, "train_transform", lambda: box_pipeline([A.VerticalFlip(p=1)]))
    data.setup("fit")
    dataset = data.dataset("train")
    assert not keeps_frame(dataset.transform)
    objects = dataset.load(0)[1]
    _, target = dataset[SampleKey(0, 0)]
    assert np.array_equal(target["masks"].numpy(), objects.masks[:, ::-1])


def test_compressed_run_lengths_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(0)
    masks = [(rng.random((37, 53)) < share).astype(np.uint8) for share in (0, 0.01, 0.5, 0.99, 1)]
    masks.append(np.kron(rng.integers(0, 2, (3, 4)), np.ones((400, 900))).astype(np.uint8))
    texts = [mask_api.encode(np.asfortranarray(mask))["counts"].decode() for mask in masks]
    for mask, counts in zip(masks, decompress(texts), strict=True):
        assert counts.sum() == mask.size
        drawn = np.zeros_like(mask)
        RunLengths(counts).draw(drawn, np.array([1.0, 0.0, 1.0, 0.0]), (mask.shape[0], mask.shape[1]))
        assert np.array_equal(drawn, mask)
    for end in range(len(texts[2])):
        try:
            (counts,) = decompress([texts[2][:end]])
        except ValueError:
            continue
        assert counts.sum() != masks[2].size
