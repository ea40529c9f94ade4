"""The training losses of segmentation: smp's, and sums of them, with ignored pixels left out of every term."""

from collections.abc import Sequence

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import nn

from lk_backbones.tasks.encoder import nearest

__all__ = ["LOSSES", "CrossEntropyLoss", "SegmentationLoss", "parse_loss"]

LOSSES = ("ce", "dice", "focal", "lovasz")
# torch.nn.functional.cross_entropy needs a number for "nothing is ignored"
_NO_IGNORE = -100


def parse_loss(loss: str | Sequence[str]) -> list[str]:
    """Split ``"ce+dice"`` or check ``["ce", "dice"]``.

    Raises:
        ValueError: If a name is unknown or given twice.
    """
    names = [name.strip().lower() for name in (loss.split("+") if isinstance(loss, str) else loss)]
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"unknown loss '{name}', choose from {', '.join(LOSSES)}{nearest(name, LOSSES)}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"loss={loss!r} must name at least one loss, and each only once")
    return names


class CrossEntropyLoss(nn.Module):
    """Cross-entropy averaged over the pixels that count, by class weight; 0 if all pixels are ignored.

    (smp's ``SoftCrossEntropyLoss`` takes no class weights; torch's gives NaN when a crop holds ignored pixels only.)
    """

    weight: torch.Tensor | None

    def __init__(self, weight: torch.Tensor | None, ignore_index: int | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = _NO_IGNORE if ignore_index is None else ignore_index

    def forward(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compare float32 logits ``(N, C, H, W)`` with int64 labels ``(N, H, W)``; returns a scalar."""
        total = F.cross_entropy(logits, mask, self.weight, ignore_index=self.ignore_index, reduction="sum")
        counted = mask != self.ignore_index
        if self.weight is None:
            norm = counted.sum()
        else:
            norm = (self.weight[torch.where(counted, mask, 0)] * counted).sum()
        return total / norm.clamp(min=torch.finfo(torch.float32).eps)


class SegmentationLoss(nn.Module):
    """The sum of one or more losses.

    Args:
        loss: ``"ce"``, ``"dice"``, ``"focal"``, ``"lovasz"``, several of them as a list or joined by ``+``.
        num_classes: Number of classes.
        class_weights: Weight of every class, for ``ce`` only.
        ignore_index: Label of pixels that do not count, or ``None``.

    Raises:
        ValueError: If a name is unknown, or the class weights are not ``num_classes`` numbers or meet a loss that
            cannot use them.
    """

    def __init__(
        self,
        loss: str | Sequence[str],
        num_classes: int,
        class_weights: Sequence[float] | None = None,
        ignore_index: int | None = 255,
    ) -> None:
        super().__init__()
        names = parse_loss(loss)
        weight = None
        if class_weights is not None:
            if len(class_weights) != num_classes or min(class_weights) < 0:
                raise ValueError(
                    f"class_weights must be {num_classes} non-negative numbers, one per class, got {class_weights}"
                )
            if "ce" not in names:
                raise ValueError(f"class_weights are used by the loss 'ce' only, not by {'+'.join(names)}")
            weight = torch.tensor(class_weights, dtype=torch.float32)
        mode = smp.losses.MULTICLASS_MODE
        makers = {
            "ce": lambda: CrossEntropyLoss(weight, ignore_index),
            "dice": lambda: smp.losses.DiceLoss(mode, ignore_index=ignore_index),
            "focal": lambda: smp.losses.FocalLoss(mode, ignore_index=ignore_index),
            "lovasz": lambda: smp.losses.LovaszLoss(mode, ignore_index=ignore_index),
        }
        self.terms = nn.ModuleDict({name: makers[name]() for name in names})
        self.ignore_index = ignore_index

    def forward(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compare logits with labels.

        Args:
            logits: ``(N, num_classes, H, W)``; computed in float32 whatever the precision.
            mask: int64 ``(N, H, W)``.

        Returns:
            A scalar; 0, with zero gradients, if every pixel is ignored.
        """
        logits, mask = logits.float().contiguous(), mask.contiguous()  # smp 0.5 views them flat
        loss = torch.zeros((), device=logits.device)
        for name, term in self.terms.items():
            # focal and Lovász losses select pixels by a mask and would average over nothing
            if name in ("focal", "lovasz") and self.ignore_index is not None and (mask == self.ignore_index).all():
                loss = loss + 0 * logits.sum()
            else:
                loss = loss + term(logits, mask)
        return loss
