"""Reading COCO annotation files (https://cocodataset.org/#format-data), with errors that name file and annotation.

The file is read entry by entry into arrays, which take a tenth of the memory of its Python objects, and which the
loading processes share. Entries are looked at in batches: one that is unusual in any way is looked at by itself, to say
what is wrong with it.
"""

import gc
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lk_backbones._printing import printable
from lk_backbones.data.classes import ClassTable
from lk_backbones.data.json_stream import JsonStream
from lk_backbones.data.outlines import MAX_OUTLINE, Outlines, Polygons, RunLengths, outline_length
from lk_backbones.data.run_lengths import decompress
from lk_backbones.drawing.palette import class_palette
from lk_backbones.weights.errors import shorten

#: Most pixels that a side of a picture, or a coordinate, may have.
MAX_SIDE = 1_000_000

_MAX_AREA = MAX_SIDE**2

#: Largest run length, as run lengths are kept in 32 bits.
_MAX_COUNT = 2**31 - 1

#: Entries that are turned into arrays together.
_BATCH = 2048


class PackedList(Sequence[Any]):
    """A read-only list of plain values that is held in two arrays.

    Loading processes share its memory with their parent, whatever way they are started; of a list of many small Python
    objects each would soon have a copy of its own, because reading them changes their reference counts.
    """

    def __init__(self, items: Iterable[Any]):
        packed = [json.dumps(item, separators=(",", ":")).encode() for item in items]
        self._ends = torch.from_numpy(np.cumsum([0, *map(len, packed)]))
        self._bytes = torch.frombuffer(bytearray(b"".join(packed) or b" "), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} items, numbered from 0; there is no item {index}.")
        start, end = self._ends[index : index + 2].tolist()
        return json.loads(self._bytes[start:end].numpy().tobytes())


class CocoImage(NamedTuple):
    """What an annotation file says of a picture."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass
class CocoFile:
    """What a COCO annotation file holds, checked.

    All that is large is in tensors, which loading processes share with their parent. Annotations are in the order of
    their pictures. Those that are not usable are not among them.

    Attributes:
        path: The file.
        table: Classes in the order of their category ids; ``class_of_label`` maps category ids to class indices from 0.
        has_annotations: Whether the file has any list of annotations; those of test sets may not.
        without_mask: Id of the first annotation that has no segmentation; None if all have one.
        has_some_mask: Whether any annotation has a segmentation.
        image_ids: int64 `(P,)`, in the order of the file.
        heights: int64 `(P,)`, in pixels.
        widths: int64 `(P,)`, in pixels.
        file_names: P texts.
        ends: int64 `(P + 1,)`; the annotations of picture p are those from ``ends[p]`` to ``ends[p + 1]``.
        ids: int64 `(N,)`.
        labels: int64 `(N,)`, from 1.
        boxes: float32 `(N, 4)`, x, y, width, height.
        areas: float32 `(N,)`, those of the boxes where the file says nothing.
        iscrowd: int64 `(N,)`, 0 or 1.
        polygons: int64 `(N, 2)`, the first polygon and the one after the last.
        polygon_ends: int64; polygon i is made of ``coordinates[polygon_ends[i]:polygon_ends[i + 1]]``.
        coordinates: float64, x1, y1, x2, y2, … of all polygons.
        run_lengths: int64 `(N, 2)`, the first and the one after the last of ``counts``; both 0 if it is no RLE.
        counts: int32, the run lengths of all RLE.
    """

    path: Path
    table: ClassTable
    has_annotations: bool
    without_mask: int | None
    has_some_mask: bool
    image_ids: torch.Tensor
    heights: torch.Tensor
    widths: torch.Tensor
    file_names: PackedList
    ends: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor
    areas: torch.Tensor
    iscrowd: torch.Tensor
    polygons: torch.Tensor
    polygon_ends: torch.Tensor
    coordinates: torch.Tensor
    run_lengths: torch.Tensor
    counts: torch.Tensor

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_objects(self) -> np.ndarray:
        """Number of usable annotations of every picture, crowds not counted, int64 `(P,)`."""
        single = np.concatenate([[0], np.cumsum(self.iscrowd.numpy() == 0)])
        return np.diff(single[self.ends.numpy()])

    def image(self, place: int) -> CocoImage:
        """Returns a picture's entry."""
        return CocoImage(
            int(self.image_ids[place]), self.file_names[place], int(self.heights[place]), int(self.widths[place])
        )

    def annotations(self, place: int) -> slice:
        """Returns which annotations a picture has."""
        start, end = self.ends[place : place + 2].tolist()
        return slice(start, end)

    def outlines(self, place: int) -> Outlines:
        """Returns the masks of a picture's objects, not yet drawn."""
        chosen = self.annotations(place)
        shapes: list[Polygons | RunLengths] = []
        for (first, last), (start, end) in zip(
            self.polygons[chosen].tolist(), self.run_lengths[chosen].tolist(), strict=True
        ):
            if start < end:
                shapes.append(RunLengths(self.counts[start:end].numpy()))
            else:
                ends = self.polygon_ends[first : last + 1].tolist()
                corners = [self.coordinates[a:b].numpy() for a, b in pairwise(ends)]
                shapes.append(Polygons(corners))
        where = [f"{self.path}, annotation {number}" for number in self.ids[chosen].tolist()]
        return Outlines((int(self.heights[place]), int(self.widths[place])), shapes, where)


