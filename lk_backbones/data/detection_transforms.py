"""Augmentation pipelines for detection, as albumentations transforms that keep pictures, boxes and masks together.

The training pipeline is the one that the detectors on RepLKNet, SLaK and UniRepLKNet were trained with, DETR's (Carion
et al., 2020, arXiv 2005.12872, section 4.1): the short side is resized to one of 480 to 800 pixels, the long side stays
within 1333; every other picture is cropped before.

Pictures enter as uint8 RGB `(H, W, 3)` and leave as float32 tensors `(3, H, W)` in [0, 1], not normalised: the detector
normalises. Boxes are `(N, 4)` corners in pixels, masks uint8 `(N, H, W)`.
"""

from collections.abc import Sequence
from typing import Any

import albumentations as A
from albumentations.pytorch import ToTensorV2

from lk_backbones.data.transforms import Crop, ResizeByRatio, photometric_distortion, ratio_to_fit, scaled_size

#: The short sides of the published multi-scale training.
MULTI_SCALE = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)

#: Short sides that are resized to before a crop, as published.
SIZES_BEFORE_CROP = (400, 500, 600)


class ResizeShortSide(ResizeByRatio):
    """Resizes the short side to one of some lengths, drawn at random, while the long side stays within a limit.

    Args:
        sizes: Lengths of the short side in pixels.
        max_size: Largest length of the long side in pixels; a picture that would be longer is resized to it instead.
        p: Probability.
    """

    def __init__(self, sizes: Sequence[int] = MULTI_SCALE, max_size: int = 1333, p: float = 1.0):
        super().__init__((1.0, 1.0), None, p)
        self.sizes = tuple(sizes)
        self.max_size = max_size

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draws the short side and returns the new ``size``, ``(height, width)``."""
        shape = params["shape"][:2]
        # min() as well as max(): a limit below the short side is one for both sides
        short = self.py_random.choice(self.sizes)
        return {"size": scaled_size(shape, ratio_to_fit(shape, (self.max_size, min(short, self.max_size))))}


class RandomSizeCrop(Crop):
    """Crops a part whose height and width are each drawn at random: mmdetection's ``absolute_range``.

    Args:
        size_range: Smallest and largest side of the crop in pixels. A picture's shorter side is kept whole.
        p: Probability.
    """

    def __init__(self, size_range: tuple[int, int] = (384, 600), p: float = 1.0):
        super().__init__(p=p)
        self.size_range = size_range

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draws the crop and returns its ``box``, ``(top, bottom, left, right)``."""
        shape = params["shape"][:2]
        smallest, largest = self.size_range
        height, width = (self.py_random.randint(min(side, smallest), min(side, largest)) for side in shape)
        return {"box": self.draw(shape, height, width)}


def detection_train_transform(
    sizes: Sequence[int] = MULTI_SCALE,
    max_size: int = 1333,
    crop_probability: float = 0.5,
    crop_range: tuple[int, int] = (384, 600),
    flip_probability: float = 0.5,
    color_jitter: bool = False,
) -> A.Compose:
    """Builds the published training pipeline.

    Args:
        sizes: Lengths of the short side, one of which is drawn.
        max_size: Largest length of the long side.
        crop_probability: Share of pictures that are resized to a short side of 400, 500 or 600 and cropped before.
        crop_range: Smallest and largest side of that crop.
        flip_probability: Share of pictures that are mirrored, left to right.
        color_jitter: Whether to distort colours, which the published detectors do not; see
            :func:`~lk_backbones.data.transforms.photometric_distortion`.

    Returns:
        A transform that takes ``image``, ``bboxes``, ``places`` (a number per box, by which one knows afterwards which
        are left) and, if wanted, ``masks``.
    """
    crop = A.Sequential([ResizeShortSide(SIZES_BEFORE_CROP, max_size), RandomSizeCrop(crop_range)], p=crop_probability)
    return box_pipeline(
        [
            A.HorizontalFlip(p=flip_probability),
            *([crop] if crop_probability > 0 else []),
            ResizeShortSide(sizes, max_size),
            *(photometric_distortion() if color_jitter else []),
        ]
    )


def box_pipeline(steps: list[A.BasicTransform]) -> A.Compose:
    """Completes a pipeline that takes boxes: boxes of less than a pixel are dropped, the picture becomes a tensor."""
    return A.Compose(
        [*steps, A.ToFloat(max_value=255), ToTensorV2()],
        bbox_params=A.BboxParams(format="pascal_voc", label_fields=["places"], min_width=1, min_height=1, clip=True),
    )
