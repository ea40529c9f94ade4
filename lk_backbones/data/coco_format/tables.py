"""The pictures and the annotations of a file, as they are read, and compared with each other in the end."""

import math
from array import array
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lk_backbones._printing import printable
from lk_backbones.data.classes import ClassTable
from lk_backbones.data.coco_format.arrays import (
    Unusual,
    all_are,
    as_polygons,
    as_run_lengths,
    find,
    integers,
    numbers_of,
    tensor_of,
    view,
)
from lk_backbones.data.coco_format.entries import (
    MAX_AREA,
    MAX_SIDE,
    WrongEntry,
    id_of,
    is_integer,
    look_at,
    not_a_name,
    wrong_rle,
)
from lk_backbones.data.coco_format.file import CocoFile, PackedList
from lk_backbones.weights.errors import shorten


def repeated_values(values: Iterable[Any]) -> list[Any]:
    """Return the first values that are there more than once, sorted."""
    return sorted(value for value, count in Counter(values).items() if count > 1)[:5]


class Images:
    """The pictures of a file, as they are read."""

    def __init__(self, path: Path, allow_outside: bool):
        self.path = path
        self.allow_outside = allow_outside
        self.ids, self.heights, self.widths = array("q"), array("q"), array("q")
        self.names: list[str] = []

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, entries: list[Any]) -> None:
        """Append a batch of entries.

        Raises:
            WrongEntry: If one of them is wrong.
        """
        for entry in entries:
            number = id_of(self.path, entry, "image")
            name, height, width = entry.get("file_name"), entry.get("height"), entry.get("width")
            if not isinstance(name, str) or not name:
                raise WrongEntry(f'{self.path}, image {number}: "file_name" must be text, got {shorten(name)}.')
            for key, value in (("height", height), ("width", width)):
                if not is_integer(value) or not 1 <= value <= MAX_SIDE:
                    raise WrongEntry(
                        f'{self.path}, image {number}: "{key}" must be a positive integer, got {shorten(value)}; at '
                        f"most {MAX_SIDE} pixels are possible."
                    )
            if reason := not_a_name(name, self.allow_outside):
                raise WrongEntry(f'{self.path}, image {number}: "file_name" {shorten(name)} {reason}')
            self.ids.append(number)
            self.heights.append(height)
            self.widths.append(width)
            self.names.append(name)

    def check(self) -> None:
        """Look at all of them together.

        Raises:
            ValueError: If there is none, or ids are not unique.
        """
        if not self.ids:
            raise ValueError(f'{self.path}: "images" is empty.')
        if repeated := repeated_values(self.ids):
            raise ValueError(f"{self.path}: the id {repeated[0]} stands for more than one image. Ids must be unique.")

    def describe(self, place: int) -> str:
        """Return a picture's id and size, for messages."""
        return f"image {self.ids[place]} ({self.widths[place]}×{self.heights[place]})"


