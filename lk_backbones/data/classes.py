"""Class tables: the names and colours of a data set's classes, and which class a value in a label file stands for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from lk_backbones.drawing.palette import Color, class_palette

#: The value of pixels that count neither in the loss nor in the metrics, after reading, in every data module.
IGNORE_INDEX = 255

#: Marks a label value that belongs to no class and is not ignored either: reading a mask that has it is an error.
_UNKNOWN = -1


@dataclass(frozen=True)
class ClassTable:
    """The classes of a segmentation data set.

    Attributes:
        names: Class names in the order of the class index (0 to ``num_classes - 1``).
        colors: One RGB colour (0 to 255 each) per class.
        class_of_label: Class index of every value that may stand in a label file. Values that map to
            `IGNORE_INDEX` are ignored; values that are absent are errors.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    class_of_label: dict[int, int]

    def __len__(self) -> int:
        return len(self.names)

    def lookup(self) -> np.ndarray:
        """Return the int16 array that maps a label value (its position) to a class index, -1 where there is none."""
        table = np.full(max(256, max(self.class_of_label) + 1), _UNKNOWN, dtype=np.int16)
        for label, index in self.class_of_label.items():
            table[label] = index
        return table

    def describe_labels(self) -> str:
        """Return the allowed label values as text, e.g. ``"0..10 (Sky to Bicyclist), ignored: 11, 255"``."""
        classes = sorted(label for label, index in self.class_of_label.items() if index != IGNORE_INDEX)
        ignored = sorted(label for label, index in self.class_of_label.items() if index == IGNORE_INDEX)
        text = f"{_ranges(classes)} ({self.names[0]} to {self.names[-1]})"
        return f"{text}, ignored: {_ranges(ignored)}" if ignored else text


def _ranges(values: Sequence[int]) -> str:
    """Return ``[0, 1, 2, 7]`` as ``"0..2, 7"``."""
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}..{p[-1]}" for p in parts)


def load_table(name: str) -> ClassTable:
    """Load one of the tables that come with the package (``"cityscapes"`` or ``"ade20k"``; see ``tables/README.md``).

    Of a name with synonyms ("building, edifice") the first one is kept: it is unique, and short enough for a table.
    """
    rows = json.loads((files("lk_backbones.data") / "tables" / f"{name}.json").read_text(encoding="utf-8"))
    classes = sorted((row for row in rows if 0 <= row["trainId"] < IGNORE_INDEX), key=lambda row: row["trainId"])
    return ClassTable(
        names=tuple(row["name"].split(",")[0].strip() for row in classes),
        colors=tuple((row["color"][0], row["color"][1], row["color"][2]) for row in classes),
        class_of_label={row["id"]: row["trainId"] for row in rows if row["id"] >= 0},
    )


def read_classes_file(path: str | Path, ignore_label: int | None = None) -> ClassTable:
    """Read a classes file.

    ``*.txt`` holds one class name per line, in the order of the label values. ``*.json`` holds a list of names, or an
    object with ``"names"`` and, if wanted, ``"colors"`` (one ``[red, green, blue]`` per name, 0 to 255) and
    ``"ignore_index"`` (the label value of pixels without a class).

    Args:
        path: The file.
        ignore_label: Label value of pixels without a class; overrides the file's ``"ignore_index"``. 255 is always
            ignored.

    Returns:
        The table.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is malformed; the message says where.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no classes file {path}. Write one: classes.txt with one class name per line in the order of the "
            'label values, or classes.json with {"names": [...], "colors": [[r, g, b], ...], "ignore_index": 255}.'
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from error
    is_json = path.suffix.lower() == ".json"
    content: dict[str, Any] = _parse_json(path, text) if is_json else {"names": _parse_lines(path, text)}

    names = _check_names(path, content)
    colors = _check_colors(path, content.get("colors"), len(names))
    if ignore_label is None:
        ignore_label = content.get("ignore_index")
    class_of_label = {index: index for index in range(len(names))} | {IGNORE_INDEX: IGNORE_INDEX}
    if ignore_label is not None:
        if not isinstance(ignore_label, int) or isinstance(ignore_label, bool) or ignore_label < 0:
            raise ValueError(f'{path}: "ignore_index" must be a label value (0 or more), got {ignore_label!r}.')
        if ignore_label < len(names):
            raise ValueError(
                f"{path}: the ignored label {ignore_label} is also the label of class "
                f"{names[ignore_label]!r} (names are numbered from 0). Use a value from {len(names)} to 255."
            )
        class_of_label[ignore_label] = IGNORE_INDEX
    return ClassTable(names=names, colors=colors, class_of_label=class_of_label)


def _parse_lines(path: Path, text: str) -> list[str]:
    lines = [line.strip() for line in text.rstrip().splitlines()]
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ValueError(f"{path}, line {number} is empty: every line is the name of one class, numbered from 0.")
    return lines


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if isinstance(content, list):
        content = {"names": content}
    if not isinstance(content, dict) or "names" not in content:
        found = f"the keys {sorted(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f'{path} must hold a list of class names or an object with the key "names", but has {found}.')
    return content


def _check_names(path: Path, content: dict[str, Any]) -> tuple[str, ...]:
    names = content["names"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(
            f'{path}: "names" must be a list with at least one class name, all of them text, got {names!r}.'
        )
    if len(names) > IGNORE_INDEX:
        raise ValueError(
            f"{path} names {len(names)} classes, but 255 (the label {IGNORE_INDEX} is ignored) is the most."
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path} names these classes more than once: {', '.join(repeated)}.")
    return tuple(name.strip() for name in names)


def _check_colors(path: Path, colors: Any, num_classes: int) -> tuple[Color, ...]:
    if colors is None:
        return tuple(class_palette(num_classes))
    if not isinstance(colors, list) or len(colors) != num_classes:
        count = len(colors) if isinstance(colors, list) else type(colors).__name__
        raise ValueError(f'{path}: "colors" must be a list of {num_classes} colours, one per name, got {count}.')
    for index, color in enumerate(colors):
        is_color = isinstance(color, list) and len(color) == 3 and all(type(c) is int and 0 <= c <= 255 for c in color)
        if not is_color:
            raise ValueError(f'{path}: "colors"[{index}] must be [red, green, blue] from 0 to 255, got {color!r}.')
    return tuple((color[0], color[1], color[2]) for color in colors)