def read_coco(
    path: Path, strict: bool = False, needs_annotations: bool = True, allow_outside: bool = False
) -> CocoFile:
    """Reads and checks an annotation file.

    Annotations whose box has no positive size or lies outside of its picture are dropped, and counted in one warning.

    Args:
        path: The file.
        strict: Whether such boxes are errors instead.
        needs_annotations: Whether a file without ``annotations`` is an error.
        allow_outside: Whether a ``file_name`` may lead out of the folder of the pictures.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a COCO annotation file, or an entry of it is wrong; the message names file and id.
    """
    content = _read(path, ["images", "categories"] + (["annotations"] if needs_annotations else []), allow_outside)
    table = _read_categories(path, content["categories"])
    images: _Images = content["images"]
    images.check()
    has_annotations = "annotations" in content
    annotations: _Annotations = content.get("annotations") or _Annotations(path)
    return annotations.finish(images, table, has_annotations, strict)


def _read(path: Path, keys: list[str], allow_outside: bool) -> dict[str, Any]:
    """Reads the file; of what is neither pictures, annotations nor categories only the names are kept."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no annotations file {path}.")
    content: dict[str, Any] = {}
    kind = "object"
    try:
        with _without_garbage_collection(), path.open("rb") as file:
            stream = JsonStream(file)
            if stream.peek() == "{":
                for name in stream.members():
                    if name in ("images", "annotations") and stream.peek() == "[":
                        table = _Images(path, allow_outside) if name == "images" else _Annotations(path)
                        for batch in stream.batches(_BATCH):
                            table.add(batch)
                        content[name] = table
                    else:
                        value = stream.value()
                        content[name] = value if name == "categories" else None
            else:
                kind = type(stream.value()).__name__
            stream.end()
    except _WrongEntry as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError(f"{path} is not a COCO annotations file: it is nested too deeply.") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path} is not a COCO annotations file: it is not valid JSON ({error}).") from error
    lists = (_Images, _Annotations, list)
    if kind != "object" or not all(isinstance(content.get(key), lists) for key in keys):
        found = f"an object with {shorten(sorted(content))}" if kind == "object" else f"a {kind}"
        raise ValueError(
            f"{path} is not a COCO annotations file: it must hold an object with the lists "
            f"{', '.join(map(repr, keys))}, but holds {found}."
        )
    return content


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Values of JSON hold no cycles; looking for some in millions of them would take a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _WrongEntry(Exception):
    """What is wrong with an entry of the file."""


class _Unusual(Exception):
    """Some entry of a batch is not as it nearly always is."""


def _id_of(path: Path, entry: Any, kind: str) -> int:
    number = entry.get("id") if isinstance(entry, dict) else None
    if not _is_integer(number):
        raise _WrongEntry(f'{path}: every {kind} must be an object with an integer "id", got {shorten(entry)}.')
    assert isinstance(number, int)
    return number


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any, limit: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= limit  # false for NaN


def _repeated(values: Iterable[Any]) -> list[Any]:
    return sorted(value for value, count in Counter(values).items() if count > 1)[:5]


def _read_categories(path: Path, categories: list[Any]) -> ClassTable:
    try:
        ids = [_id_of(path, category, "category") for category in categories]
    except _WrongEntry as error:
        raise ValueError(str(error)) from None
    names: list[Any] = [category.get("name") for category in categories]
    if not ids or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f'{path}: "categories" must be a list of at least one category, each with a "name".')
    for kind, values in (("id", ids), ("name", names)):
        if repeated := _repeated(values):
            raise ValueError(f"{path}: more than one category has the {kind} {repeated[0]!r}. They must be unique.")
    ordered = sorted(zip(ids, names, strict=True))
    return ClassTable(
        names=tuple(name.strip() for _, name in ordered),
        colors=tuple(class_palette(len(ordered))),
        class_of_label={number: index for index, (number, _) in enumerate(ordered)},
    )


# --- pictures -------------------------------------------------------------------------------------------------------


class _Images:
    """The pictures of a file, as they are read."""

    def __init__(self, path: Path, allow_outside: bool):
        self.path = path
        self.allow_outside = allow_outside
        self.ids, self.heights, self.widths = array("q"), array("q"), array("q")
        self.names: list[str] = []

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, entries: list[Any]) -> None:
        for entry in entries:
            number = _id_of(self.path, entry, "image")
            name, height, width = entry.get("file_name"), entry.get("height"), entry.get("width")
            if not isinstance(name, str) or not name:
                raise _WrongEntry(f'{self.path}, image {number}: "file_name" must be text, got {shorten(name)}.')
            for key, value in (("height", height), ("width", width)):
                if not _is_integer(value) or not 1 <= value <= MAX_SIDE:
                    raise _WrongEntry(
                        f'{self.path}, image {number}: "{key}" must be a positive integer, got {shorten(value)}; at '
                        f"most {MAX_SIDE} pixels are possible."
                    )
            if reason := not_a_name(name, self.allow_outside):
                raise _WrongEntry(f'{self.path}, image {number}: "file_name" {shorten(name)} {reason}')
            self.ids.append(number)
            self.heights.append(height)
            self.widths.append(width)
            self.names.append(name)

    def check(self) -> None:
        if not self.ids:
            raise ValueError(f'{self.path}: "images" is empty.')
        if repeated := _repeated(self.ids):
            raise ValueError(f"{self.path}: the id {repeated[0]} stands for more than one image. Ids must be unique.")

    def describe(self, place: int) -> str:
        return f"image {self.ids[place]} ({self.widths[place]}×{self.heights[place]})"


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_OUTSIDE = re.compile(r"[a-zA-Z]:|[/\\]|(.*/)?\.\.(/|$)", re.DOTALL)


def not_a_name(name: str, allow_outside: bool) -> str | None:
    """Says why a file name from outside is none of a file in a folder; None: it is one.

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


