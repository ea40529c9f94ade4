"""Pictures of the cells in which the taps of a peripheral kernel share their weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from PIL import Image, ImageDraw

from lk_backbones.drawing.canvas import BACKGROUND, draw_panels
from lk_backbones.drawing.palette import class_palette

__all__ = ["draw_kernel_grid"]

_SIDE = 640


def draw_kernel_grid(grid: Sequence[int], caption: str = "") -> Image.Image:
    """Draw the cells of a kernel, those as long as each other in one colour (as the figures of PeLK, arXiv 2403.07589).

    Args:
        grid: Widths of the cells along one axis, as `lk_backbones.layers.peripheral_grid` returns them.
        caption: A line at the bottom.

    Returns:
        The kernel under a title, with a legend: the longer side of the cells of each colour.
    """
    size, cells = sum(grid), len(grid)
    side = size * max(round(_SIDE / size), 1) if size < _SIDE else _SIDE
    edges = [round(edge * side / size) for edge in accumulate(grid, initial=0)]
    colors = dict(zip(sorted(set(grid)), class_palette(len(set(grid))), strict=True))
    picture = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for height, (top, bottom) in zip(grid, pairwise(edges), strict=True):
        for width, (left, right) in zip(grid, pairwise(edges), strict=True):
            if right > left and bottom > top:
                corners = (left, top, right - 1, bottom - 1)
                draw.rectangle(corners, fill=colors[max(height, width)])
                if right - left > 2 and bottom - top > 2:  # a line on the left and on top parts it from its neighbours
                    draw.line((left, bottom - 1, left, top, right - 1, top), fill=BACKGROUND)
    legend = [("1 tap" if length == 1 else f"{length} long", color) for length, color in colors.items()]
    return draw_panels([(f"{size} by {size} taps, {cells} by {cells} weights", picture)], legend, caption)
