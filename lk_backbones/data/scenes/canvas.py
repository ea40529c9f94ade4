"""What street scenes are drawn on and with: a canvas that keeps labels beside the picture, and colours."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

# Scenes are drawn at this multiple of their size and then reduced, which smooths the edges.
OVERSAMPLING = 2
# Coordinates are handed to OpenCV with this many binary digits after the point.
_FRACTION_BITS = 4

Point = tuple[float, float]
Rgb = tuple[int, int, int]


class Canvas:
    """A picture, and beside it a map of class index + 256 × instance; everything is drawn on both at once."""

    def __init__(self, height: int, width: int):
        self.height = height * OVERSAMPLING
        self.width = width * OVERSAMPLING
        self.image = np.zeros((self.height, self.width, 3), np.uint8)
        self.codes = np.zeros((self.height, self.width), np.uint16)
        self.objects: list[int] = []
        self.light = np.ones(3)

    def add_object(self, class_index: int) -> int:
        """Register a countable object and return the code to draw it with."""
        self.objects.append(class_index)
        return class_index + 256 * len(self.objects)

    def color(self, color: Sequence[float] | np.ndarray, brightness: float = 1.0) -> tuple[float, float, float]:
        """Return a colour in the light of the scene."""
        red, green, blue = np.clip(np.asarray(color) * self.light * brightness, 0, 255)
        return float(red), float(green), float(blue)

    def polygon(self, points: Sequence[Point], color: Sequence[float], code: int | None = None) -> None:
        """Fill a polygon; without a code only the picture changes, not the labels (windows, lane markings)."""
        corners = (np.asarray(points) * (self.height << _FRACTION_BITS)).round().astype(np.int32)[None]
        cv2.fillPoly(self.image, corners, color, cv2.LINE_8, _FRACTION_BITS)
        if code is not None:
            cv2.fillPoly(self.codes, corners, code, cv2.LINE_8, _FRACTION_BITS)

    def box(
        self, left: float, top: float, right: float, bottom: float, color: Sequence[float], code: int | None = None
    ) -> None:
        """Fill an upright rectangle."""
        rows = slice(max(0, round(top * self.height)), max(0, round(bottom * self.height)))
        columns = slice(max(0, round(left * self.height)), max(0, round(right * self.height)))
        self.image[rows, columns] = color
        if code is not None:
            self.codes[rows, columns] = code

    def ellipse(
        self, center: Point, radii: Point, color: Sequence[float], code: int | None = None, upper_half: bool = False
    ) -> None:
        """Fill an ellipse, or its upper half."""
        scale = self.height << _FRACTION_BITS
        middle = (round(center[0] * scale), round(center[1] * scale))
        axes = (max(0, round(radii[0] * scale)), max(0, round(radii[1] * scale)))
        start = 180 if upper_half else 0
        cv2.ellipse(self.image, middle, axes, 0, start, 360, color, -1, cv2.LINE_8, _FRACTION_BITS)
        if code is not None:
            cv2.ellipse(self.codes, middle, axes, 0, start, 360, code, -1, cv2.LINE_8, _FRACTION_BITS)


class Palette(NamedTuple):
    """Colours of one time of day."""

    zenith: Rgb
    horizon: Rgb
    cloud: Rgb
    light: tuple[float, float, float]  # multiplies the colour of everything below the sky
    window: Rgb


PALETTES = (
    Palette((86, 148, 214), (196, 222, 240), (248, 250, 252), (1.00, 1.00, 1.00), (96, 122, 148)),  # noon
    Palette((122, 168, 216), (250, 226, 190), (255, 244, 226), (1.05, 0.98, 0.88), (120, 116, 112)),  # morning
    Palette((92, 96, 158), (246, 178, 140), (250, 206, 180), (0.92, 0.80, 0.80), (250, 214, 130)),  # dusk
    Palette((164, 176, 188), (212, 218, 222), (226, 230, 234), (0.90, 0.93, 0.96), (84, 100, 116)),  # overcast
)
FACADES: tuple[Rgb, ...] = (
    (188, 128, 104), (206, 176, 140), (164, 152, 144), (150, 116, 108), (212, 196, 172), (132, 142, 158),
    (190, 150, 120),
)  # fmt: skip
BODIES: tuple[Rgb, ...] = (
    (196, 44, 44), (40, 84, 168), (236, 236, 234), (54, 58, 64), (40, 138, 92), (226, 178, 40), (168, 174, 182),
    (110, 60, 130), (70, 150, 190),
)  # fmt: skip
CLOTHES: tuple[Rgb, ...] = (
    (200, 60, 60), (50, 90, 170), (240, 200, 60), (60, 140, 90), (230, 230, 230), (90, 70, 120), (230, 120, 50),
)  # fmt: skip
SKINS: tuple[Rgb, ...] = ((240, 204, 176), (206, 156, 118), (150, 104, 74), (104, 70, 50))
GREENS: tuple[Rgb, ...] = ((74, 126, 58), (96, 142, 66), (58, 108, 62), (122, 146, 62))
RED_LIGHT: Rgb = (255, 58, 48)
GREEN_LIGHT: Rgb = (60, 255, 120)
