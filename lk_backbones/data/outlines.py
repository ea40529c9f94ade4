"""Masks of objects as numbers, polygons or run lengths, which become pixels once: at the size that is wanted.

Drawing is pycocotools', so that masks are those that COCO's tools see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    from pycocotools import mask as mask_api
except ImportError:  # an optional dependency
    mask_api = None


def require_mask_api() -> Any:
    """Return pycocotools' mask functions.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    if mask_api is None:
        raise ModuleNotFoundError('Masks in COCO format need pycocotools: pip install "lk-backbones[detection]"')
    return mask_api


#: Where a picture lies after it was resized, cropped and mirrored: ``(scale x, shift x, scale y, shift y)``, float64,
#: for coordinates in pixels that count from the outer edge of the first pixel.
Frame = np.ndarray


def whole_frame() -> Frame:
    """Return the frame of a picture as it is."""
    return np.array([1.0, 0.0, 1.0, 0.0])


@dataclass
class Polygons:
    """An object that is inside of any of some polygons: float64 arrays of x1, y1, x2, y2, … in pixels."""

    corners: Sequence[np.ndarray]

    def draw(self, mask: np.ndarray, frame: Frame, size: tuple[int, int]) -> None:
        """Set the object's pixels in a mask of zeros, uint8 ``(height, width)``."""
        api = require_mask_api()
        height, width = mask.shape
        if not self.corners or not mask.size:
            return
        corners = [(polygon.reshape(-1, 2) * frame[::2] + frame[1::2]).ravel() for polygon in self.corners]
        # pycocotools counts its steps along the outline in 32 bits, also far outside of the mask
        if any(outline_length(polygon) > MAX_OUTLINE for polygon in corners):
            raise ValueError(f"an outline is more than {MAX_OUTLINE} pixels long at a size of {width}×{height}")
        drawn = api.decode(api.merge(api.frPyObjects(corners, height, width)))
        xs, ys = (np.concatenate([polygon[axis::2] for polygon in corners]) for axis in (0, 1))
        # it comes column by column; what lies around the object need not be turned
        left, right = (int(np.clip(x, 0, width)) for x in (xs.min() - 1, xs.max() + 2))
        top, bottom = (int(np.clip(y, 0, height)) for y in (ys.min() - 1, ys.max() + 2))
        mask[top:bottom, left:right] = drawn[top:bottom, left:right]


@dataclass
class RunLengths:
    """An object as COCO's run lengths: how many pixels outside, inside, outside, … there are, column by column."""

    counts: np.ndarray

    def draw(self, mask: np.ndarray, frame: Frame, size: tuple[int, int]) -> None:
        """Set the object's pixels, of a picture of ``size``, in a mask of zeros, uint8 ``(height, width)``."""
        pixels = np.repeat(np.arange(len(self.counts), dtype=np.uint8) & 1, self.counts).reshape(size[::-1]).T
        columns = _nearest(mask.shape[1], frame[0], frame[1], size[1])
        rows = _nearest(mask.shape[0], frame[2], frame[3], size[0])
        mask[:] = pixels[np.ix_(rows, columns)]


def _nearest(length: int, scale: float, shift: float, original: int) -> np.ndarray:
    """Where the middle of every pixel lies in the original picture."""
    places = np.floor((np.arange(length) + 0.5 - shift) / scale)
    return places.clip(0, original - 1).astype(np.int64)


#: Most pixels that an outline is long; drawing takes some 40 bytes for each.
MAX_OUTLINE = 4_000_000


def outline_length(polygon: np.ndarray) -> float:
    """Return the length of an outline as drawing it counts: the larger of both distances, and one, at every corner."""
    steps = np.abs(polygon - np.roll(polygon, 2))
    return float(np.maximum(steps[::2], steps[1::2]).sum() + len(polygon) // 2)


@dataclass
class Outlines:
    """The masks of a picture's objects before they are drawn.

    Attributes:
        size: Height and width of the picture that they refer to.
        shapes: One per object.
        where: What they are called in messages, one per object.
    """

    size: tuple[int, int]
    shapes: Sequence[Polygons | RunLengths]
    where: Sequence[str]

    def __len__(self) -> int:
        return len(self.shapes)

    def draw(
        self, places: Sequence[int] | None = None, frame: Frame | None = None, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Draw masks.

        Args:
            places: Which objects; None: all.
            frame: Where the picture lies in the masks; None: as it is.
            size: Height and width of the masks; None: those of the picture.

        Returns:
            uint8 ``(N, height, width)`` of 0 and 1.

        Raises:
            ValueError: If one cannot be drawn; the message names it.
        """
        places = range(len(self)) if places is None else places
        masks = np.zeros((len(places), *(size or self.size)), np.uint8)
        for mask, place in zip(masks, places, strict=True):
            try:
                self.shapes[place].draw(mask, whole_frame() if frame is None else frame, self.size)
            except Exception as error:
                raise ValueError(f"{self.where[place]}: its segmentation cannot be decoded: {error}.") from error
        return masks
