"""Reading COCO annotation files, with errors that name file and annotation.

The file is read entry by entry into arrays, which take a tenth of the memory of its Python objects, and which the
loading processes share. Entries are looked at in batches: one that is unusual in any way is looked at by itself, to say
what is wrong with it.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lk_backbones.data.classes import ClassTable
from lk_backbones.data.coco_format.entries import WrongEntry, id_of
from lk_backbones.data.coco_format.file import CocoFile
from lk_backbones.data.coco_format.tables import Annotations, Images, repeated_values
from lk_backbones.data.json_stream import JsonStream
from lk_backbones.drawing.palette import class_palette
from lk_backbones.weights.errors import shorten

#: Entries that are turned into arrays together.
_BATCH = 2048


def read_coco(
    path: Path, strict: bool = False, needs_annotations: bool = True, allow_outside: bool = False
) -> CocoFile:
    """Read and check an annotation file.

    Annotations whose box has no positive size or lies outside of its picture are dropped, and counted in one warning.

    Args:
        path: The file.
        strict: Whether such boxes are errors instead.
        needs_annotations: Whether a file without ``annotations`` is an error.
        allow_outside: Whether a ``file_name`` may lead out of the folder of the pictures.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a COCO annotation file, or an entry of it is wrong; the message names file and id.
    """
    content = _read(path, ["images", "categories"] + (["annotations"] if needs_annotations else []), allow_outside)
    table = _read_categories(path, content["categories"])
    images: Images = content["images"]
    images.check()
    has_annotations = "annotations" in content
    annotations: Annotations = content.get("annotations") or Annotations(path)
    return annotations.finish(images, table, has_annotations, strict)


def _read(path: Path, keys: list[str], allow_outside: bool) -> dict[str, Any]:
    """Read the file; of what is neither pictures, annotations nor categories only the names are kept."""
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
                        table = Images(path, allow_outside) if name == "images" else Annotations(path)
                        for batch in stream.batches(_BATCH):
                            table.add(batch)
                        content[name] = table
                    else:
                        value = stream.value()
                        content[name] = value if name == "categories" else None
            else:
                kind = type(stream.value()).__name__
            stream.end()
    except WrongEntry as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError(f"{path} is not a COCO annotations file: it is nested too deeply.") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{path} is not a COCO annotations file: it is not valid JSON ({error}).") from error
    lists = (Images, Annotations, list)
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


def _read_categories(path: Path, categories: list[Any]) -> ClassTable:
    try:
        ids = [id_of(path, category, "category") for category in categories]
    except WrongEntry as error:
        raise ValueError(str(error)) from None
    names: list[Any] = [category.get("name") for category in categories]
    if not ids or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f'{path}: "categories" must be a list of at least one category, each with a "name".')
    for kind, values in (("id", ids), ("name", names)):
        if repeated := repeated_values(values):
            raise ValueError(f"{path}: more than one category has the {kind} {repeated[0]!r}. They must be unique.")
    ordered = sorted(zip(ids, names, strict=True))
    return ClassTable(
        names=tuple(name.strip() for _, name in ordered),
        colors=tuple(class_palette(len(ordered))),
        class_of_label={number: index for index, (number, _) in enumerate(ordered)},
    )
