"""Default colours are far from each other, for colour-blind eyes too, and show on photographs."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from lk_backbones.drawing.palette import class_palette

# What is seen without red and without green receptors, of linear RGB: Machado, Oliveira and Fernandes, "A
# Physiologically-based Model for Simulation of Color Vision Deficiency", 2009, table 1, severity 1.
EYES = {
    "normal": np.eye(3),
    "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def cielab(colors: np.ndarray, eye: str = "normal") -> np.ndarray:
    """Colours ``(N, 3)`` of 0 to 255 in CIELAB, as an eye sees them."""
    encoded = np.asarray(colors, np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4) @ np.transpose(EYES[eye])
    linear = linear.clip(0, 1)
    seen = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return cv2.cvtColor(seen[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]


@pytest.mark.parametrize(
    ("number", "normal", "blind"), [(3, 80, 40), (5, 60, 40), (12, 28, 18), (21, 21, 13), (24, 18, 12)]
)
def test_colours_can_be_told_apart(number: int, normal: float, blind: float) -> None:
    for eye in EYES:
        colors = cielab(np.array(class_palette(number)), eye)
        distances = np.linalg.norm(colors[:, None] - colors[None], axis=2)[~np.eye(number, dtype=bool)]
        assert distances.min() >= (normal if eye == "normal" else blind), eye


def test_colours_show_and_do_not_hide() -> None:
    lightness, a, b = cielab(np.array(class_palette(24))).T
    assert lightness.min() >= 45  # also far from the black of ignored pixels
    assert lightness.max() <= 90.5
    assert np.hypot(a, b).min() >= 45  # photographs are mostly less colourful


def test_all_colours_differ_and_depend_on_the_class_alone() -> None:
    colors = class_palette(1000)
    assert len(set(colors[:255])) == 255
    assert colors[:21] == class_palette(21)
    assert {type(channel) for color in colors for channel in color} == {int}
    assert np.min(colors) >= 0
    assert np.max(colors) <= 255
    assert class_palette(0) == []
