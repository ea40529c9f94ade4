"""Augmentation pipelines for semantic segmentation, as albumentations transforms.

The training pipeline is the one of mmsegmentation, with which the published numbers of RepLKNet and its successors
were made: resize by a random ratio, crop with at most 75 % of one class, flip, distort colours, pad. It differs in one
point: see `photometric_distortion`.

Pictures enter as uint8 RGB ``(H, W, 3)`` and leave as float32 tensors ``(3, H, W)`` in [0, 1], not normalised: the task
normalises. Masks are uint8 class indices ``(H, W)``, 255 where there is none.
"""

from typing import Any

import albumentations as A
import cv2
import numpy as np
from albumentations.core.transforms_interface import DualTransform, ImageOnlyTransform
from albumentations.core.type_definitions import Targets
from albumentations.pytorch import ToTensorV2
from timm.data.constants import IMAGENET_DEFAULT_MEAN

from lk_backbones.data.classes import IGNORE_INDEX


class ResizeByRatio(DualTransform):
    """Resize by a random ratio, keeping the shape: mmsegmentation's ``Resize(ratio_range=..., keep_ratio=True)``.

    Args:
        ratio_range: Smallest and largest ratio, drawn uniformly.
        base_size: ``(long side, short side)`` in pixels at ratio 1: the picture is scaled to the largest size whose
            long and short sides stay within. None: the picture's own size.
        p: Probability.
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES)

    def __init__(
        self, ratio_range: tuple[float, float] = (0.5, 2.0), base_size: tuple[int, int] | None = None, p: float = 1.0
    ):
        super().__init__(p=p)
        self.ratio_range = ratio_range
        self.base_size = base_size

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the ratio and return the new ``size``, ``(height, width)``."""
        height, width = params["shape"][:2]
        scale = self.py_random.uniform(*self.ratio_range)
        if self.base_size is not None:
            scale *= ratio_to_fit((height, width), self.base_size)
        return {"size": scaled_size((height, width), scale)}

    def apply(self, img: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Resize the picture, bilinear."""
        return _resize(img, size, cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Resize the mask, nearest neighbour."""
        return _resize(mask, size, cv2.INTER_NEAREST)

    def apply_to_bboxes(self, bboxes: np.ndarray, **params: Any) -> np.ndarray:
        """Leave the boxes as they are: albumentations measures them in widths and heights of the picture."""
        return bboxes


def ratio_to_fit(shape: tuple[int, int], size: tuple[int, int]) -> float:
    """Return the largest ratio at which a picture's long and short side stay within those of ``size``."""
    return min(max(size) / max(shape), min(size) / min(shape))


def scaled_size(shape: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return height and width of a picture at a scale, rounded, at least 1."""
    return max(1, int(shape[0] * scale + 0.5)), max(1, int(shape[1] * scale + 0.5))


def _resize(array: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    if array.shape[:2] == size:
        return array
    return cv2.resize(array, (size[1], size[0]), interpolation=interpolation)


class ResizeForTest(ImageOnlyTransform):
    """Resize a picture to a scale of its test size, keeping the shape: mmsegmentation's ``MultiScaleFlipAug``.

    Args:
        test_size: ``(long side, short side)`` in pixels at scale 1. None: the picture's own size.
        scale: The scale.
    """

    def __init__(self, test_size: tuple[int, int] | None = None, scale: float = 1.0):
        super().__init__(p=1.0)
        self.test_size = test_size
        self.scale = scale

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        """Resize the picture, bilinear."""
        return _resize(img, size_for_test((img.shape[0], img.shape[1]), self.test_size, self.scale), cv2.INTER_LINEAR)


def size_for_test(shape: tuple[int, int], test_size: tuple[int, int] | None, scale: float) -> tuple[int, int]:
    """Return height and width of a picture at a scale of its test size, rounded as mmsegmentation does.

    The sides of ``test_size`` times the scale are cut to whole pixels, and the picture is made as large as fits in.
    """
    long, short = test_size or shape
    return scaled_size(shape, ratio_to_fit(shape, (max(int(long * scale), 1), max(int(short * scale), 1))))


class Crop(DualTransform):
    """Base of the random crops: cuts a ``box`` of pixels, ``(top, bottom, left, right)``, out of everything."""

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES)

    def draw(self, shape: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
        """Return a random box; a side of the picture that is shorter than the crop is kept whole."""
        top = self.py_random.randint(0, max(shape[0] - height, 0))
        left = self.py_random.randint(0, max(shape[1] - width, 0))
        return top, min(top + height, shape[0]), left, min(left + width, shape[1])

    def apply(self, img: np.ndarray, box: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Cut the box out of the picture."""
        return img[box[0] : box[1], box[2] : box[3]]

    def apply_to_mask(self, mask: np.ndarray, box: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Cut the box out of the mask."""
        return mask[box[0] : box[1], box[2] : box[3]]

    def apply_to_bboxes(self, bboxes: np.ndarray, box: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Move the boxes; albumentations clips and drops those that stick out."""
        top, bottom, left, right = box
        height, width = params["shape"][:2]
        moved = bboxes.copy()
        moved[:, [0, 2]] = (bboxes[:, [0, 2]] * width - left) / (right - left)
        moved[:, [1, 3]] = (bboxes[:, [1, 3]] * height - top) / (bottom - top)
        return moved


class RandomCropMaxRatio(Crop):
    """Crop at random so that no class covers too much: mmsegmentation's ``RandomCrop(cat_max_ratio=...)``.

    A crop is drawn again, up to ten times, when one class covers ``cat_max_ratio`` of its labelled pixels or more, or
    when it holds fewer than two classes; the last draw is taken in any case. Ignored pixels are not counted. A side of
    the picture that is shorter than the crop is kept whole.

    Args:
        height: Height of the crop in pixels.
        width: Width of the crop in pixels.
        cat_max_ratio: Share in (0, 1]; 1 takes the first draw.
        ignore_index: Mask value of pixels that are not counted.
        p: Probability.
    """

    tries = 10

    def __init__(
        self,
        height: int,
        width: int,
        cat_max_ratio: float = 0.75,
        ignore_index: int = IGNORE_INDEX,
        p: float = 1.0,
    ):
        super().__init__(p=p)
        self.height = height
        self.width = width
        self.cat_max_ratio = cat_max_ratio
        self.ignore_index = ignore_index

    @property
    def targets_as_params(self) -> list[str]:
        """The mask decides which crops are taken."""
        return ["mask"]

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the crop and return its ``box``, ``(top, bottom, left, right)``."""
        mask = data["mask"]
        box = self.draw(mask.shape[:2], self.height, self.width)
        if self.cat_max_ratio < 1:
            for _ in range(self.tries):
                if self._is_varied(mask[box[0] : box[1], box[2] : box[3]]):
                    break
                box = self.draw(mask.shape[:2], self.height, self.width)
        return {"box": box}

    def _is_varied(self, mask: np.ndarray) -> bool:
        counts = np.bincount(mask.ravel(), minlength=self.ignore_index + 1)
        counts[self.ignore_index] = 0
        return bool(np.count_nonzero(counts) > 1 and counts.max() < self.cat_max_ratio * counts.sum())


class PadToCrop(A.PadIfNeeded):
    """Pad what is smaller than the crop; what is as large is not copied, as albumentations would."""

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        """Pad the picture."""
        return super().apply(img, **params) if _is_padded(params) else img

    def apply_to_mask(self, mask: np.ndarray, **params: Any) -> np.ndarray:
        """Pad the mask."""
        return super().apply_to_mask(mask, **params) if _is_padded(params) else mask


def _is_padded(params: dict[str, Any]) -> bool:
    return any(params[f"pad_{side}"] for side in ("top", "bottom", "left", "right"))


def photometric_distortion() -> list[A.BasicTransform]:
    """Return mmsegmentation's ``PhotoMetricDistortion`` with its default strengths, composed from albumentations.

    Each with probability 1/2: brightness (add up to ±32 of 255), contrast (multiply by 0.5 to 1.5), saturation
    (multiply by 0.5 to 1.5), hue (turn by up to ±18 of 180 steps); contrast comes before saturation and hue or after
    them, with equal chance. The one difference: saturation is changed by mixing with the grey picture, which leaves the
    brightness of a pixel alone, and not by multiplying the S of HSV.
    """
    limit = 32 / 255

    def contrast() -> A.BasicTransform:
        return A.RandomBrightnessContrast(brightness_limit=(0, 0), contrast_limit=(-0.5, 0.5), p=0.5)

    def colour() -> list[A.BasicTransform]:
        return [
            A.ColorJitter(brightness=(1, 1), contrast=(1, 1), saturation=(0.5, 1.5), hue=(0, 0), p=0.5),
            A.HueSaturationValue(hue_shift_limit=18, sat_shift_limit=0, val_shift_limit=0, p=0.5),
        ]

    return [
        A.RandomBrightnessContrast(brightness_limit=(-limit, limit), contrast_limit=(0, 0), p=0.5),
        A.OneOf([A.Sequential([contrast(), *colour()], p=1), A.Sequential([*colour(), contrast()], p=1)], p=1),
    ]


def train_transform(
    crop_size: tuple[int, int],
    scale_range: tuple[float, float] = (0.5, 2.0),
    base_size: tuple[int, int] | None = None,
    cat_max_ratio: float = 0.75,
    image_fill: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
    ignore_index: int = IGNORE_INDEX,
) -> A.Compose:
    """Build the published training pipeline.

    Args:
        crop_size: ``(height, width)`` of the result.
        scale_range: Smallest and largest random ratio.
        base_size: ``(long side, short side)`` that a picture is fitted into at ratio 1; None: its own size.
        cat_max_ratio: Largest share of one class in a crop.
        image_fill: Colour of the padding right of and below pictures smaller than the crop, RGB in [0, 1]. The mean
            colour of ImageNet is 0 after the usual normalisation.
        ignore_index: Mask value of the padding and of pixels without a class.

    Returns:
        A transform that takes ``image`` and ``mask``.
    """
    return A.Compose(
        [
            ResizeByRatio(scale_range, base_size),
            RandomCropMaxRatio(*crop_size, cat_max_ratio=cat_max_ratio, ignore_index=ignore_index),
            A.HorizontalFlip(p=0.5),
            *photometric_distortion(),
            A.ToFloat(max_value=255),
            # After the step to float32: the fill colour would be rounded otherwise.
            PadToCrop(*crop_size, position="top_left", fill=image_fill, fill_mask=ignore_index),
            ToTensorV2(),
        ]
    )


def eval_transform(test_size: tuple[int, int] | None = None, scale: float | None = None) -> A.Compose:
    """Build the pipeline for validation, test and prediction; it takes ``image`` only, as masks are never resized.

    Args:
        test_size: ``(long side, short side)`` that pictures are scaled to fit into, keeping their shape, e.g.
            (2048, 512) for ADE20K. None: no resizing.
        scale: Makes a copy for test-time augmentation: of this scale of the test size, and a uint8 tensor
            ``(3, H, W)``, as a dozen copies in float32 would fill the memory that loading processes share. None: no
            such copy.
    """
    if scale is not None:
        return A.Compose([ResizeForTest(test_size, scale), ToTensorV2()])
    return A.Compose([ResizeForTest(test_size), A.ToFloat(max_value=255), ToTensorV2()])
