"""Reading COCO annotation files (https://cocodataset.org/#format-data), with errors that name file and annotation."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lk_backbones.data.classes import ClassTable, default_colors

try:
    from pycocotools import mask as mask_api
except ImportError:  # an optional dependency
    mask_api = None


def require_mask_api() -> Any:
    """Returns pycocotools' mask functions.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    if mask_api is None:
        raise ModuleNotFoundError('Masks in COCO format need pycocotools: pip install "lk-backbones[detection]"')
    return mask_api


class PackedList(Sequence[Any]):
    """A read-only list of plain values that is held in two arrays.

    Loading processes share its memory with their parent; of a list of many small Python objects each would soon have a
    copy of its own, because reading them changes their reference counts.
    """

    def __init__(self, items: Iterable[Any]):
        packed = [json.dumps(item, separators=(",", ":")).encode() for item in items]
        self._ends = np.cumsum([0, *map(len, packed)])
        self._bytes = np.frombuffer(b"".join(packed), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} items, numbered from 0; there is no item {index}.")
        return json.loads(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


@dataclass
class CocoFile:
    """What a COCO annotation file holds, checked.

    Attributes:
        path: The file.
        table: Classes in the order of their category ids; ``class_of_label`` maps category ids to class indices from 0.
        images: Every picture's ``id``, ``file_name``, ``height`` and ``width``, in the order of the file.
        annotations: For every picture the list of its usable annotations: ``id``, ``label`` (from 1), ``box`` (x, y,
            width, height), ``area``, ``iscrowd`` and ``segmentation``.
        has_annotations: Whether the file has any list of annotations; those of test sets may not.
        num_objects: Number of usable annotations of every picture, crowds not counted.
        without_mask: Id of the first annotation that has no segmentation; None if all have one.
    """

    path: Path
    table: ClassTable
    images: PackedList
    annotations: PackedList
    has_annotations: bool
    num_objects: np.ndarray
    without_mask: int | None


def read_coco(path: Path, strict: bool = False, needs_annotations: bool = True) -> CocoFile:
    """Reads and checks an annotation file.

    Annotations whose box has no positive size or lies outside of its picture are dropped, and counted in one warning.

    Args:
        path: The file.
        strict: Whether such boxes are errors instead.
        needs_annotations: Whether a file without ``annotations`` is an error.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a COCO annotation file, or an entry of it is wrong; the message names file and id.
    """
    content = _load(path, ["images", "categories"] + (["annotations"] if needs_annotations else []))
    table = _read_categories(path, content["categories"])
    images = _read_images(path, content["images"])
    place_of = {image["id"]: place for place, image in enumerate(images)}
    per_image: list[list[dict[str, Any]]] = [[] for _ in images]
    dropped = _Dropped(path, strict)
    seen: set[Any] = set()
    without_mask = None
    entries = content.get("annotations", [])
    for entry in entries:
        number = _id_of(path, entry, "annotation")
        if number in seen:
            raise ValueError(f"{path}: the id {number} stands for more than one annotation. Ids must be unique.")
        seen.add(number)
        place = place_of.get(entry.get("image_id"))
        if place is None:
            raise ValueError(
                f"{path}, annotation {number}: its image_id {entry.get('image_id')!r} is not among the "
                f"{len(images)} images of the file. Add the image or remove the annotation."
            )
        image = images[place]
        annotation = _read_annotation(path, number, entry, table, image, dropped)
        if annotation is None:
            continue
        if without_mask is None and not annotation["segmentation"]:
            without_mask = number
        per_image[place].append(annotation)
    dropped.report(len(entries))
    return CocoFile(
        path=path,
        table=table,
        images=PackedList(images),
        annotations=PackedList(per_image),
        has_annotations="annotations" in content,
        num_objects=np.array([sum(not a["iscrowd"] for a in annotations) for annotations in per_image], np.int64),
        without_mask=without_mask,
    )


def _load(path: Path, keys: list[str]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no annotations file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a COCO annotations file: it is not valid JSON ({error}).") from error
    wrong = not isinstance(content, dict) or [key for key in keys if not isinstance(content.get(key), list)]
    if wrong:
        found = f"an object with {sorted(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"{path} is not a COCO annotations file: it must hold an object with the lists "
            f"{', '.join(map(repr, keys))}, but holds {found}."
        )
    assert isinstance(content, dict)
    return content


def _id_of(path: Path, entry: Any, kind: str) -> int:
    number = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f'{path}: every {kind} must be an object with an integer "id", got {_short(entry)}.')
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _repeated(values: list[Any]) -> list[Any]:
    return sorted(value for value, count in Counter(values).items() if count > 1)[:5]


def _read_categories(path: Path, categories: list[Any]) -> ClassTable:
    ids = [_id_of(path, category, "category") for category in categories]
    names: list[Any] = [category.get("name") for category in categories]
    if not ids or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f'{path}: "categories" must be a list of at least one category, each with a "name".')
    for kind, values in (("id", ids), ("name", names)):
        if repeated := _repeated(values):
            raise ValueError(f"{path}: more than one category has the {kind} {repeated[0]!r}. They must be unique.")
    ordered = sorted(zip(ids, names, strict=True))
    return ClassTable(
        names=tuple(name.strip() for _, name in ordered),
        colors=tuple(default_colors(len(ordered))),
        class_of_label={number: index for index, (number, _) in enumerate(ordered)},
    )


