"""COCO's average precision and recall of boxes and masks, over all pictures and processes."""

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_convert

from lk_backbones._private.torchmetrics import GathersItself
from lk_backbones._processes import gathered
from lk_backbones.metrics.masks import Rle, encode_masks, require_coco_tools

__all__ = ["METRIC_NAMES", "DetectionMetrics"]

# COCO's twelve numbers: our names, and torchmetrics'
_NAMES = {
    "ap": "map",
    "ap50": "map_50",
    "ap75": "map_75",
    "ap_small": "map_small",
    "ap_medium": "map_medium",
    "ap_large": "map_large",
    "ar1": "mar_1",
    "ar10": "mar_10",
    "ar100": "mar_100",
    "ar_small": "mar_small",
    "ar_medium": "mar_medium",
    "ar_large": "mar_large",
}
METRIC_NAMES = tuple(_NAMES)


class DetectionMetrics(GathersItself, MeanAveragePrecision):
    """torchmetrics' mean average precision, with masks as run lengths and pictures in the order of their ids.

    What it adds to its parent: masks may come as run lengths; every picture counts once, even if a distributed sampler
    repeats it; several processes, which may have different numbers of pictures, detections or objects, give the very
    numbers of one. Objects with ``iscrowd`` are ignored as COCO does: detections inside are neither right nor wrong.

    What is kept of a picture are a few kilobytes in large blocks. Small objects that stay, between the large masks that
    come and go, would keep the masks' memory from being used again: gigabytes after a thousand pictures.

    Args:
        masks: Whether to measure masks too.
        per_class: Whether to give the AP of every class.
        backend: ``"faster_coco_eval"`` or ``"pycocotools"``; ``None`` for the first if it is installed.
        **kwargs: As every torchmetrics metric.

    Raises:
        ModuleNotFoundError: If neither is installed.
    """

    records: list[torch.Tensor]

    def __init__(self, masks: bool = False, per_class: bool = False, backend: Any = None, **kwargs: Any) -> None:
        require_coco_tools()
        backend = backend or ("faster_coco_eval" if find_spec("faster_coco_eval") else "pycocotools")
        iou_type: Any = ("bbox", "segm") if masks else "bbox"
        with torch.device("cpu"):  # its thresholds are read, also while a task is built on the meta device
            super().__init__(
                iou_type=iou_type,
                # in double precision: torchmetrics' own thresholds are float32, so that recalls such as 7/10 fall on
                # the other side of them than in pycocotools, and AP differs in the fourth digit
                iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
                rec_thresholds=np.linspace(0, 1, 101).tolist(),
                extended_summary=per_class,
                average="macro",
                backend=backend,
                **kwargs,
            )
        self.masks = masks
        self.per_class = per_class
        self.add_state("records", default=[], dist_reduce_fx=None)

    def update(self, predictions: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]]) -> None:
        """Add pictures.

        Args:
            predictions: For every picture ``boxes (N, 4)`` in xyxy, ``labels (N,)``, ``scores (N,)`` and, with masks,
                ``segmentation``, a list of N run lengths.
            targets: For every picture ``image_id``, ``boxes (M, 4)``, ``labels (M,)`` and, with masks, ``masks
                (M, H, W)``; ``iscrowd (M,)`` and ``area (M,)`` if known, as in COCO.
        """
        for prediction, target in zip(predictions, targets, strict=True):
            labels = target["labels"]
            columns = [
                _xywh(prediction["boxes"]),
                prediction["labels"],
                prediction["scores"],
                _xywh(target["boxes"]),
                labels,
                target.get("iscrowd", torch.zeros_like(labels)),
                target.get("area", torch.zeros(len(labels))),
            ]
            masks = [prediction["segmentation"], encode_masks(target["masks"])] if self.masks else []
            _append(self.records, _packed(int(target["image_id"]), columns, masks))

    def compute(self) -> dict[str, torch.Tensor]:
        """Compute the metrics of everything seen since the last reset.

        Returns:
            ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small``, ``box_ap_medium``, ``box_ap_large``, ``box_ar1``,
            ``box_ar10``, ``box_ar100``, ``box_ar_small``, ``box_ar_medium`` and ``box_ar_large`` (scalars in [0, 1],
            NaN where there is no object of that size), the same with ``mask_``, and, if asked for, ``box_ap_per_class``
            and ``mask_ap_per_class`` with the classes ``(K,)`` that they are for in ``classes``.
        """
        self._unpack()
        try:
            computed = super().compute()
        finally:
            for name in self.state_names():
                if name != "records":
                    setattr(self, name, [])
        result = {}
        for kind, prefix in (("box", "bbox_"), ("mask", "segm_")) if self.masks else (("box", ""),):
            for name, their_name in _NAMES.items():
                result[f"{kind}_{name}"] = _nan_if_absent(computed[prefix + their_name].reshape(()))
            if self.per_class:
                result[f"{kind}_ap_per_class"] = _ap_per_class(computed.get(f"{prefix}precision"))
        if self.per_class:
            result["classes"] = computed["classes"].reshape(-1)
        return result

    def _unpack(self) -> None:
        """Give the parent what it computes from: every picture once, in the order of ids, as COCO's tools count."""
        pictures = {number: (columns, masks) for number, columns, masks in map(_unpacked, _all_records(self.records))}
        lists: dict[str, list[Any]] = {name: [] for name in (*_COLUMNS, "detection_mask", "groundtruth_mask")}
        for number in sorted(pictures):
            columns, masks = pictures[number]
            for name, column in zip(_COLUMNS, columns, strict=True):
                lists[name].append(column)
            for name, rles in zip(("detection_mask", "groundtruth_mask"), masks, strict=False):
                lists[name].append(rles)
        for name, values in lists.items():
            setattr(self, name, values)

    def gather(self, process_group: Any) -> None:
        """Gather what all processes have collected; they may have different numbers of pictures."""
        records = [block[: _used(block)].clone() for block in self.records]
        self.records = [block for part in gathered(records, process_group) for block in part]


