from __future__ import annotations

import random
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from lk_backbones.data.transforms import (
    RandomCropMaxRatio,
    ResizeByRatio,
    eval_transform,
    photometric_distortion,
    train_transform,
)


def seeded(transform: A.Compose, seed: int) -> A.Compose:
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return transform


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("ratio", "base_size", "shape", "expected"),
    [
        (0.5, None, (101, 201), (51, 101)),
        (2.0, None, (101, 201), (202, 402)),
        (1.0, (2048, 512), (480, 640), (512, 683)),  # the short side limits
        (1.0, (2048, 512), (640, 480), (683, 512)),  # portrait alike
        (1.0, (512, 2048), (480, 640), (512, 683)),  # whichever way round it is written
        (1.0, (2048, 512), (100, 1000), (205, 2048)),  # the long side limits
        (0.5, (2048, 512), (512, 512), (256, 256)),
        (0.5, None, (1, 1), (1, 1)),
    ],
)
def test_resize_keeps_the_shape(
    ratio: float, base_size: tuple[int, int] | None, shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    transform = A.Compose([ResizeByRatio((ratio, ratio), base_size)])
    out = transform(image=np.zeros((*shape, 3), np.uint8), mask=np.zeros(shape, np.uint8))
    assert out["image"].shape == (*expected, 3)
    assert out["mask"].shape == expected


def test_ratios_fill_their_range() -> None:
    transform = A.Compose([ResizeByRatio((0.5, 2.0))])
    image, mask = np.zeros((100, 40, 3), np.uint8), np.zeros((100, 40), np.uint8)
    heights = [seeded(transform, seed)(image=image, mask=mask)["mask"].shape[0] for seed in range(300)]
    assert 50 <= min(heights) < 55
    assert 195 < max(heights) <= 200
    assert abs(np.mean(heights) - 125) < 8  # uniform: standard error 2.5


def test_mask_is_never_interpolated() -> None:
    mask = np.random.default_rng(0).choice(np.array([0, 9, 255], np.uint8), (50, 70))
    for ratio in (0.6, 1.7):
        out = A.Compose([ResizeByRatio((ratio, ratio))])(image=noise(50, 70), mask=mask)
        assert set(np.unique(out["mask"])) == {0, 9, 255}


def test_image_and_mask_move_together() -> None:
    mask = np.kron(np.random.default_rng(0).integers(0, 2, (6, 9)), np.ones((16, 16))).astype(np.uint8)
    image = np.repeat(mask[..., None] * 255, 3, axis=2)
    transform = A.Compose([ResizeByRatio((0.5, 2.0)), RandomCropMaxRatio(40, 50), A.HorizontalFlip(p=0.5)])
    for seed in range(20):
        out = seeded(transform, seed)(image=image, mask=mask)
        agree = (out["image"][..., 0] > 127) == (out["mask"] > 0)
        assert agree.mean() > 0.93  # all but a pixel along the borders


def test_crop_is_the_first_varied_draw_of_eleven(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[:20, :30] = 1
    crop = RandomCropMaxRatio(20, 20, cat_max_ratio=0.75)
    draws: list[tuple[int, int, int, int]] = []
    original = crop.draw
    monkeypatch.setattr(crop, "draw", lambda *size: draws.append(original(*size)) or draws[-1])
    transform = A.Compose([crop])

    def varied(box: tuple[int, int, int, int]) -> bool:
        share = mask[box[0] : box[1], box[2] : box[3]].mean()
        return max(share, 1 - share) < 0.75

    lengths = []
    for seed in range(200):
        draws.clear()
        out = seeded(transform, seed)(image=np.repeat(mask[..., None], 3, 2), mask=mask)
        box = draws[-1]
        assert np.array_equal(out["mask"], mask[box[0] : box[1], box[2] : box[3]])
        assert np.array_equal(out["image"][..., 0], out["mask"])
        assert not any(varied(draw) for draw in draws[:-1])
        assert varied(box) or len(draws) == 11
        lengths.append(len(draws))
    assert min(lengths) == 1
    assert max(lengths) == 11


@pytest.mark.parametrize(
    ("pixels", "varied"),
    [
        ([0, 0, 0, 1], False),  # exactly 75 %
        ([0, 0, 0, 1, 1], True),
        ([0, 0, 0, 1, 1] + [255] * 50, True),  # ignored pixels are not counted
        ([0, 0, 0, 0, 1] + [255] * 50, False),
        ([0, 0, 255, 255], False),  # one class only
        ([255, 255], False),
    ],
)
def test_share_of_one_class(pixels: list[int], varied: bool) -> None:
    assert RandomCropMaxRatio(1, 1, cat_max_ratio=0.75)._is_varied(np.array([pixels], np.uint8)) is varied


def test_cat_max_ratio_one_takes_the_first_draw() -> None:
    crop = RandomCropMaxRatio(4, 4, cat_max_ratio=1)
    out = A.Compose([crop])(image=np.zeros((8, 8, 3), np.uint8), mask=np.zeros((8, 8), np.uint8))
    assert out["mask"].shape == (4, 4)


def test_padding_is_zero_after_normalisation_and_ignored() -> None:
    transform = train_transform((32, 48), scale_range=(1, 1))
    image, mask = noise(20, 30), np.random.default_rng(0).integers(0, 3, (20, 30)).astype(np.uint8)
    out = seeded(transform, 0)(image=image, mask=mask)
    assert out["image"].shape == (3, 32, 48)
    assert out["image"].dtype == torch.float32
    assert out["mask"].shape == (32, 48)
    std = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    normalised = (out["image"] - torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]) / std
    for padding in (normalised[:, 20:], normalised[:, :, 30:]):
        assert padding.abs().max() < 1e-6
    assert (out["mask"][20:] == 255).all()
    assert (out["mask"][:, 30:] == 255).all()
    assert (out["mask"][:20, :30] < 3).all()
    assert normalised[:, :20, :30].abs().mean() > 0.1


def test_fill_colour_can_be_chosen() -> None:
    transform = train_transform((8, 8), scale_range=(1, 1), image_fill=(0.0, 0.5, 1.0))
    out = transform(image=noise(4, 4), mask=np.zeros((4, 4), np.uint8))
    assert out["image"][:, 7, 7].tolist() == [0.0, 0.5, 1.0]


def test_training_pictures_stay_in_range() -> None:
    transform = train_transform((64, 64))
    mask = np.random.default_rng(0).integers(0, 5, (50, 70)).astype(np.uint8)
    for seed in range(30):
        out = seeded(transform, seed)(image=noise(50, 70, seed), mask=mask)
        assert out["image"].shape == (3, 64, 64)
        assert 0 <= out["image"].min() <= out["image"].max() <= 1


def test_same_seed_same_sample() -> None:
    transform = train_transform((40, 40))
    mask = np.random.default_rng(0).integers(0, 5, (50, 70)).astype(np.uint8)

    def draw(seed: int) -> dict[str, Any]:
        return seeded(transform, seed)(image=noise(50, 70), mask=mask)

    for seed in range(5):
        one, other, next_one = draw(seed), draw(seed), draw(seed + 1)
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["mask"], other["mask"])
        assert not torch.equal(one["image"], next_one["image"])


