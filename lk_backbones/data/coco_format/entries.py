"""Entries of an annotation file, each looked at by itself, to say what is wrong with it."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from lk_backbones.data.outlines import MAX_OUTLINE, outline_length
from lk_backbones.data.run_lengths import decompress
from lk_backbones.weights.errors import shorten

#: Most pixels that a side of a picture, or a coordinate, may have.
MAX_SIDE = 1_000_000

MAX_AREA = MAX_SIDE**2

#: Largest run length, as run lengths are kept in 32 bits.
MAX_COUNT = 2**31 - 1


class WrongEntry(Exception):
    """What is wrong with an entry of the file."""


def id_of(path: Path, entry: Any, kind: str) -> int:
    """Return the id of an entry, or say that it has none by a `WrongEntry`."""
    number = entry.get("id") if isinstance(entry, dict) else None
    if not is_integer(number):
        raise WrongEntry(f'{path}: every {kind} must be an object with an integer "id", got {shorten(entry)}.')
    assert isinstance(number, int)
    return number


def is_integer(value: Any) -> bool:
    """Say whether a value is an integer of at most 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_number(value: Any, limit: float) -> bool:
    """Say whether a value is a number whose size is at most a limit."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= limit  # false for NaN


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_OUTSIDE = re.compile(r"[a-zA-Z]:|[/\\]|(.*/)?\.\.(/|$)", re.DOTALL)


def not_a_name(name: str, allow_outside: bool) -> str | None:
    """Say why a file name from outside is none of a file in a folder; None: it is one.

    Args:
        name: Relative to the folder, with ``/`` between sub-folders.
        allow_outside: Whether it may lead out of the folder.
    """
    if _CONTROL.search(name):
        return "has control characters. Rename the file."
    if allow_outside:
        return None
    if _OUTSIDE.match(name):
        return "leads out of the folder of the pictures. If you trust the file, set allow_outside=True."
    if "\\" in name:
        return 'has a backslash, which is "/" in COCO format. Write it so, or set allow_outside=True to leave it.'
    return None


def look_at(path: Path, entry: Any) -> tuple[dict[str, Any], str | None]:
    """Look at one annotation by itself.

    Returns:
        The annotation as annotations usually are, without what is wrong; and what is wrong, where that does not matter
        if its box is not usable.

    Raises:
        WrongEntry: If it is wrong anyhow.
    """
    number = id_of(path, entry, "annotation")
    where = f"{path}, annotation {number}"
    usual: dict[str, Any] = {"id": number}
    for key, kind in (("image_id", "an image"), ("category_id", "a category")):
        value = entry.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not is_integer(value):
            raise WrongEntry(f"{where}: {key} must be the integer id of {kind}, got {shorten(entry.get(key))}.")
        usual[key] = value
    crowd = entry.get("iscrowd", 0)
    if not isinstance(crowd, int | float) or crowd not in (0, 1):
        raise WrongEntry(f"{where}: iscrowd must be 0 or 1, got {shorten(crowd)}.")
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value, MAX_SIDE) for value in box):
        raise WrongEntry(
            f"{where}: bbox must be [x, y, width, height], four numbers of at most {MAX_SIDE} pixels, got "
            f"{shorten(box)}."
        )
    usual |= {"iscrowd": int(crowd), "bbox": box}
    area, mistake = entry.get("area"), None
    if area is None or is_number(area, MAX_AREA):
        usual["area"] = area
    else:
        mistake = f"{where}: area must be a number of pixels, got {shorten(area)}."
    shape = entry.get("segmentation")
    mistake = mistake or _wrong_segmentation(where, shape)
    if mistake is None:
        usual["segmentation"] = shape
    return usual, mistake


def _wrong_segmentation(where: str, shape: Any) -> str | None:
    """Say what is wrong with polygons or an RLE."""
    if shape is None:
        return None
    if isinstance(shape, dict):
        return _wrong_run_lengths(where, shape)
    if not isinstance(shape, list):
        return f"{where}: segmentation must be a list of polygons or an RLE object, got {shorten(shape)}."
    for polygon in shape:
        if not isinstance(polygon, list) or not all(is_number(value, math.inf) for value in polygon):
            return (
                f"{where}: segmentation must be a list of polygons, each a flat list of numbers [x1, y1, x2, y2, ...]; "
                f"one is {shorten(polygon)}."
            )
        if len(polygon) < 6 or len(polygon) % 2:
            return (
                f"{where}: segmentation has a polygon of {len(polygon)} numbers; a polygon has at least three corners, "
                "that is six numbers, and always an even count."
            )
        far = [value for value in polygon if not is_number(value, MAX_SIDE)]
        if far:
            return (
                f"{where}: segmentation has the coordinate {shorten(far[0])}; at most {MAX_SIDE} pixels are possible."
            )
        length = outline_length(np.array(polygon, np.float64))
        if length > MAX_OUTLINE:
            return (
                f"{where}: segmentation has a polygon of {len(polygon) // 2} corners whose outline is {length:.0f} "
                f"pixels long; at most {MAX_OUTLINE} are possible."
            )
    return None


def wrong_rle(where: str, rest: str) -> str:
    """Return the error about a wrong size of run lengths."""
    return f'{where}: segmentation as RLE must have "size" {rest}.'


def _wrong_run_lengths(where: str, shape: dict[str, Any]) -> str | None:
    size, counts = shape.get("size"), shape.get("counts")
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(is_integer(side) and 0 < side <= MAX_SIDE for side in size)
        or not isinstance(counts, list | str)
    ):
        return wrong_rle(
            where,
            f'[height, width], those of its image, and "counts", a list or text; got size {shorten(size)} and counts '
            f"{shorten(counts)}",
        )
    if isinstance(counts, str):
        try:
            (numbers,) = decompress([counts])
        except ValueError as error:
            return f'{where}: segmentation has "counts" that are no run lengths: {error}; got {shorten(counts)}.'
        total = int(numbers.sum())
    else:
        if not all(is_integer(count) and 0 <= count <= MAX_COUNT for count in counts):
            return f'{where}: segmentation must have "counts" of integers from 0 on, got {shorten(counts)}.'
        total = sum(counts)
    if total != size[0] * size[1]:
        return f"{where}: segmentation cannot be decoded: its counts sum up to {total}, not {size[0]}×{size[1]}."
    return None