# --- what is kept of a picture --------------------------------------------------------------------------------------

# torchmetrics' names and the types of what there is per detection or object
_COLUMNS = {
    "detection_box": np.float32,
    "detection_labels": np.int64,
    "detection_scores": np.float32,
    "groundtruth_box": np.float32,
    "groundtruth_labels": np.int64,
    "groundtruth_crowds": np.int64,
    "groundtruth_area": np.float32,
}

_BLOCK = 1 << 20
_COUNTER = np.dtype(np.int64)


def _packed(number: int, columns: Sequence[torch.Tensor], masks: Sequence[Sequence[Rle]]) -> bytes:
    """Write a picture as bytes: id; every column with its number of rows; of every mask height, width, length, text."""
    parts: list[np.ndarray | bytes] = [np.array([number, len(masks)], np.int64)]
    for column, dtype in zip(columns, _COLUMNS.values(), strict=True):
        values = column.detach().cpu().numpy().astype(dtype)
        parts += [np.array([len(values)], np.int64), values]
    for rles in masks:
        texts = [rle["counts"].encode("ascii") for rle in rles]
        sizes = [(*rle["size"], len(text)) for rle, text in zip(rles, texts, strict=True)]
        parts += [np.array([len(rles)], np.int64), np.array(sizes, np.int64), *texts]
    return b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)


def _unpacked(record: bytes) -> tuple[int, list[torch.Tensor], list[tuple[Any, ...]]]:
    """Reverse `_packed`, with masks in the form in which torchmetrics keeps run lengths."""
    place = 0

    def take(dtype: Any, count: int) -> np.ndarray:
        nonlocal place
        values = np.frombuffer(record, dtype, count, place)
        place += values.nbytes
        return values.copy()

    number, kinds = take(np.int64, 2).tolist()
    columns = []
    for name, dtype in _COLUMNS.items():
        (rows,) = take(np.int64, 1).tolist()
        values = take(dtype, rows * 4).reshape(rows, 4) if name.endswith("_box") else take(dtype, rows)
        columns.append(torch.from_numpy(values))
    masks = []
    for _ in range(kinds):
        (rows,) = take(np.int64, 1).tolist()
        sizes = take(np.int64, 3 * rows).reshape(rows, 3).tolist()
        masks.append(tuple(((height, width), take(np.uint8, length).tobytes()) for height, width, length in sizes))
    return number, columns, masks


def _append(blocks: list[torch.Tensor], record: bytes) -> None:
    """Append a record, with its length before it, to the last block if there is room, else to a new one.

    Blocks begin with how many of their bytes are used, so that a copy of the list is all that needs to be kept.
    """
    entry = np.frombuffer(np.int64(len(record)).tobytes() + record, np.uint8)
    used = _used(blocks[-1]) if blocks else 0
    if not blocks or used + len(entry) > len(blocks[-1]):
        used = _COUNTER.itemsize
        blocks.append(torch.zeros(max(_BLOCK, used + len(entry)), dtype=torch.uint8))
    block = blocks[-1].numpy()
    block[used : used + len(entry)] = entry
    block[: _COUNTER.itemsize].view(np.int64)[0] = used + len(entry)


def _used(block: torch.Tensor) -> int:
    return int(block[: _COUNTER.itemsize].numpy().view(np.int64)[0])


def _all_records(blocks: Sequence[torch.Tensor]) -> Iterator[bytes]:
    for block in blocks:
        content, place = block.numpy(), _COUNTER.itemsize
        while place < _used(block):
            start = place + _COUNTER.itemsize
            place = start + int.from_bytes(content[place:start].tobytes(), sys.byteorder)
            yield content[start:place].tobytes()


def _xywh(boxes: torch.Tensor) -> torch.Tensor:
    return box_convert(boxes.float().cpu().reshape(-1, 4), "xyxy", "xywh")


def _nan_if_absent(value: torch.Tensor) -> torch.Tensor:
    """COCO's tools say -1 where there is nothing to measure."""
    return torch.where(value < 0, torch.nan, value.float())


def _ap_per_class(precision: torch.Tensor | None) -> torch.Tensor:
    """AP of every class from the precisions ``(T, R, K, A, M)``: of all areas (the first) and 100 detections (last)."""
    if precision is None:
        return torch.zeros(0)
    return torch.where(precision < 0, torch.nan, precision)[:, :, :, 0, -1].flatten(0, 1).nanmean(dim=0).float()
