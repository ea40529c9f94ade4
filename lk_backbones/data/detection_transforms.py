"""Augmentation pipelines for detection, as albumentations transforms that keep pictures, boxes and masks together.

The training pipeline is the one that the detectors on RepLKNet, SLaK and UniRepLKNet were trained with, DETR's (Carion
et al., 2020, arXiv 2005.12872, section 4.1): the short side is resized to one of 480 to 800 pixels, the long side stays
within 1333; every other picture is cropped before.

Pictures enter as uint8 RGB ``(H, W, 3)`` and leave as float32 tensors ``(3, H, W)`` in [0, 1], not normalised: the
detector normalises. Boxes are ``(N, 4)`` corners in pixels, masks uint8 ``(N, H, W)``. Instead of masks the transforms
take a ``frame`` (see `lk_backbones.data.outlines`), by which masks can be drawn once, afterwards.
"""

from collections.abc import Sequence
from typing import Any

import albumentations as A
import numpy as np
from albumentations.pytorch import ToTensorV2

from lk_backbones.data.outlines import Frame
from lk_backbones.data.transforms import Crop, ResizeByRatio, photometric_distortion, ratio_to_fit, scaled_size

#: The short sides of the published multi-scale training.
MULTI_SCALE = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)

#: Short sides that are resized to before a crop, as published.
SIZES_BEFORE_CROP = (400, 500, 600)


class _Framed(A.DualTransform):
    """Mixin of transforms that keep a ``frame``."""

    @property
    def targets(self) -> dict[str, Any]:
        """What albumentations gives to which method."""
        return {**super().targets, "frame": self.apply_to_frame}

    def apply_to_frame(self, frame: Frame, **params: Any) -> Frame:
        """Return the frame after the transform; ``params`` has the ``shape`` before it."""
        raise NotImplementedError


class Mirror(_Framed, A.HorizontalFlip):
    """albumentations' ``HorizontalFlip``."""

    def apply_to_frame(self, frame: Frame, **params: Any) -> Frame:
        """Mirror the frame."""
        return frame * [-1, -1, 1, 1] + [0, params["shape"][1], 0, 0]


# Not torchvision's RandomShortestSize: it cuts sides to whole pixels where the published training rounds them, so that
# half of all pictures of COCO's sizes come out a pixel smaller, it knows no frame, and it draws from torch's global
# generator, which a resumed run could not repeat.
class ResizeShortSide(_Framed, ResizeByRatio):
    """Resize the short side to one of some lengths, drawn at random, while the long side stays within a limit.

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
        """Draw the short side and return the new ``size``, ``(height, width)``."""
        shape = params["shape"][:2]
        # min() as well as max(): a limit below the short side is one for both sides
        short = self.py_random.choice(self.sizes)
        return {"size": scaled_size(shape, ratio_to_fit(shape, (self.max_size, min(short, self.max_size))))}

    def apply_to_frame(self, frame: Frame, size: tuple[int, int], **params: Any) -> Frame:  # type: ignore[override]
        """Scales the frame."""
        height, width = params["shape"][:2]
        return frame * np.repeat([size[1] / width, size[0] / height], 2)


class RandomSizeCrop(_Framed, Crop):
    """Crop a part whose height and width are each drawn at random: mmdetection's ``absolute_range``.

    Args:
        size_range: Smallest and largest side of the crop in pixels. A picture's shorter side is kept whole.
        p: Probability.
    """

    def __init__(self, size_range: tuple[int, int] = (384, 600), p: float = 1.0):
        super().__init__(p=p)
        self.size_range = size_range

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the crop and return its ``box``, ``(top, bottom, left, right)``."""
        shape = params["shape"][:2]
        smallest, largest = self.size_range
        height, width = (self.py_random.randint(min(side, smallest), min(side, largest)) for side in shape)
        return {"box": self.draw(shape, height, width)}

    def apply_to_frame(  # type: ignore[override]
        self, frame: Frame, box: tuple[int, int, int, int], **params: Any
    ) -> Frame:
        """Move the frame."""
        return frame - [0, box[2], 0, box[0]]


def detection_train_transform(
    sizes: Sequence[int] = MULTI_SCALE,
    max_size: int = 1333,
    crop_probability: float = 0.5,
    crop_range: tuple[int, int] = (384, 600),
    flip_probability: float = 0.5,
    color_jitter: bool = False,
) -> A.Compose:
    """Build the published training pipeline.

    Args:
        sizes: Lengths of the short side, one of which is drawn.
        max_size: Largest length of the long side.
        crop_probability: Share of pictures that are resized to a short side of 400, 500 or 600 and cropped before.
        crop_range: Smallest and largest side of that crop.
        flip_probability: Share of pictures that are mirrored, left to right.
        color_jitter: Whether to distort colours, which the published detectors do not; see
            `photometric_distortion`.

    Returns:
        A transform that takes ``image``, ``bboxes``, ``places`` (a number per box, by which one knows afterwards which
        are left) and, if wanted, ``masks`` or a ``frame``.
    """
    crop = A.Sequential([ResizeShortSide(SIZES_BEFORE_CROP, max_size), RandomSizeCrop(crop_range)], p=crop_probability)
    return box_pipeline(
        [
            Mirror(p=flip_probability),
            *([crop] if crop_probability > 0 else []),
            ResizeShortSide(sizes, max_size),
            *(photometric_distortion() if color_jitter else []),
        ]
    )


def keeps_frame(pipeline: A.BaseCompose) -> bool:
    """Say whether no transform of a pipeline moves pixels without telling where to."""
    return all(
        keeps_frame(step) if isinstance(step, A.BaseCompose) else _keeps_frame(step) for step in pipeline.transforms
    )


def _keeps_frame(step: Any) -> bool:
    return isinstance(step, A.ImageOnlyTransform | A.NoOp | ToTensorV2 | _Framed)


def box_pipeline(steps: list[A.BasicTransform]) -> A.Compose:
    """Complete a pipeline that takes boxes: boxes of less than a pixel are dropped, the picture becomes a tensor."""
    return A.Compose(
        [*steps, A.ToFloat(max_value=255), ToTensorV2()],
        bbox_params=A.BboxParams(format="pascal_voc", label_fields=["places"], min_width=1, min_height=1, clip=True),
    )
