"""torchvision's prediction layers with float32 outputs under autocast, for every detector here."""

import torch
from torch import nn
from torchvision.models.detection import faster_rcnn, mask_rcnn, retinanet, rpn

from lk_backbones.heads.protocol import FullPrecisionOutputs

__all__ = ["BoxPredictor", "MaskPredictor", "RPNHead", "RetinaNetHead"]


class RPNHead(FullPrecisionOutputs, rpn.RPNHead):
    """Objectness and box deltas of every anchor."""


class MaskPredictor(FullPrecisionOutputs, mask_rcnn.MaskRCNNPredictor):
    """Mask logits of every class, background included: ``(N, num_classes + 1, 28, 28)``."""


class RetinaNetHead(FullPrecisionOutputs, retinanet.RetinaNetHead):
    """Class logits and box deltas of every anchor."""


class _BoxPredictor(faster_rcnn.FastRCNNPredictor):
    def __init__(self, in_channels: int, num_classes: int, class_agnostic: bool = False) -> None:
        super().__init__(in_channels, num_classes)
        self.class_agnostic = class_agnostic
        if class_agnostic:
            self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores, deltas = super().forward(x)
        return scores, deltas.repeat(1, scores.shape[1]) if self.class_agnostic else deltas


class BoxPredictor(FullPrecisionOutputs, _BoxPredictor):
    """Class logits and box deltas of every region, background included.

    Args:
        in_channels: Length of a region's feature vector.
        num_classes: Number of classes, with background, which comes first.
        class_agnostic: Whether all classes share one set of deltas. The output's shape is the same.
    """
