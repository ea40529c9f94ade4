"""Published OpenMMLab models (UPerNet, Cascade Mask R-CNN and FCOS on large-kernel backbones) in our tasks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lk_backbones.encoders._names import timm_model, translate

__all__ = ["openmmlab_encoder", "openmmlab_state_dict"]


def openmmlab_state_dict(task: Any, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename an OpenMMLab checkpoint of a whole model to the keys of a task.

    The heads are renamed as `lk_backbones.weights.openmmlab` knows them, the backbone by its own family's
    ``checkpoint_filter_fn``::

        task = SegmentationTask("upernet_openmmlab", "replknet_31b", num_classes=150, auxiliary_weight=0.4)
        checkpoint = torch.load("published.pth", map_location="cpu", weights_only=True)
        task.load_state_dict(openmmlab_state_dict(task, checkpoint["state_dict"]))

    `lk_backbones.hub.load_weights` does the same with a report, from any source.

    Args:
        task: For `SegmentationTask`: with the architecture ``upernet_openmmlab`` on a timm encoder; with an auxiliary
            head, as published, or without one, whose keys are then left out. For `DetectionTask`: a cascade, with masks
            or, leaving out the published ones, without, or ``fcos``.
        state_dict: Keys ``backbone.*`` and those of the heads, such as ``decode_head.*`` and ``auxiliary_head.*``, or
            ``neck.*``, ``rpn_head.*`` and ``roi_head.*``.

    Returns:
        State dict for ``task.load_state_dict``, which reports whatever does not fit. No other key is dropped.

    Raises:
        TypeError: If no conversion is known for this kind of task.
        ValueError: If the encoder is not a timm model, or the detector is one that nobody published.
        KeyError: If a key belongs to none of the model's parts, or to no head that is known.
    """
    answer = getattr(task, "openmmlab_state_dict", None)
    if answer is None:
        raise TypeError(f"no OpenMMLab model is known that would fit into a {type(task).__name__}")
    renamed: dict[str, torch.Tensor] = answer(state_dict)
    return renamed


def openmmlab_encoder(
    encoder: nn.Module, kwargs: dict[str, Any] | None, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename the backbone of an OpenMMLab model to the keys of a task's encoder.

    Args:
        encoder: The encoder.
        kwargs: The keyword arguments it was built with.
        state_dict: Keys ``backbone.*``.

    Returns:
        State dict for the encoder.

    Raises:
        ValueError: If the encoder is not a timm model.
    """
    return translate(state_dict, encoder, timm_model(encoder, kwargs or {}))
