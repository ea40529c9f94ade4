"""Heat maps: one scale for all, sizes, titles that fit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from lk_backbones.drawing.heat_maps import draw_heat_maps, heat_map, ratio_lines, shorten_to_width


def test_more_is_lighter() -> None:
    colors = np.asarray(heat_map(np.linspace(0, 1, 101)[None]))[0].astype(float)
    lightness = colors @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    assert colors[0].tolist() == [0, 0, 4]
    assert colors[-1].tolist() == [252, 255, 164]
    assert np.asarray(heat_map(np.array([[0.0625]]), power=0.25)).tolist() == [[[188, 55, 84]]]  # as 0.5
    assert np.asarray(heat_map(np.array([[np.nan]]))).tolist() == [[[128, 128, 128]]]


def test_sizes_show_averages_or_every_element() -> None:
    matrix = np.zeros((4, 8))
    matrix[:, ::2] = 1
    assert np.asarray(heat_map(matrix, (4, 2))).reshape(-1, 3).tolist() == [[188, 55, 84]] * 8  # the colour of 0.5
    large = np.asarray(heat_map(matrix, (16, 8)))
    assert np.unique(large.reshape(-1, 3), axis=0).tolist() == [[0, 0, 4], [252, 255, 164]]


def test_side_by_side_on_one_scale() -> None:
    low, high = np.full((40, 60), 0.25), np.ones((60, 40))
    figure = np.asarray(draw_heat_maps([("low", low, ["a"]), ("high", high, [])], "caption", "scale", side=60))
    for matrix in (low, high):
        color = np.asarray(heat_map(matrix))[0, 0]
        rows, columns = np.nonzero((figure == color).all(-1))
        assert np.ptp(rows[columns > 0]) >= matrix.shape[0] - 1
        assert (figure == color).all(-1).sum() >= matrix.size
    five = draw_heat_maps([(str(i), low, []) for i in range(5)], columns=2, side=60)
    assert five.height > 3 * 60
    assert five.width < 3 * 180


def test_lines_of_areas() -> None:
    assert ratio_lines({0.2: 0.0123, 0.5: 0.5, 0.99: float("nan")}) == [
        "20 % in 1.2 %,  50 % in 50.0 %",
        "99 % in nan %",
    ]


@pytest.mark.parametrize("width", [20, 60, 400])
def test_titles_fit(width: int) -> None:
    text = shorten_to_width("replknet_31t,kernel_sizes=[3,3,3,3]", width, 15)
    assert ImageFont.load_default(15).getlength(text) <= width
    assert text.endswith("...") == (width < 400)