class Annotations:
    """The annotations of a file, as they are read."""

    def __init__(self, path: Path):
        self.path = path
        self.ids, self.images, self.categories, self.crowds = array("q"), array("q"), array("q"), array("b")
        self.boxes, self.areas = array("d"), array("d")
        # of every annotation how many polygons; of every polygon how many numbers; these numbers
        self.num_polygons, self.lengths, self.coordinates = array("q"), array("q"), array("d")
        # of every annotation how many run lengths; of every RLE its height and width; the run lengths
        self.num_counts, self.sizes, self.counts = array("q"), array("q"), array("i")
        #: What is wrong with an annotation, by its place, where that matters only if its box is usable.
        self.wrong: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, entries: list[Any]) -> None:
        """Append a batch of entries.

        Raises:
            WrongEntry: If one of them is wrong, whatever its box is.
        """
        try:
            self._add(entries)
        except Unusual:
            first = len(self.ids)
            usual, wrong = [], {}
            for place, entry in enumerate(entries):
                as_usual, mistake = look_at(self.path, entry)
                usual.append(as_usual)
                if mistake:
                    wrong[first + place] = mistake
            self._add(usual)
            self.wrong |= wrong

    def _add(self, entries: list[Any]) -> None:
        """Append a batch as a whole, or raise `Unusual`; this takes the time, hence the sets and arrays."""
        if not all_are(dict, entries):
            raise Unusual
        ids, images, categories, crowds = (
            integers([entry.get(key, default) for entry in entries])
            for key, default in (("id", None), ("image_id", None), ("category_id", None), ("iscrowd", 0))
        )
        if set(crowds) - {0, 1}:
            raise Unusual
        boxes = [entry.get("bbox") for entry in entries]
        if not all_are(list, boxes) or set(map(len, boxes)) - {4}:
            raise Unusual
        corners = numbers_of(list(chain.from_iterable(boxes)), MAX_SIDE)
        areas = [entry.get("area") for entry in entries]
        numbers_of([area for area in areas if area is not None], MAX_AREA)
        shapes = [[] if (shape := entry.get("segmentation")) is None else shape for entry in entries]
        polygons_of = [shape if type(shape) is list else () for shape in shapes]
        polygons = list(chain.from_iterable(polygons_of))
        lengths, coordinates = as_polygons(polygons)
        coded = [shape for shape in shapes if type(shape) is not list]
        sizes, counts = as_run_lengths(coded)

        self.ids += ids
        self.images += images
        self.categories += categories
        self.crowds.fromlist(crowds.tolist())
        self.boxes += corners
        self.areas.fromlist([math.nan if area is None else float(area) for area in areas])
        self.num_polygons.fromlist(list(map(len, polygons_of)))
        self.lengths += lengths
        self.coordinates += coordinates
        lengths_of = iter(counts)
        self.num_counts.fromlist([0 if type(shape) is list else len(next(lengths_of)) for shape in shapes])
        self.sizes += sizes
        for numbers in counts:
            self.counts.frombytes(numbers.astype(np.int32).tobytes())

    def finish(self, images: Images, table: ClassTable, has_annotations: bool, strict: bool) -> CocoFile:
        """Compare the annotations with pictures and categories, and put them into the order of the pictures.

        Raises:
            ValueError: If an entry is wrong.
        """
        path, ids, boxes = self.path, view(self.ids), view(self.boxes).reshape(-1, 4)
        unique, times = np.unique(ids, return_counts=True)
        if len(unique) < len(ids):
            number = unique[times > 1][0]
            raise ValueError(f"{path}: the id {number} stands for more than one annotation. Ids must be unique.")
        place, known = find(view(self.images), view(images.ids))
        if not known.all():
            wrong = int(known.argmin())
            raise ValueError(
                f"{path}, annotation {ids[wrong]}: its image_id {self.images[wrong]} is not among the {len(images)} "
                "images of the file. Add the image or remove the annotation."
            )
        category, known = find(view(self.categories), np.array(sorted(table.class_of_label), np.int64))
        if not known.all():
            wrong, numbers = int(known.argmin()), sorted(table.class_of_label)
            shown = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
            raise ValueError(
                f'{path}, annotation {ids[wrong]}: category_id {self.categories[wrong]} is not in "categories", which '
                f"has {shown}."
            )
        heights, widths = view(images.heights), view(images.widths)
        x, y, width, height = boxes.T
        flat = (width <= 0) | (height <= 0)
        outside = (x >= widths[place]) | (y >= heights[place]) | (x + width <= 0) | (y + height <= 0)
        self._report(
            {"have no positive size": flat, "lie outside of their image": outside & ~flat}, images, place, strict
        )
        kept = ~(flat | outside)
        for number in sorted(self.wrong):
            if kept[number]:
                raise ValueError(self.wrong[number])
        self._check_sizes(images, place, kept)

        num_polygons, num_counts = view(self.num_polygons), view(self.num_counts)
        no_mask = kept & (num_polygons == 0) & (num_counts == 0)
        chosen = np.flatnonzero(kept)
        chosen = chosen[np.argsort(place[chosen], kind="stable")]
        areas = view(self.areas)[chosen]
        with_area = np.where(np.isnan(areas), width[chosen] * height[chosen], areas)
        polygon_ends, count_ends = (np.concatenate([[0], np.cumsum(n)]) for n in (num_polygons, num_counts))
        per_image = np.bincount(place[chosen], minlength=len(images))
        return CocoFile(
            path=path,
            table=table,
            has_annotations=has_annotations,
            without_mask=int(ids[no_mask.argmax()]) if no_mask.any() else None,
            has_some_mask=bool((kept & ~no_mask).any()),
            image_ids=tensor_of(images.ids),
            heights=tensor_of(images.heights),
            widths=tensor_of(images.widths),
            file_names=PackedList(images.names),
            ends=torch.from_numpy(np.concatenate([[0], np.cumsum(per_image)])),
            ids=torch.from_numpy(ids[chosen]),
            labels=torch.from_numpy(category[chosen] + 1),
            boxes=torch.from_numpy(boxes[chosen].astype(np.float32)),
            areas=torch.from_numpy(with_area.astype(np.float32)),
            iscrowd=torch.from_numpy(view(self.crowds)[chosen].astype(np.int64)),
            polygons=torch.from_numpy(np.stack([polygon_ends[chosen], polygon_ends[chosen + 1]], axis=1)),
            polygon_ends=torch.from_numpy(np.concatenate([[0], np.cumsum(view(self.lengths))])),
            coordinates=tensor_of(self.coordinates),
            run_lengths=torch.from_numpy(np.stack([count_ends[chosen], count_ends[chosen + 1]], axis=1)),
            counts=tensor_of(self.counts),
        )

    def _report(self, reasons: dict[str, np.ndarray], images: Images, place: np.ndarray, strict: bool) -> None:
        """Warn of the annotations that are left out, by reason, with the first of each; if strict, it is an error."""
        found = {reason: int(mask.argmax()) for reason, mask in reasons.items() if mask.any()}
        if not found:
            return
        examples = {}
        for reason, first in found.items():
            box = ", ".join(f"{value:.15g}" for value in self.boxes[4 * first : 4 * first + 4])
            examples[reason] = f"annotation {self.ids[first]} with bbox [{box}] in {images.describe(place[first])}"
        if strict:
            reason = min(found, key=found.__getitem__)
            raise ValueError(
                f"{self.path}: boxes must not {reason}, as does {examples[reason]}. Correct or remove it, or set "
                "strict=False to leave such annotations out."
            )
        parts = [f"{int(reasons[reason].sum())} {reason}, first {example}" for reason, example in examples.items()]
        total = int(sum(mask.sum() for mask in reasons.values()))
        rank_zero_warn(
            f"{printable(self.path)}: boxes of {total} of {len(self)} annotations are left out: "
            + "; ".join(parts)
            + "."
        )

    def _check_sizes(self, images: Images, place: np.ndarray, kept: np.ndarray) -> None:
        """Compare the sizes of RLE with those of their pictures."""
        coded = np.flatnonzero(view(self.num_counts))
        sizes = view(self.sizes).reshape(-1, 2)
        expected = np.stack([view(images.heights)[place[coded]], view(images.widths)[place[coded]]], axis=1)
        wrong = kept[coded] & (sizes != expected).any(axis=1)
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                wrong_rle(
                    f"{self.path}, annotation {self.ids[coded[first]]}",
                    f"{expected[first].tolist()}, which is that of its image (height, width), got "
                    f"{sizes[first].tolist()}",
                )
            )
