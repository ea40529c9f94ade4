"""One stage of a cascade: torchvision's RoI heads with the published losses.

Source: Cai and Vasconcelos, "Cascade R-CNN: High Quality Object Detection and Instance Segmentation" (TPAMI 2019), in
OpenMMLab's form: a GIoU loss between decoded boxes, and mask targets cut out with an aligned RoIAlign.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss, roi_align

from lk_backbones.heads.regions import BoxCoder

__all__ = ["BOX_LOSSES", "CascadeStage", "Samples", "mask_targets"]

BOX_LOSSES = ("giou", "smooth_l1")


class Samples(NamedTuple):
    """Regions that a stage is trained on, one entry per image.

    Attributes:
        boxes: Regions ``(N, 4)``.
        matched: Index of each region's object ``(N,)``.
        labels: Class of each region ``(N,)``, 0 for background.
        added: Whether a region is an object's own box ``(N,)``.
    """

    boxes: list[torch.Tensor]
    matched: list[torch.Tensor]
    labels: list[torch.Tensor]
    added: list[torch.Tensor]


class CascadeStage(RoIHeads):
    """One stage: torchvision's RoI heads, whose parts `CascadeRoIHeads` calls one by one.

    Args:
        iou_thresh: IoU with an object from which a region is positive.
        box_stds: Deviations of ``(dx, dy, dw, dh)``.
        box_loss: ``"giou"`` between decoded boxes, or ``"smooth_l1"`` between deltas as in torchvision.
        box_loss_weight: Factor of the box loss.
        **kwargs: As torchvision's `RoIHeads`, without thresholds and weights for the above.
    """

    def __init__(
        self, *, iou_thresh: float, box_stds: Sequence[float], box_loss: str, box_loss_weight: float, **kwargs: Any
    ) -> None:
        super().__init__(fg_iou_thresh=iou_thresh, bg_iou_thresh=iou_thresh, bbox_reg_weights=None, **kwargs)
        self.box_coder = BoxCoder([1 / std for std in box_stds])
        self.box_loss = box_loss
        self.box_loss_weight = box_loss_weight

    def sample(self, proposals: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]) -> Samples:
        """Choose regions to train on, from the proposals and the objects' own boxes."""
        truth = [target["boxes"].to(p.dtype) for p, target in zip(proposals, targets, strict=True)]
        candidates = self.add_gt_proposals(proposals, truth)
        matched, labels = self.assign_targets_to_proposals(candidates, truth, [t["labels"] for t in targets])
        chosen = self.subsample(labels)
        return Samples(
            [c[i] for c, i in zip(candidates, chosen, strict=True)],
            [m[i] for m, i in zip(matched, chosen, strict=True)],
            [label[i] for label, i in zip(labels, chosen, strict=True)],
            [i >= len(p) for p, i in zip(proposals, chosen, strict=True)],
        )

    def predict(
        self, features: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits ``(N, C + 1)`` and box deltas ``(N, 4 (C + 1))`` of the regions of all images."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))

    def refine(
        self,
        deltas: torch.Tensor,
        labels: torch.Tensor,
        boxes: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[torch.Tensor]:
        """Move regions by the deltas of one class each and clip them to their image."""
        moved = self.box_coder.decode_single(_of_class(deltas, labels), torch.cat(boxes))
        parts = moved.split([len(b) for b in boxes])
        return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes, strict=True)]

    def box_losses(
        self, logits: torch.Tensor, deltas: torch.Tensor, samples: Samples, targets: list[dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Cross entropy of the classes and the box loss of the positive regions, both per sampled region."""
        labels, boxes = torch.cat(samples.labels), torch.cat(samples.boxes)
        count = max(len(labels), 1)
        (positive,) = torch.where(labels > 0)
        truth = torch.cat(
            [t["boxes"][m[label > 0]] for t, m, label in zip(targets, samples.matched, samples.labels, strict=True)]
        ).to(boxes.dtype)
        codes = _of_class(deltas[positive], labels[positive])
        if self.box_loss == "giou":
            moved = self.box_coder.decode_single(codes, boxes[positive])
            box_loss = generalized_box_iou_loss(moved, truth, reduction="sum")
        else:
            wanted = self.box_coder.encode_single(truth, boxes[positive])
            box_loss = F.smooth_l1_loss(codes, wanted, reduction="sum", beta=1 / 9)
        return {
            "loss_classifier": F.cross_entropy(logits, labels, reduction="sum") / count,
            "loss_box_reg": box_loss / count * self.box_loss_weight,
        }

    def mask_losses(
        self,
        features: dict[str, torch.Tensor],
        samples: Samples,
        targets: list[dict[str, torch.Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> dict[str, torch.Tensor]:
        """Binary cross entropy of the masks of the positive regions, each for its own class."""
        positive = [labels > 0 for labels in samples.labels]
        boxes = [b[p] for b, p in zip(samples.boxes, positive, strict=True)]
        matched = [m[p] for m, p in zip(samples.matched, positive, strict=True)]
        labels = torch.cat([label[p] for label, p in zip(samples.labels, positive, strict=True)])
        logits = self.mask_logits(self.mask_roi_pool(features, boxes, image_shapes))
        logits = logits[torch.arange(len(labels), device=labels.device), labels]
        wanted = torch.cat(
            [
                mask_targets(target["masks"], b, m, logits.shape[-1])
                for target, b, m in zip(targets, boxes, matched, strict=True)
            ]
        ).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        return {"loss_mask": loss / max(logits.numel(), 1)}

    def mask_logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """Mask logits ``(N, C + 1, 28, 28)`` of pooled regions."""
        return self.mask_predictor(self.mask_head(pooled))


def mask_targets(masks: torch.Tensor, boxes: torch.Tensor, matched: torch.Tensor, size: int) -> torch.Tensor:
    """Cut the masks of objects out of regions.

    Args:
        masks: Masks of an image's objects ``(M, H, W)``, 0 or 1.
        boxes: Regions ``(N, 4)`` in xyxy pixels.
        matched: Object of each region ``(N,)``.
        size: Height and width of a cut-out.

    Returns:
        ``(N, size, size)`` bool.
    """
    regions = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
    return roi_align(masks[:, None].to(boxes.dtype), regions, size, sampling_ratio=0, aligned=True)[:, 0] >= 0.5


def _of_class(deltas: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Pick one class from the deltas of every region: ``(N, 4 K)`` and ``(N,)`` to ``(N, 4)``."""
    by_class = deltas.unflatten(1, (deltas.shape[1] // 4, 4))
    return by_class[torch.arange(len(labels), device=labels.device), labels]
