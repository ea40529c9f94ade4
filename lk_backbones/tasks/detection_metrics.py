"""COCO's average precision and recall of boxes and masks, over all pictures and processes."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import distributed
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_convert

from lk_backbones.tasks.masks import Rle, encode_masks, require_coco_tools

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


class DetectionMetrics(MeanAveragePrecision):
    """torchmetrics' mean average precision, with masks as run lengths and pictures in the order of their ids.

    What it adds to its parent: masks may come as run lengths and never take the memory of a picture; every picture
    counts once, even if a distributed sampler repeats it; several processes, which may have different numbers of
    pictures, detections or objects, give the very numbers of one. Objects with ``iscrowd`` are ignored as COCO does:
    detections inside are neither right nor wrong.

    Args:
        masks: Whether to measure masks too.
        per_class: Whether to give the AP of every class.
        backend: ``"faster_coco_eval"`` or ``"pycocotools"``; ``None`` for the first if it is installed.
        **kwargs: As every torchmetrics metric.

    Raises:
        ModuleNotFoundError: If neither is installed.
    """

    image_ids: list[torch.Tensor]
    detection_box: list[torch.Tensor]
    detection_mask: list[Any]
    detection_scores: list[torch.Tensor]
    detection_labels: list[torch.Tensor]
    groundtruth_box: list[torch.Tensor]
    groundtruth_mask: list[Any]
    groundtruth_labels: list[torch.Tensor]
    groundtruth_crowds: list[torch.Tensor]
    groundtruth_area: list[torch.Tensor]

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
        self.add_state("image_ids", default=[], dist_reduce_fx=None)

    def update(self, predictions: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]]) -> None:
        """Add pictures.

        Args:
            predictions: For every picture ``boxes (N, 4)`` in xyxy, ``labels (N,)``, ``scores (N,)`` and, with masks,
                ``segmentation``, a list of N run lengths.
            targets: For every picture ``image_id``, ``boxes (M, 4)``, ``labels (M,)`` and, with masks, ``masks
                (M, H, W)``; ``iscrowd (M,)`` and ``area (M,)`` if known, as in COCO.
        """
        for prediction, target in zip(predictions, targets, strict=True):
            self.image_ids.append(torch.tensor(int(target["image_id"])))
            self.detection_box.append(_xywh(prediction["boxes"]))
            self.detection_labels.append(prediction["labels"].cpu())
            self.detection_scores.append(prediction["scores"].float().cpu())
            boxes, labels = _xywh(target["boxes"]), target["labels"].cpu()
            self.groundtruth_box.append(boxes)
            self.groundtruth_labels.append(labels)
            self.groundtruth_crowds.append(target.get("iscrowd", torch.zeros_like(labels)).cpu())
            self.groundtruth_area.append(target.get("area", torch.zeros(len(labels))).float().cpu())
            if self.masks:
                self.detection_mask.append(_pairs(prediction["segmentation"]))
                self.groundtruth_mask.append(_pairs(encode_masks(target["masks"])))

    def compute(self) -> dict[str, torch.Tensor]:
        """Compute the metrics of everything seen since the last reset.

        Returns:
            ``box_ap``, ``box_ap50``, ``box_ap75``, ``box_ap_small``, ``box_ap_medium``, ``box_ap_large``, ``box_ar1``,
            ``box_ar10``, ``box_ar100``, ``box_ar_small``, ``box_ar_medium`` and ``box_ar_large`` (scalars in [0, 1],
            NaN where there is no object of that size), the same with ``mask_``, and, if asked for, ``box_ap_per_class``
            and ``mask_ap_per_class`` with the classes ``(K,)`` that they are for in ``classes``.
        """
        self._sort()
        computed = super().compute()
        result = {}
        for kind, prefix in (("box", "bbox_"), ("mask", "segm_")) if self.masks else (("box", ""),):
            for name, their_name in _NAMES.items():
                result[f"{kind}_{name}"] = _nan_if_absent(computed[prefix + their_name].reshape(()))
            if self.per_class:
                result[f"{kind}_ap_per_class"] = _ap_per_class(computed.get(f"{prefix}precision"))
        if self.per_class:
            result["classes"] = computed["classes"].reshape(-1)
        return result

    def _sort(self) -> None:
        """Put the pictures into the order of their ids, in which COCO's tools count them, each once."""
        places = {int(number): place for place, number in enumerate(self.image_ids)}
        order = [places[number] for number in sorted(places)]
        for name in self._defaults:
            state = getattr(self, name)
            if state:
                setattr(self, name, [state[place] for place in order])

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        """Leave what was collected on the CPU, whatever device the rest moves to."""
        return torch.nn.Module._apply(self, fn)

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Gather what all processes have collected; they may have different numbers of pictures."""
        states = {name: getattr(self, name) for name in self._defaults}
        gathered: list[Any] = [None] * distributed.get_world_size(process_group)
        distributed.all_gather_object(gathered, states, group=process_group)
        for name in states:
            setattr(self, name, [item for part in gathered for item in part[name]])


def _xywh(boxes: torch.Tensor) -> torch.Tensor:
    return box_convert(boxes.float().cpu().reshape(-1, 4), "xyxy", "xywh")


def _pairs(masks: Sequence[Rle]) -> tuple[tuple[tuple[int, int], bytes], ...]:
    """The form in which torchmetrics keeps run lengths."""
    return tuple(((mask["size"][0], mask["size"][1]), mask["counts"].encode("ascii")) for mask in masks)


def _nan_if_absent(value: torch.Tensor) -> torch.Tensor:
    """COCO's tools say -1 where there is nothing to measure."""
    return torch.where(value < 0, torch.nan, value.float())


def _ap_per_class(precision: torch.Tensor | None) -> torch.Tensor:
    """AP of every class from the precisions ``(T, R, K, A, M)``: of all areas (the first) and 100 detections (last)."""
    if precision is None:
        return torch.zeros(0)
    return torch.where(precision < 0, torch.nan, precision)[:, :, :, 0, -1].flatten(0, 1).nanmean(dim=0).float()