def test_brightness_and_contrast_have_the_published_strength() -> None:
    transform = A.Compose(photometric_distortion())
    image = np.full((4, 4, 3), 100, np.uint8)  # grey: saturation and hue do not change it
    values = np.array([int(seeded(transform, seed)(image=image)["image"][0, 0, 0]) for seed in range(2000)])
    assert (100 - 32) * 0.5 - 1 <= values.min() < 42
    assert 190 < values.max() <= (100 + 32) * 1.5 + 1
    assert abs((values == 100).mean() - 0.25) < 0.04  # neither of the two; standard error 0.01


def test_hue_turns_by_at_most_18_steps() -> None:
    transform = A.Compose(photometric_distortion())
    hue = 60
    image = cv2.cvtColor(np.full((4, 4, 3), (hue, 120, 120), np.uint8), cv2.COLOR_HSV2RGB)
    hues = [
        int(cv2.cvtColor(seeded(transform, seed)(image=image)["image"], cv2.COLOR_RGB2HSV)[0, 0, 0])
        for seed in range(1000)
    ]
    assert 60 - 19 <= min(hues) <= 60 - 16  # one step of rounding
    assert 60 + 16 <= max(hues) <= 60 + 19
    assert abs(np.mean(np.abs(np.array(hues) - hue) <= 1) - 0.5) < 0.12


def test_eval_transform_only_scales() -> None:
    image = noise(30, 40)
    out = eval_transform()(image=image)["image"]
    assert torch.equal(out, torch.from_numpy(image).permute(2, 0, 1).float() / 255)
    assert eval_transform((2048, 512))(image=image)["image"].shape == (3, 512, 683)