def _read_images(path: Path, entries: list[Any]) -> list[dict[str, Any]]:
    images = []
    for entry in entries:
        image: dict[str, Any] = {"id": _id_of(path, entry, "image")}
        for key, kind in (("file_name", str), ("height", int), ("width", int)):
            value: Any = entry.get(key)
            if not isinstance(value, kind) or not value or (isinstance(value, int) and value < 1):
                raise ValueError(
                    f'{path}, image {image["id"]}: "{key}" must be {"text" if kind is str else "a positive integer"}, '
                    f"got {_short(value)}."
                )
            image[key] = value
        images.append(image)
    if repeated := _repeated([image["id"] for image in images]):
        raise ValueError(f"{path}: the id {repeated[0]} stands for more than one image. Ids must be unique.")
    if not images:
        raise ValueError(f'{path}: "images" is empty.')
    return images


def _read_annotation(
    path: Path, number: int, entry: dict[str, Any], table: ClassTable, image: dict[str, Any], dropped: "_Dropped"
) -> dict[str, Any] | None:
    category = entry.get("category_id")
    if category not in table.class_of_label:
        known = sorted(table.class_of_label)
        shown = ", ".join(map(str, known[:20])) + (", ..." if len(known) > 20 else "")
        raise ValueError(
            f'{path}, annotation {number}: category_id {category!r} is not in "categories", which has {shown}.'
        )
    iscrowd = entry.get("iscrowd", 0)
    if iscrowd not in (0, 1):
        raise ValueError(f"{path}, annotation {number}: iscrowd must be 0 or 1, got {_short(iscrowd)}.")
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
        raise ValueError(
            f"{path}, annotation {number}: bbox must be [x, y, width, height], four numbers, got {_short(box)}."
        )
    x, y, width, height = box
    if width <= 0 or height <= 0:
        dropped.add("have no positive size", number, box, image)
        return None
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        dropped.add("lie outside of their image", number, box, image)
        return None
    segmentation = _read_segmentation(path, number, entry.get("segmentation"), image)
    area = entry.get("area")
    if area is not None and not _is_number(area):
        raise ValueError(f"{path}, annotation {number}: area must be a number of pixels, got {_short(area)}.")
    return {
        "id": number,
        "label": table.class_of_label[category] + 1,
        "box": box,
        "area": area,
        "iscrowd": int(iscrowd),
        "segmentation": segmentation,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_segmentation(path: Path, number: int, value: Any, image: dict[str, Any]) -> Any:
    """Returns polygons, an RLE, or None if there is no segmentation."""
    where = f"{path}, annotation {number}: segmentation"
    if value is None or value == []:
        return None
    if isinstance(value, dict):
        size, counts = value.get("size"), value.get("counts")
        if size != [image["height"], image["width"]] or not isinstance(counts, list | str):
            raise ValueError(
                f'{where} as RLE must have "size" [{image["height"]}, {image["width"]}], which is that of its image '
                f'(height, width), and "counts", a list or text; got size {_short(size)} and counts '
                f"{_short(counts)}."
            )
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list of polygons or an RLE object, got {_short(value)}.")
    for polygon in value:
        if not isinstance(polygon, list) or not all(_is_number(v) for v in polygon):
            raise ValueError(
                f"{where} must be a list of polygons, each a flat list of numbers [x1, y1, x2, y2, ...]; one is "
                f"{_short(polygon)}."
            )
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"{where} has a polygon of {len(polygon)} numbers; a polygon has at least three corners, that is six "
                "numbers, and always an even count."
            )
    return value


class _Dropped:
    """Counts what is left out, by reason, with the first annotation of each."""

    def __init__(self, path: Path, strict: bool):
        self.path = path
        self.strict = strict
        self.count: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, number: int, box: list[float], image: dict[str, Any]) -> None:
        example = f"annotation {number} with bbox {box} in image {image['id']} ({image['width']}×{image['height']})"
        if self.strict:
            raise ValueError(
                f"{self.path}: boxes must not {reason}, as does {example}. Correct or remove it, or set strict=False "
                "to leave such annotations out."
            )
        self.count[reason] += 1
        self.first.setdefault(reason, example)

    def report(self, total: int) -> None:
        if self.count:
            parts = [f"{number} {reason}, first {self.first[reason]}" for reason, number in self.count.items()]
            rank_zero_warn(
                f"{self.path}: boxes of {self.count.total()} of {total} annotations are left out: "
                + "; ".join(parts)
                + "."
            )


def decode_mask(where: str, segmentation: Any, height: int, width: int) -> np.ndarray:
    """Turns a segmentation into pixels, as pycocotools does.

    Args:
        where: File and annotation, for messages.
        segmentation: Polygons or an RLE.
        height: Height of the picture.
        width: Width of the picture.

    Returns:
        uint8 `(height, width)` of 0 and 1.

    Raises:
        ValueError: It cannot be decoded.
    """
    api = require_mask_api()
    try:
        if isinstance(segmentation, list):
            rle = api.merge(api.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            if sum(segmentation["counts"]) != height * width:
                raise ValueError(f"its counts sum up to {sum(segmentation['counts'])}, not {height}×{width}")
            rle = api.frPyObjects(segmentation, height, width)
        else:
            rle = segmentation
        mask: np.ndarray = api.decode(rle)
    except Exception as error:
        raise ValueError(f"{where}: its segmentation cannot be decoded: {error}.") from error
    return mask