# --- annotations ----------------------------------------------------------------------------------------------------


class _Annotations:
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
        try:
            self._add(entries)
        except _Unusual:
            first = len(self.ids)
            usual, wrong = [], {}
            for place, entry in enumerate(entries):
                as_usual, mistake = _look_at(self.path, entry)
                usual.append(as_usual)
                if mistake:
                    wrong[first + place] = mistake
            self._add(usual)
            self.wrong |= wrong

    def _add(self, entries: list[Any]) -> None:
        """Appends a batch as a whole, or raises `_Unusual`; this takes the time, hence the sets and arrays."""
        if not _all_are(dict, entries):
            raise _Unusual
        ids, images, categories, crowds = (
            _integers([entry.get(key, default) for entry in entries])
            for key, default in (("id", None), ("image_id", None), ("category_id", None), ("iscrowd", 0))
        )
        if set(crowds) - {0, 1}:
            raise _Unusual
        boxes = [entry.get("bbox") for entry in entries]
        if not _all_are(list, boxes) or set(map(len, boxes)) - {4}:
            raise _Unusual
        corners = _numbers(list(chain.from_iterable(boxes)), MAX_SIDE)
        areas = [entry.get("area") for entry in entries]
        _numbers([area for area in areas if area is not None], _MAX_AREA)
        shapes = [[] if (shape := entry.get("segmentation")) is None else shape for entry in entries]
        polygons_of = [shape if type(shape) is list else () for shape in shapes]
        polygons = list(chain.from_iterable(polygons_of))
        lengths, coordinates = _as_polygons(polygons)
        coded = [shape for shape in shapes if type(shape) is not list]
        sizes, counts = _as_run_lengths(coded)

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

    def finish(self, images: _Images, table: ClassTable, has_annotations: bool, strict: bool) -> CocoFile:
        """Compares the annotations with pictures and categories, and puts them into the order of the pictures.

        Raises:
            ValueError: An entry is wrong.
        """
        path, ids, boxes = self.path, _view(self.ids), _view(self.boxes).reshape(-1, 4)
        unique, times = np.unique(ids, return_counts=True)
        if len(unique) < len(ids):
            number = unique[times > 1][0]
            raise ValueError(f"{path}: the id {number} stands for more than one annotation. Ids must be unique.")
        place, known = _find(_view(self.images), _view(images.ids))
        if not known.all():
            wrong = int(known.argmin())
            raise ValueError(
                f"{path}, annotation {ids[wrong]}: its image_id {self.images[wrong]} is not among the {len(images)} "
                "images of the file. Add the image or remove the annotation."
            )
        category, known = _find(_view(self.categories), np.array(sorted(table.class_of_label), np.int64))
        if not known.all():
            wrong, numbers = int(known.argmin()), sorted(table.class_of_label)
            shown = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
            raise ValueError(
                f'{path}, annotation {ids[wrong]}: category_id {self.categories[wrong]} is not in "categories", which '
                f"has {shown}."
            )
        heights, widths = _view(images.heights), _view(images.widths)
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

        num_polygons, num_counts = _view(self.num_polygons), _view(self.num_counts)
        no_mask = kept & (num_polygons == 0) & (num_counts == 0)
        chosen = np.flatnonzero(kept)
        chosen = chosen[np.argsort(place[chosen], kind="stable")]
        areas = _view(self.areas)[chosen]
        with_area = np.where(np.isnan(areas), width[chosen] * height[chosen], areas)
        polygon_ends, count_ends = (np.concatenate([[0], np.cumsum(n)]) for n in (num_polygons, num_counts))
        per_image = np.bincount(place[chosen], minlength=len(images))
        return CocoFile(
            path=path,
            table=table,
            has_annotations=has_annotations,
            without_mask=int(ids[no_mask.argmax()]) if no_mask.any() else None,
            has_some_mask=bool((kept & ~no_mask).any()),
            image_ids=_tensor(images.ids),
            heights=_tensor(images.heights),
            widths=_tensor(images.widths),
            file_names=PackedList(images.names),
            ends=torch.from_numpy(np.concatenate([[0], np.cumsum(per_image)])),
            ids=torch.from_numpy(ids[chosen]),
            labels=torch.from_numpy(category[chosen] + 1),
            boxes=torch.from_numpy(boxes[chosen].astype(np.float32)),
            areas=torch.from_numpy(with_area.astype(np.float32)),
            iscrowd=torch.from_numpy(_view(self.crowds)[chosen].astype(np.int64)),
            polygons=torch.from_numpy(np.stack([polygon_ends[chosen], polygon_ends[chosen + 1]], axis=1)),
            polygon_ends=torch.from_numpy(np.concatenate([[0], np.cumsum(_view(self.lengths))])),
            coordinates=_tensor(self.coordinates),
            run_lengths=torch.from_numpy(np.stack([count_ends[chosen], count_ends[chosen + 1]], axis=1)),
            counts=_tensor(self.counts),
        )

    def _report(self, reasons: dict[str, np.ndarray], images: _Images, place: np.ndarray, strict: bool) -> None:
        """Warns of the annotations that are left out, by reason, with the first of each; if strict, it is an error."""
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

    def _check_sizes(self, images: _Images, place: np.ndarray, kept: np.ndarray) -> None:
        """Compares the sizes of RLE with those of their pictures."""
        coded = np.flatnonzero(_view(self.num_counts))
        sizes = _view(self.sizes).reshape(-1, 2)
        expected = np.stack([_view(images.heights)[place[coded]], _view(images.widths)[place[coded]]], axis=1)
        wrong = kept[coded] & (sizes != expected).any(axis=1)
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                _wrong_rle(
                    f"{self.path}, annotation {self.ids[coded[first]]}",
                    f"{expected[first].tolist()}, which is that of its image (height, width), got "
                    f"{sizes[first].tolist()}",
                )
            )


