from __future__ import annotations

from itertools import pairwise

import numpy as np

from lk_backbones.drawing.kernel_grid import draw_kernel_grid
from lk_backbones.layers import peripheral_grid


def test_colours_follow_the_longer_side_of_a_cell() -> None:
    grid = peripheral_grid(37)
    picture = np.asarray(draw_kernel_grid(grid))
    scale, left, top = 17, 12, 34  # 629 pixels for 37 taps, below a title
    edges = np.cumsum([0, *grid])
    centers = [(a + b) * scale // 2 for a, b in pairwise(edges)]
    color = {(i, j): tuple(picture[top + y, left + x]) for i, y in enumerate(centers) for j, x in enumerate(centers)}
    of_length: dict[int, set[tuple[int, ...]]] = {}
    for (i, j), value in color.items():
        of_length.setdefault(max(grid[i], grid[j]), set()).add(value)
    assert sorted(of_length) == [1, 2, 4, 8]
    assert all(len(values) == 1 for values in of_length.values())
    assert len(set.union(*of_length.values())) == 4


def test_kernels_of_any_size_fit_a_screen() -> None:
    for size in (1, 3, 321, 639, 641, 100_001):
        width, height = draw_kernel_grid(peripheral_grid(size, 0)).size
        assert 400 < width < 1000
        assert height < 1100
