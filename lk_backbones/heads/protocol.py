"""What every detector here has in common, on top of torchvision's protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lk_backbones._private.torch import tree_map

__all__ = ["Detector", "FullPrecisionOutputs", "to_full_precision"]


class Detector(nn.Module):
    """Mixin for torchvision's detectors: one way to count labels, and errors that say what is wrong.

    Labels of targets and detections are 1 to ``num_classes``; 0 is the background. torchvision's dense detectors count
    from 0 inside.

    Attributes:
        num_classes: Number of classes, without background.
        first_label: What the network underneath calls the first class.
        needs_masks: Whether targets must have masks.
    """

    num_classes: int
    transform: GeneralizedRCNNTransform
    first_label = 1
    needs_masks = False

    def forward(self, images: list[torch.Tensor], targets: list[dict[str, torch.Tensor]] | None = None) -> Any:
        """Compute losses in training mode, detections otherwise.

        Args:
            images: Pictures ``(C, H, W)`` in [0, 1], which may differ in size.
            targets: For every image ``boxes (N, 4)`` in xyxy pixels, ``labels (N,)`` int64 from 1 to ``num_classes``
                and, for models with masks, ``masks (N, H, W)`` of 0 and 1. N may be 0. Needed in training mode only.

        Returns:
            In training mode every loss by its name, each a scalar; their sum is to be minimised. Otherwise for every
            image ``boxes (N, 4)``, ``labels (N,)``, ``scores (N,)``, best first, and, for models with masks,
            ``masks (N, 1, H, W)`` in [0, 1], all at the size of the given image.

        Raises:
            ValueError: If images or targets do not fit the model.
        """
        channels = len(self.transform.image_mean)
        for i, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != channels:
                raise ValueError(f"images[{i}] has shape {tuple(image.shape)}, expected ({channels}, H, W)")
        if self.training:
            self._check(images, targets)
        shift = 1 - self.first_label
        if targets is not None and shift:
            targets = [{**target, "labels": target["labels"] - shift} for target in targets]
        result = super().forward(images, targets)
        if shift and not self.training:
            result = [{**detection, "labels": detection["labels"] + shift} for detection in result]
        return result

    def _check(self, images: Sequence[torch.Tensor], targets: Sequence[dict[str, torch.Tensor]] | None) -> None:
        if targets is None or len(targets) != len(images):
            raise ValueError(
                f"training needs one target for every image, got {len(images)} images and "
                f"{'no' if targets is None else len(targets)} targets"
            )
        for i, (image, target) in enumerate(zip(images, targets, strict=True)):
            names = ("boxes", "labels", "masks") if self.needs_masks else ("boxes", "labels")
            for name in names:
                if name not in target:
                    raise ValueError(f"targets[{i}] has no '{name}', only {sorted(target)}")
            count = len(target["boxes"])
            if target["labels"].shape != (count,) or target["boxes"].shape != (count, 4):
                raise ValueError(
                    f"targets[{i}] has boxes {tuple(target['boxes'].shape)} and labels "
                    f"{tuple(target['labels'].shape)}, expected (N, 4) and (N,)"
                )
            if self.needs_masks and target["masks"].shape != (count, *image.shape[1:]):
                raise ValueError(
                    f"targets[{i}] has masks {tuple(target['masks'].shape)}, expected {(count, *image.shape[1:])}"
                )
        labels = torch.cat([target["labels"] for target in targets])
        if len(labels) and not (labels.min() >= 1 and labels.max() <= self.num_classes):
            raise ValueError(
                f"labels must be 1 to {self.num_classes} (0 is the background), got {int(labels.min())} to "
                f"{int(labels.max())}"
            )

    def openmmlab_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename everything but the backbone of an OpenMMLab detector to the keys of this one.

        Args:
            state_dict: Keys ``neck.*``, ``rpn_head.*``, ``roi_head.*`` and ``bbox_head.*``.

        Returns:
            State dict of everything in the detector but ``backbone.encoder.*``.

        Raises:
            ValueError: If no weights were published for this architecture.
            KeyError: If a key belongs to no part of the published detector.
        """
        raise ValueError(
            f"weights are published for Cascade R-CNN and FCOS only, not for {type(self).__name__.removeprefix('_')}"
        )


class FullPrecisionOutputs(nn.Module):
    """Mixin: under autocast, what the module returns is float32.

    torchvision computes boxes in the dtype of the network's outputs. bfloat16 has 8 significant bits, so that an edge
    at pixel 1000 would be off by up to 2 pixels.
    """

    def forward(self, *args: Any) -> Any:
        """Call the module itself and convert half-precision tensors of its result."""
        return tree_map(to_full_precision, super().forward(*args))


def to_full_precision(value: Any) -> Any:
    """Convert a tensor in half precision to float32; leave anything else alone."""
    if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value
