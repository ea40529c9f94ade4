"""Batches of entries as arrays, as long as nothing in them is unusual; this is where reading a file takes its time."""

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from lk_backbones.data.coco_format.entries import MAX_COUNT, MAX_SIDE
from lk_backbones.data.outlines import MAX_OUTLINE
from lk_backbones.data.run_lengths import decompress


class Unusual(Exception):
    """Some entry of a batch is not as it nearly always is."""


def view(numbers: "array[Any]") -> np.ndarray:
    """Return the numbers themselves, not a copy, as an array of numpy."""
    return np.frombuffer(numbers, dtype=numbers.typecode) if len(numbers) else np.zeros(0, numbers.typecode)


def tensor_of(numbers: "array[Any]") -> torch.Tensor:
    """Return the numbers themselves, not a copy."""
    dtype = {"q": torch.int64, "i": torch.int32, "d": torch.float64}[numbers.typecode]
    return torch.frombuffer(numbers, dtype=dtype) if len(numbers) else torch.zeros(0, dtype=dtype)


def find(values: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where every value is, and whether it is there at all."""
    order = np.argsort(among, kind="stable")
    place = order[np.searchsorted(among[order], values).clip(0, len(among) - 1)]
    return place, among[place] == values


def all_are(kind: type, values: Sequence[Any]) -> bool:
    """Say whether all values are of a type, and of none that derives from it."""
    return not set(map(type, values)) - {kind}


def integers(values: list[Any]) -> "array[int]":
    """Return integers of at most 64 bits as an array; what else there is, is `Unusual`."""
    if not all_are(int, values):  # bool is another type
        raise Unusual
    try:
        return array("q", values)
    except OverflowError:
        raise Unusual from None


def numbers_of(values: list[Any], limit: float) -> "array[float]":
    """Return numbers that are no larger than a limit as an array; what else there is, is `Unusual`."""
    if set(map(type, values)) - {int, float}:
        raise Unusual
    try:
        numbers = array("d", values)
    except OverflowError:
        raise Unusual from None
    if len(numbers) and not np.abs(view(numbers)).max() <= limit:  # written so that NaN fails too
        raise Unusual
    return numbers


def as_polygons(polygons: list[Any]) -> tuple["array[int]", "array[float]"]:
    """Lengths and numbers of polygons."""
    if not all_are(list, polygons):
        raise Unusual
    lengths = array("q", map(len, polygons))
    if not len(lengths):
        return lengths, array("d")
    sizes = view(lengths)
    if sizes.min() < 6 or (sizes % 2).any():
        raise Unusual
    numbers = numbers_of(list(chain.from_iterable(polygons)), MAX_SIDE)
    # how long the outlines are: all steps between corners, those within a polygon and the ones back to its first
    corners, firsts = view(numbers).reshape(-1, 2), np.concatenate([[0], np.cumsum(sizes[:-1] // 2)])
    steps = np.abs(np.diff(corners, axis=0, append=corners[-1:])).max(axis=1)
    lasts = firsts + sizes // 2 - 1
    steps[lasts] = np.abs(corners[lasts] - corners[firsts]).max(axis=1)
    if np.add.reduceat(steps + 1, firsts).max() > MAX_OUTLINE:
        raise Unusual
    return lengths, numbers


def as_run_lengths(shapes: list[Any]) -> tuple["array[int]", list[np.ndarray]]:
    """Sizes (height and width in turn) and run lengths of RLE."""
    if not all_are(dict, shapes):
        raise Unusual
    sizes = [shape.get("size") for shape in shapes]
    if not all_are(list, sizes) or set(map(len, sizes)) - {2}:
        raise Unusual
    sides = integers(list(chain.from_iterable(sizes)))
    counts = [shape.get("counts") for shape in shapes]
    try:
        decoded = iter(decompress([text for text in counts if type(text) is str]))
    except ValueError:
        raise Unusual from None
    numbers = [next(decoded) if type(given) is str else _as_counts(given) for given in counts]
    for place, lengths in enumerate(numbers):
        height, width = sides[2 * place : 2 * place + 2]
        if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE) or int(lengths.sum()) != height * width:
            raise Unusual
    return sides, numbers


def _as_counts(values: Any) -> np.ndarray:
    if type(values) is not list:
        raise Unusual
    counts = view(integers(values))
    if len(counts) and (counts.min() < 0 or counts.max() > MAX_COUNT):
        raise Unusual
    return counts
