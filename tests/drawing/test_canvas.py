"""Pictures hold the right colours in the right places, and files appear whole or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lk_backbones.drawing.canvas import (
    MARGIN,
    draw_panels,
    fit_size,
    label_map_image,
    overlay,
    save_png,
    to_rgb,
)
from lk_backbones.drawing.palette import class_palette


def test_to_rgb() -> None:
    image = torch.tensor([0.0, 0.5, 1.2]).view(3, 1, 1).expand(3, 2, 4)
    assert np.array(to_rgb(image)).tolist() == [[[0, 128, 255]] * 4] * 2
    grey = to_rgb(image[1:2])
    assert np.array(grey)[0, 0].tolist() == [128, 128, 128]
    assert to_rgb(torch.zeros(5, 2, 4)).size == (4, 2)


def test_overlay_mixes_colours_and_hatches_what_is_ignored() -> None:
    labels = torch.tensor([[0, 1], [255, 1]])
    picture = Image.new("RGB", (20, 20), (100, 100, 100))
    drawn = np.array(overlay(picture, labels, [(200, 0, 0), (0, 0, 200)], opacity=0.5)).astype(int)
    assert np.abs(drawn[:10, :10] - [150, 50, 50]).max() <= 1
    assert np.abs(drawn[:, 10:] - [50, 50, 150]).max() <= 1
    assert {tuple(pixel) for pixel in drawn[10:, :10].reshape(-1, 3)} == {(0, 0, 0), (70, 70, 70)}


@pytest.mark.parametrize(("num_classes", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_label_maps_survive_the_file(tmp_path: Path, num_classes: int, dtype: type) -> None:
    labels = torch.randint(0, num_classes, (30, 40))
    labels[0, 0] = num_classes - 1
    save_png(label_map_image(labels, num_classes), tmp_path / "new" / "labels.png")
    array = np.array(Image.open(tmp_path / "new" / "labels.png"))
    assert array.astype(int).tolist() == labels.tolist()
    assert array.dtype == dtype


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    save_png(Image.new("RGB", (5, 5), (1, 2, 3)), path)
    old = path.read_bytes()

    def fail(self, file, format):
        file.write(b"half a picture")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        save_png(Image.new("RGB", (6, 6)), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["picture.png"]


def test_panels_and_legend_have_their_places() -> None:
    red, blue = Image.new("RGB", (330, 50), (255, 0, 0)), Image.new("RGB", (330, 50), (0, 0, 255))
    figure = draw_panels([("Left", red), ("Right", blue)], [("road", (10, 20, 30)), ("ignored", None)], "name.jpg")
    pixels = np.array(figure)
    assert (pixels == [255, 0, 0]).all(-1).sum() == (pixels == [0, 0, 255]).all(-1).sum() == 330 * 50
    assert pixels[60, MARGIN + 5].tolist() == [255, 0, 0]
    assert pixels[60, 2 * MARGIN + 330 + 5].tolist() == [0, 0, 255]
    assert (pixels == [10, 20, 30]).all(-1).sum() > 100  # the swatch
    assert (pixels == [0, 0, 0]).all(-1).sum() > 50  # the hatching


def test_a_long_legend_is_cut() -> None:
    panel = [("Image", Image.new("RGB", (320, 240)))]
    legend = [(f"class {i}", color) for i, color in enumerate(class_palette(150))]
    assert draw_panels(panel, legend).height < 900


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 32), (400, 200)), ((480, 360), (480, 360)), ((2048, 1024), (640, 320))]
)
def test_fit_size(size, expected) -> None:
    assert fit_size(size) == expected
