"""Named points over two axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lk_backbones.drawing.canvas import BACKGROUND, FAINT, FONT_SIZE, INK, LINE, MARGIN
from lk_backbones.drawing.heat_maps import shorten_to_width
from lk_backbones.drawing.palette import class_palette

__all__ = ["draw_scatter"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _SMALL = 640, 400, 56, 44, 13


def draw_scatter(
    points: Sequence[tuple[str, float, float]], x_title: str, y_title: str, title: str = "", caption: str = ""
) -> Image.Image:
    """Draw points with their names beside them, on axes with round numbers.

    Args:
        points: Name, x and y of each; at least one.
        x_title: Of the horizontal axis.
        y_title: Of the vertical axis.
        title: Above.
        caption: A line at the bottom.

    Returns:
        The figure.
    """
    font, small = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(_SMALL)
    top, left = MARGIN + 2 * LINE, MARGIN + _LEFT
    figure = Image.new("RGB", (left + _WIDTH + 2 * MARGIN, top + _HEIGHT + _BOTTOM + LINE + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(figure)
    inside = _WIDTH + _LEFT
    draw.text((MARGIN, MARGIN), shorten_to_width(title, inside, FONT_SIZE), fill=INK, font=font)
    draw.text((MARGIN, MARGIN + LINE), shorten_to_width(y_title, inside, _SMALL), fill=INK, font=small)
    x_ticks, y_ticks = _ticks([point[1] for point in points]), _ticks([point[2] for point in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * _WIDTH, top + (1 - up) * _HEIGHT

    for tick in x_ticks:
        x, y = place(tick, y_ticks[0])
        draw.line((x, top, x, y), fill=FAINT)
        draw.text((x, y + 4), f"{tick:g}", fill=INK, font=small, anchor="ma")
    for tick in y_ticks:
        x, y = place(x_ticks[0], tick)
        draw.line((x, y, left + _WIDTH, y), fill=FAINT)
        draw.text((x - 6, y), f"{tick:g}", fill=INK, font=small, anchor="rm")
    draw.text((left + _WIDTH / 2, top + _HEIGHT + 22), x_title, fill=INK, font=small, anchor="ma")
    caption = shorten_to_width(caption, inside, _SMALL)
    draw.text((MARGIN, top + _HEIGHT + _BOTTOM), caption, fill=INK, font=small)
    names: list[tuple[float, float, float, float]] = []
    for (name, x, y), color in zip(points, class_palette(len(points)), strict=True):
        across, down = place(x, y)
        draw.ellipse((across - 5, down - 5, across + 5, down + 5), fill=color, outline=INK)
        draw.text(_free_place(draw, name, across, down, left + _WIDTH, names), name, fill=INK, font=small)
    return figure


def _free_place(
    draw: ImageDraw.ImageDraw,
    name: str,
    x: float,
    y: float,
    right: float,
    names: list[tuple[float, float, float, float]],
) -> tuple[float, float]:
    """Choose where a name stands beside its point, where it covers no other one if that can be had."""
    font = ImageFont.load_default(_SMALL)
    length = font.getlength(name)
    sides = [x + 9, x - 9 - length] if x + 9 + length < right else [x - 9 - length, x + 9]
    tries = [(side, y + shift) for shift in (-8, -22, 6, -36, 20) for side in sides]
    boxes = [(across, down, across + length, down + 15) for across, down in tries]
    free = [i for i, box in enumerate(boxes) if not any(_overlap(box, other) for other in names)]
    chosen = free[0] if free else 0
    names.append(boxes[chosen])
    return tries[chosen]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ticks(values: Sequence[float]) -> list[float]:
    """Return round numbers at equal distances, of which the outer ones enclose all values."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    rough = span / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        first, last = first - 1, last + 1
    return [round(i * step, 10) for i in range(first, last + 1)]
