"""Pictures of a classification: what is to be seen, and sizes that do not depend on what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lk_backbones.drawing.classes import BLUE, draw_best_classes, draw_confusion, draw_sheet
from lk_backbones.drawing.palette import class_palette


def count(figure: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.array(figure) == color).all(-1).sum())


@pytest.mark.parametrize("classes", [2, 9, 40, 41, 300, 1000])
def test_a_right_matrix_is_a_blue_diagonal(classes: int) -> None:
    names = [f"class {i} with a name that is too long to be written out" for i in range(classes)]
    right = draw_confusion(3 * np.eye(classes, dtype=np.int64), names, "title")
    wrong = draw_confusion(np.roll(3 * np.eye(classes, dtype=np.int64), 1, axis=1), names, "title")
    assert right.size == wrong.size
    assert max(right.size) < 1500
    assert count(right, BLUE) >= classes
    assert not count(wrong, BLUE)


def test_classes_without_pictures_and_empty_matrices_are_drawn() -> None:
    for classes in (3, 50):
        assert not count(draw_confusion(np.zeros((classes, classes), np.int64), ["a"] * classes), BLUE)


def test_cells_have_one_size_and_bars_the_length_of_the_probability() -> None:
    colors = class_palette(2)
    cells = []
    for name, probability in (("cat", 1.0), ("猫\n with a name\x1b[31m of many letters" * 5, 0.25)):
        best = [(name, probability, colors[0]), ("dog", 0.0, colors[1])]
        cells.append(draw_best_classes(Image.new("RGB", (100, 160)), (160, 160), best, "a" * 300))
    assert cells[0].size == cells[1].size
    below_text = 160 + 4 + 2 * 17 - 3
    full, quarter = (np.array(cell)[below_text] for cell in cells)
    assert (full == full[-1]).all(-1).sum() > 150
    assert 35 < (quarter == full[-1]).all(-1).sum() <= 41
    sheet = draw_sheet(cells * 4, columns=3, title="sheet")
    assert sheet.width == 12 + 3 * (cells[0].width + 12)
    marked = draw_best_classes(Image.new("RGB", (9, 9)), (160, 160), [("cat", 1.0, colors[0])], "a", truth="dog")
    assert marked.height == cells[0].height
