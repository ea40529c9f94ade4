"""Augmentation and evaluation pipelines for classification: timm's, with which the published numbers were made.

Pictures enter as PIL pictures and leave as uint8 tensors ``(3, H, W)``, not normalised: the batch has them in [0, 1],
and the task normalises. Random erasing, mixup and CutMix work on normalised batches and are the task's too.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp

from lk_backbones.weights.errors import shorten

__all__ = ["Augmentation", "DraftedRandomResizedCrop", "PictureSettings", "eval_transform", "train_transform"]

CropMode = Literal["center", "squash", "border"]
Transform = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class PictureSettings:
    """How a model is used to see pictures; a task tells, from its weights (`timm.data.resolve_model_data_config`).

    Attributes:
        input_size: Height and width in evaluation.
        train_size: Height and width in training.
        crop_pct: The crop's share of the sides of the resized picture, in evaluation.
        crop_mode: ``"center"``: the short side is resized, the middle cropped; ``"squash"``: both sides are resized,
            whatever the picture's shape; ``"border"``: the long side is resized, the rest filled with the mean.
        interpolation: Of the resizing in evaluation.
        mean: Mean colour in [0, 1], with which is filled up.
    """

    input_size: tuple[int, int] = (224, 224)
    train_size: tuple[int, int] = (224, 224)
    crop_pct: float = 0.875
    crop_mode: CropMode = "center"
    interpolation: str = "bicubic"
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN


@dataclass(frozen=True)
class Augmentation:
    """What training pictures go through, in timm's terms.

    Attributes:
        scale: Smallest and largest share of a picture's area that is cropped.
        ratio: Smallest and largest width / height of a crop.
        hflip: Probability of a flip left-right.
        vflip: Probability of a flip upside down.
        color_jitter: Strength of changes of brightness, contrast and saturation; left out under ``auto_augment``.
        auto_augment: timm's description of RandAugment, AutoAugment or AugMix, such as ``"rand-m9-mstd0.5-inc1"``.
        interpolation: Of the resizing, ``"random"`` for bilinear or bicubic.

    Raises:
        ValueError: If a value is impossible; the message names it.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = None
    interpolation: str = "random"

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (smallest, largest) with 0 < smallest <= largest, got {(low, high)}.")
        if self.scale[1] > 1:
            raise ValueError(f"scale must be shares of the picture's area up to 1, got {tuple(self.scale)}.")
        for name in ("hflip", "vflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability in [0, 1], got {getattr(self, name)}.")
        if self.color_jitter < 0:
            raise ValueError(f"color_jitter must be at least 0, got {self.color_jitter}.")
        train_transform(PictureSettings(), self)  # what timm makes of the rest


class DraftedRandomResizedCrop:
    """timm's random resized crop, for which a JPEG picture is decoded at the smallest size that the crop needs.

    A JPEG file can be decoded at 1/2, 1/4 or 1/8 of its size, much faster than whole. The smallest of these is taken
    at which the crop still has at least as many pixels as the result, so that nothing is enlarged that was not before.
    The crop is drawn as timm draws it; where the whole picture is decoded the result is timm's, bit for bit.

    Args:
        crop: timm's.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop

    def __call__(self, image: Image.Image) -> Image.Image:
        """Crop and resize a picture."""
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        choices = self.crop.interpolation
        interpolation = random.choice(choices) if isinstance(choices, tuple | list) else choices
        resample = str_to_pil_interp(interpolation.value)
        target_height, target_width = self.crop.size
        full = image.size
        if min(height / target_height, width / target_width) >= 2 and image.format == "JPEG":
            # Pillow takes the smallest picture that is at least as large as this
            image.draft(None, (math.ceil(full[0] * target_width / width), math.ceil(full[1] * target_height / height)))
        if image.size == full:
            part = image.crop((left, top, left + width, top + height))
            part = part if part.mode == "RGB" else part.convert("RGB")
            return part.resize((target_width, target_height), resample)
        x, y = image.size[0] / full[0], image.size[1] / full[1]
        box = left * x, top * y, min((left + width) * x, image.size[0]), min((top + height) * y, image.size[1])
        resized = image.resize((target_width, target_height), resample, box=box)
        return resized if resized.mode == "RGB" else resized.convert("RGB")


def train_transform(settings: PictureSettings, augmentation: Augmentation) -> Transform:
    """Build timm's training pipeline, without what works on normalised batches.

    Args:
        settings: The size.
        augmentation: What is done.

    Returns:
        Maps a PIL picture to a uint8 tensor ``(3, H, W)``. It draws from the global generators of Python, NumPy and
        torch.

    Raises:
        ValueError: If timm does not understand ``auto_augment`` or ``interpolation``.
    """
    try:
        pipeline: Any = create_transform(
            settings.train_size,
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            vflip=augmentation.vflip,
            color_jitter=augmentation.color_jitter,
            auto_augment=augmentation.auto_augment,
            interpolation=augmentation.interpolation,
            mean=tuple(settings.mean),
            normalize=False,
        )
    except Exception as error:  # assertions, and look-ups that fail
        raise ValueError(
            f"timm makes no augmentation of auto_augment={shorten(augmentation.auto_augment)} and "
            f"interpolation={shorten(augmentation.interpolation)} ({type(error).__name__}: {shorten(str(error))}). "
            'Usual are auto_augment="rand-m9-mstd0.5-inc1" and interpolation="random".'
        ) from error
    pipeline.transforms[0] = DraftedRandomResizedCrop(pipeline.transforms[0])
    for operation in _operations(pipeline):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    transform: Transform = pipeline
    return transform


def _operations(pipeline: Any) -> Iterator[Any]:
    """Yield timm's operations of RandAugment, AutoAugment or AugMix."""
    for transform in pipeline.transforms:
        yield from getattr(transform, "ops", [])
        for policy in getattr(transform, "policy", []):
            yield from policy


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    """Keep the upper bits of every channel, as timm's operation; also none of them, which Pillow 13 refuses.

    Args:
        image: The picture.
        bits_to_keep: How many, 0 to 8. The strongest RandAugment keeps none: the picture becomes black.
        **kwargs: As timm passes them on.
    """
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    posterized: Image.Image = auto_augment.posterize(image, bits_to_keep, **kwargs)
    return posterized


def eval_transform(settings: PictureSettings) -> Transform:
    """Build the pipeline of timm's evaluation.

    Args:
        settings: How the model is used to see pictures.

    Returns:
        Maps a PIL picture to a uint8 tensor ``(3, H, W)``.
    """
    transform: Transform = create_transform(
        settings.input_size,
        is_training=False,
        interpolation=settings.interpolation,
        crop_pct=settings.crop_pct,
        crop_mode=settings.crop_mode,
        mean=tuple(settings.mean),
        normalize=False,
    )
    return transform


class OfArrays:
    """A pipeline of this file in the place of one of albumentations: arrays in, float32 tensors in [0, 1] out.

    Args:
        transform: The pipeline.
    """

    def __init__(self, transform: Transform):
        self.transform = transform

    def __call__(self, image: np.ndarray) -> dict[str, Any]:
        """Transform a picture, uint8 RGB ``(H, W, 3)``."""
        return {"image": to_unit(self.transform(Image.fromarray(image)))}


def to_unit(image: torch.Tensor) -> torch.Tensor:
    """Turn 8-bit values into float32 in [0, 1]."""
    return image.to(torch.float32).div_(255)
