"""COCO's run lengths as text, turned into numbers, with checks that pycocotools leaves out before it writes pixels."""

from collections.abc import Sequence

import numpy as np

#: Most characters per number: 30 bits, five in each, where the largest picture has fewer pixels.
_MAX_CHARACTERS = 7


def decompress(texts: Sequence[str]) -> list[np.ndarray]:
    """Decode COCO's compressed run lengths.

    A number is written in groups of five bits, the lowest first, each a character from ``0`` on; the bit of 32 says
    that another group follows, that of 16 in the last one is the sign. From the fourth number on it is the difference
    to the last but one.

    Args:
        texts: ``counts`` of any number of masks.

    Returns:
        int64 run lengths of every mask.

    Raises:
        ValueError: If a text is empty, has other characters, is cut off, or a run length is negative or too large.
    """
    if not texts:
        return []
    if not all(texts):
        raise ValueError("it is empty")
    try:
        letters = np.frombuffer("".join(texts).encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        letters = np.array([-1])
    if letters.min() < 0 or letters.max() > 63:
        raise ValueError("it has characters that COCO's run lengths do not use")
    last = (letters & 32) == 0
    firsts = np.cumsum([0, *map(len, texts)])  # the first letter of every text
    if not last[firsts[1:] - 1].all():
        raise ValueError("it is cut off")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MAX_CHARACTERS:
        raise ValueError("one of its numbers is too large")
    group = np.arange(len(letters)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((letters & 31) << (5 * group), starts)
    numbers -= np.where(letters[ends] & 16, np.int64(1) << (5 * lengths), 0)
    # sums of every second number, text by text
    first = np.searchsorted(ends, firsts[:-1])
    many = np.diff([*first, len(ends)])
    place = np.arange(len(ends)) - np.repeat(first, many)
    counts = numbers.copy()
    for chain in ((place % 2 == 1), (place % 2 == 0) & (place > 0)):
        sums = np.cumsum(np.where(chain, numbers, 0))
        counts[chain] = (sums - np.repeat(sums[first], many))[chain]
    if counts.min() < 0:
        raise ValueError("one of its counts is negative")
    return np.split(counts, first[1:])
