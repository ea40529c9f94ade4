"""What an annotation file holds, in tensors that loading processes share with their parent."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lk_backbones.data.classes import ClassTable
from lk_backbones.data.outlines import Outlines, Polygons, RunLengths


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
        image_ids: int64 ``(P,)``, in the order of the file.
        heights: int64 ``(P,)``, in pixels.
        widths: int64 ``(P,)``, in pixels.
        file_names: P texts.
        ends: int64 ``(P + 1,)``; the annotations of picture p are those from ``ends[p]`` to ``ends[p + 1]``.
        ids: int64 ``(N,)``.
        labels: int64 ``(N,)``, from 1.
        boxes: float32 ``(N, 4)``, x, y, width, height.
        areas: float32 ``(N,)``, those of the boxes where the file says nothing.
        iscrowd: int64 ``(N,)``, 0 or 1.
        polygons: int64 ``(N, 2)``, the first polygon and the one after the last.
        polygon_ends: int64; polygon i is made of ``coordinates[polygon_ends[i]:polygon_ends[i + 1]]``.
        coordinates: float64, x1, y1, x2, y2, … of all polygons.
        run_lengths: int64 ``(N, 2)``, the first and the one after the last of ``counts``; both 0 if it is no RLE.
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
        """Number of usable annotations of every picture, crowds not counted, int64 ``(P,)``."""
        single = np.concatenate([[0], np.cumsum(self.iscrowd.numpy() == 0)])
        return np.diff(single[self.ends.numpy()])

    def image(self, place: int) -> CocoImage:
        """Return a picture's entry."""
        return CocoImage(
            int(self.image_ids[place]), self.file_names[place], int(self.heights[place]), int(self.widths[place])
        )

    def annotations(self, place: int) -> slice:
        """Return which annotations a picture has."""
        start, end = self.ends[place : place + 2].tolist()
        return slice(start, end)

    def outlines(self, place: int) -> Outlines:
        """Return the masks of a picture's objects, not yet drawn."""
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
