"""Augmentation keeps pictures, boxes and masks together; batches keep to one aspect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from lk_backbones.data import SyntheticScenesDetectionDataModule
from lk_backbones.data.detection_transforms import MULTI_SCALE, detection_train_transform
from lk_backbones.data.sampling import GroupedTrainingSampler, SampleKey

from .conftest import CocoMaker
from .test_coco import make


def test_boxes_and_masks_follow_the_picture() -> None:
    # Two bright rectangles on black: where they are after augmentation can be seen.
    picture = np.zeros((300, 400, 3), np.uint8)
    boxes = np.array([[40, 60, 120, 160], [250, 100, 380, 280]], np.float32)
    masks = np.zeros((2, 300, 400), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[y1:y2, x1:x2] = 1
    picture[masks[0] > 0, 0] = 255
    picture[masks[1] > 0, 1] = 255
    transform = detection_train_transform(sizes=(320, 400), max_size=600, crop_probability=0.5, crop_range=(200, 300))
    shapes, kept, flipped = set(), 0, 0
    for seed in range(40):
        transform.set_random_seed(seed)
        out = transform(image=picture, bboxes=boxes, masks=masks, places=np.arange(2))
        image = out["image"]
        shapes.add(tuple(image.shape[1:]))
        assert min(image.shape[1:]) in (320, 400)
        places = [int(place) for place in out["places"]]
        for place, box in zip(places, out["bboxes"], strict=True):
            mask = np.asarray(out["masks"][place])
            seen = image[place].numpy() > 0.5
            assert (mask.astype(bool) == seen).mean() > 0.985
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(np.asarray(box) - around).max() <= 3
            kept += 1
        if places == [0, 1]:
            flipped += out["bboxes"][0][0] > out["bboxes"][1][0]
    assert kept > 50
    assert 3 < flipped < 30
    assert len(shapes) > 5  # crops have shapes of their own


def test_published_sizes(coco: CocoMaker) -> None:
    data = make(coco.write(), crop_probability=0)
    data.setup("fit")
    dataset = data.dataset("train")
    heights = {dataset[SampleKey(0, seed)][0].shape[1] for seed in range(60)}
    assert heights <= set(MULTI_SCALE)
    assert len(heights) > 8


def test_objects_that_a_crop_leaves_out_are_gone(coco: CocoMaker) -> None:
    data = make(coco.write(), sizes=[60], crop_probability=1.0, crop_range=(60, 150))
    data.setup("fit")
    counts = set()
    for seed in range(30):
        _, target = data.dataset("train")[SampleKey(0, seed)]
        counts.add(len(target["labels"]))
        assert target["masks"].flatten(1).any(dim=1).all()
        assert target["masks"].shape[0] == len(target["boxes"]) == len(target["area"]) == len(target["iscrowd"])
        assert torch.equal(target["area"], target["masks"].sum(dim=(1, 2)).float())
    assert len(counts) > 1


def test_the_same_key_gives_the_same_sample() -> None:
    data = SyntheticScenesDetectionDataModule(image_size=(64, 96), train_images=2, num_workers=0)
    data.setup("fit")
    one, other, third = (data.dataset("train")[SampleKey(1, seed)] for seed in (5, 5, 6))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1]["boxes"], other[1]["boxes"])
    assert not torch.equal(one[0], third[0])


def test_scene_objects_have_their_boxes() -> None:
    data = SyntheticScenesDetectionDataModule(image_size=(96, 144), val_images=8, num_workers=0, val_batch_size=4)
    data.setup("validate")
    seen: set[int] = set()
    for images, targets in data.val_dataloader():
        assert len(images) == len(targets) == 4
        for target in targets:
            seen |= set(target["labels"].tolist())
            for box, mask, area in zip(target["boxes"], target["masks"], target["area"], strict=True):
                rows, columns = torch.nonzero(mask, as_tuple=True)
                around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box.tolist() == [int(side) for side in around]
                assert mask.sum() == area >= 12
    assert seen == {1, 2, 3, 4, 5}


def batches(sampler: GroupedTrainingSampler, size: int) -> list[list[int]]:
    samples = [key.sample for key in sampler]
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def test_batches_are_of_one_group_but_for_the_rest() -> None:
    groups = [i % 3 == 0 for i in range(50)]
    sampler = GroupedTrainingSampler(list(range(50)), groups, 4, seed=1)  # type: ignore[arg-type]
    cut = batches(sampler, 4)
    assert sorted(sample for batch in cut for sample in batch) == list(range(50))
    mixed = [i for i, batch in enumerate(cut) if len({groups[sample] for sample in batch}) > 1]
    assert all(i >= len(cut) - 2 for i in mixed)
    sampler.start = 20
    assert batches(sampler, 4) == cut[5:]
    sampler.start = 0
    sampler.set_epoch(1)
    assert batches(sampler, 4) != cut


@pytest.mark.parametrize("world", [2, 3])
def test_all_processes_have_equally_many_batches(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    groups = [i < 11 for i in range(46)]
    seen: list[Any] = []
    lengths = set()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        samples = [key.sample for key in GroupedTrainingSampler(list(range(46)), groups, 4, seed=1)]  # type: ignore[arg-type]
        lengths.add(len(samples))
        seen += samples
    assert len(lengths) == 1
    assert set(seen) == set(range(46))