def _view(numbers: "array[Any]") -> np.ndarray:
    return np.frombuffer(numbers, dtype=numbers.typecode) if len(numbers) else np.zeros(0, numbers.typecode)


def _tensor(numbers: "array[Any]") -> torch.Tensor:
    """The numbers themselves, not a copy."""
    dtype = {"q": torch.int64, "i": torch.int32, "d": torch.float64}[numbers.typecode]
    return torch.frombuffer(numbers, dtype=dtype) if len(numbers) else torch.zeros(0, dtype=dtype)


def _find(values: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where every value is, and whether it is there at all."""
    order = np.argsort(among, kind="stable")
    place = order[np.searchsorted(among[order], values).clip(0, len(among) - 1)]
    return place, among[place] == values


def _all_are(kind: type, values: Sequence[Any]) -> bool:
    return not set(map(type, values)) - {kind}


def _integers(values: list[Any]) -> "array[int]":
    if not _all_are(int, values):  # bool is another type
        raise _Unusual
    try:
        return array("q", values)
    except OverflowError:
        raise _Unusual from None


def _numbers(values: list[Any], limit: float) -> "array[float]":
    if set(map(type, values)) - {int, float}:
        raise _Unusual
    try:
        numbers = array("d", values)
    except OverflowError:
        raise _Unusual from None
    if len(numbers) and not np.abs(_view(numbers)).max() <= limit:  # written so that NaN fails too
        raise _Unusual
    return numbers


def _as_polygons(polygons: list[Any]) -> tuple["array[int]", "array[float]"]:
    """Lengths and numbers of polygons."""
    if not _all_are(list, polygons):
        raise _Unusual
    lengths = array("q", map(len, polygons))
    if not len(lengths):
        return lengths, array("d")
    sizes = _view(lengths)
    if sizes.min() < 6 or (sizes % 2).any():
        raise _Unusual
    numbers = _numbers(list(chain.from_iterable(polygons)), MAX_SIDE)
    # how long the outlines are: all steps between corners, those within a polygon and the ones back to its first
    corners, firsts = _view(numbers).reshape(-1, 2), np.concatenate([[0], np.cumsum(sizes[:-1] // 2)])
    steps = np.abs(np.diff(corners, axis=0, append=corners[-1:])).max(axis=1)
    lasts = firsts + sizes // 2 - 1
    steps[lasts] = np.abs(corners[lasts] - corners[firsts]).max(axis=1)
    if np.add.reduceat(steps + 1, firsts).max() > MAX_OUTLINE:
        raise _Unusual
    return lengths, numbers


def _as_run_lengths(shapes: list[Any]) -> tuple["array[int]", list[np.ndarray]]:
    """Sizes (height and width in turn) and run lengths of RLE."""
    if not _all_are(dict, shapes):
        raise _Unusual
    sizes = [shape.get("size") for shape in shapes]
    if not _all_are(list, sizes) or set(map(len, sizes)) - {2}:
        raise _Unusual
    sides = _integers(list(chain.from_iterable(sizes)))
    counts = [shape.get("counts") for shape in shapes]
    try:
        decoded = iter(decompress([text for text in counts if type(text) is str]))
    except ValueError:
        raise _Unusual from None
    numbers = [next(decoded) if type(given) is str else _as_counts(given) for given in counts]
    for place, lengths in enumerate(numbers):
        height, width = sides[2 * place : 2 * place + 2]
        if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE) or int(lengths.sum()) != height * width:
            raise _Unusual
    return sides, numbers


def _as_counts(values: Any) -> np.ndarray:
    if type(values) is not list:
        raise _Unusual
    counts = _view(_integers(values))
    if len(counts) and (counts.min() < 0 or counts.max() > _MAX_COUNT):
        raise _Unusual
    return counts


def _look_at(path: Path, entry: Any) -> tuple[dict[str, Any], str | None]:
    """Looks at one annotation by itself.

    Returns:
        The annotation as annotations usually are, without what is wrong; and what is wrong, where that does not matter
        if its box is not usable.

    Raises:
        _WrongEntry: It is wrong anyhow.
    """
    number = _id_of(path, entry, "annotation")
    where = f"{path}, annotation {number}"
    usual: dict[str, Any] = {"id": number}
    for key, kind in (("image_id", "an image"), ("category_id", "a category")):
        value = entry.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not _is_integer(value):
            raise _WrongEntry(f"{where}: {key} must be the integer id of {kind}, got {shorten(entry.get(key))}.")
        usual[key] = value
    crowd = entry.get("iscrowd", 0)
    if not isinstance(crowd, int | float) or crowd not in (0, 1):
        raise _WrongEntry(f"{where}: iscrowd must be 0 or 1, got {shorten(crowd)}.")
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value, MAX_SIDE) for value in box):
        raise _WrongEntry(
            f"{where}: bbox must be [x, y, width, height], four numbers of at most {MAX_SIDE} pixels, got "
            f"{shorten(box)}."
        )
    usual |= {"iscrowd": int(crowd), "bbox": box}
    area, mistake = entry.get("area"), None
    if area is None or _is_number(area, _MAX_AREA):
        usual["area"] = area
    else:
        mistake = f"{where}: area must be a number of pixels, got {shorten(area)}."
    shape = entry.get("segmentation")
    mistake = mistake or _wrong_segmentation(where, shape)
    if mistake is None:
        usual["segmentation"] = shape
    return usual, mistake


def _wrong_segmentation(where: str, shape: Any) -> str | None:
    """Says what is wrong with polygons or an RLE."""
    if shape is None:
        return None
    if isinstance(shape, dict):
        return _wrong_run_lengths(where, shape)
    if not isinstance(shape, list):
        return f"{where}: segmentation must be a list of polygons or an RLE object, got {shorten(shape)}."
    for polygon in shape:
        if not isinstance(polygon, list) or not all(_is_number(value, math.inf) for value in polygon):
            return (
                f"{where}: segmentation must be a list of polygons, each a flat list of numbers [x1, y1, x2, y2, ...]; "
                f"one is {shorten(polygon)}."
            )
        if len(polygon) < 6 or len(polygon) % 2:
            return (
                f"{where}: segmentation has a polygon of {len(polygon)} numbers; a polygon has at least three corners, "
                "that is six numbers, and always an even count."
            )
        far = [value for value in polygon if not _is_number(value, MAX_SIDE)]
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


def _wrong_rle(where: str, rest: str) -> str:
    return f'{where}: segmentation as RLE must have "size" {rest}.'


def _wrong_run_lengths(where: str, shape: dict[str, Any]) -> str | None:
    size, counts = shape.get("size"), shape.get("counts")
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(_is_integer(side) and 0 < side <= MAX_SIDE for side in size)
        or not isinstance(counts, list | str)
    ):
        return _wrong_rle(
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
        if not all(_is_integer(count) and 0 <= count <= _MAX_COUNT for count in counts):
            return f'{where}: segmentation must have "counts" of integers from 0 on, got {shorten(counts)}.'
        total = sum(counts)
    if total != size[0] * size[1]:
        return f"{where}: segmentation cannot be decoded: its counts sum up to {total}, not {size[0]}×{size[1]}."
    return None
