"""Published OpenMMLab models (UPerNet, Cascade Mask R-CNN and FCOS on large-kernel backbones) in our tasks.

`openmmlab_state_dict` is one function for all tasks: each kind of task registers its own conversion with it.
"""

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import nn

from lk_backbones.encoders._loading import is_dense_model
from lk_backbones.encoders._names import family_filter, timm_model, timm_names
from lk_backbones.heads.detection import published_state_dict
from lk_backbones.heads.upernet import checkpoint_filter_fn
from lk_backbones.tasks.detection import DetectionTask
from lk_backbones.tasks.segmentation import SegmentationTask
from lk_backbones.weights.origins import follow

__all__ = ["detector_arguments", "openmmlab_encoder", "openmmlab_state_dict", "unused_keys", "upernet_arguments"]


@singledispatch
def openmmlab_state_dict(task: Any, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename an OpenMMLab checkpoint of a whole model to the keys of a task.

    The heads are renamed by their modules, the backbone by its own family's ``checkpoint_filter_fn``::

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
    raise TypeError(f"no OpenMMLab model is known that would fit into a {type(task).__name__}")


@openmmlab_state_dict.register
def _(task: SegmentationTask, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts: dict[str, dict[str, torch.Tensor]] = {"backbone": {}, "decode_head": {}, "auxiliary_head": {}}
    for key, value in state_dict.items():
        part = key.partition(".")[0]
        if part not in parts:
            raise KeyError(f"'{key}' is in no part of an OpenMMLab segmentation model: {', '.join(parts)}")
        parts[part][key] = value

    renamed = {f"model.{key}": value for key, value in checkpoint_filter_fn(parts["decode_head"]).items()}
    if task.auxiliary_head is not None:
        renamed |= checkpoint_filter_fn(parts["auxiliary_head"])
    encoder = openmmlab_encoder(task.encoder, task.hparams["encoder_kwargs"] or {}, parts["backbone"])
    return renamed | {f"model.encoder.{key}": value for key, value in encoder.items()}


@openmmlab_state_dict.register
def _(task: DetectionTask, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    backbone = {key: value for key, value in state_dict.items() if key.startswith("backbone.")}
    others = {key: value for key, value in state_dict.items() if key not in backbone}
    encoder = openmmlab_encoder(task.encoder, task.hparams["encoder_kwargs"] or {}, backbone)
    renamed = {f"model.{key}": value for key, value in published_state_dict(task.model, others).items()}
    return renamed | {f"model.backbone.encoder.{key}": value for key, value in encoder.items()}


def unused_keys(
    task: nn.Module, state_dict: Mapping[str, torch.Tensor], renamed: Mapping[str, torch.Tensor]
) -> list[str]:
    """Keys of a checkpoint that are in nothing that was made of it.

    Args:
        task: What the checkpoint goes into.
        state_dict: The checkpoint.
        renamed: The same by the names of ``task``.

    Returns:
        The keys.
    """
    if is_dense_model(dict(state_dict)):
        _, origins = follow(lambda named: openmmlab_state_dict(task, named), state_dict)
        used = {key for keys in origins.values() for key in keys}
    else:  # only renamed
        kept = {id(value) for value in renamed.values()}
        used = {key for key, value in state_dict.items() if id(value) in kept}
    return [key for key in state_dict if key not in used]


def openmmlab_encoder(
    encoder: nn.Module, kwargs: dict[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename the backbone of an OpenMMLab model to the keys of an smp ``tu-`` encoder.

    Args:
        encoder: The encoder.
        kwargs: The keyword arguments it was built with.
        state_dict: Keys ``backbone.*``.

    Returns:
        State dict for the encoder.

    Raises:
        ValueError: If the encoder is not a timm model.
    """
    full = timm_model(encoder, kwargs)
    backbone = family_filter(full)({key.removeprefix("backbone."): value for key, value in state_dict.items()}, full)
    names = {full_name: name for name, full_name in timm_names(encoder, full).items()}
    return {names.get(key, key): value for key, value in backbone.items()}


def upernet_arguments(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What a published UPerNet checkpoint tells of the task that it fits into, beside the encoder.

    Args:
        state_dict: Keys ``decode_head.*`` and perhaps ``auxiliary_head.*``.

    Returns:
        Arguments of `SegmentationTask`. How interpolations treat the borders (``align_corners``) leaves no trace in the
        weights: it is ``True`` in the published Cityscapes models, hence for 19 classes.

    Raises:
        KeyError: If there is no ``decode_head`` of UPerNet.
    """
    num_classes = len(state_dict["decode_head.conv_seg.weight"])
    arguments: dict[str, Any] = {
        "architecture": "upernet_openmmlab",
        "num_classes": num_classes,
        "architecture_kwargs": {
            "decoder_channels": len(state_dict["decode_head.fpn_bottleneck.conv.weight"]),
            "align_corners": num_classes == 19,
        },
    }
    if "auxiliary_head.convs.0.conv.weight" in state_dict:
        arguments["auxiliary_weight"] = 0.4
        arguments["auxiliary_channels"] = len(state_dict["auxiliary_head.convs.0.conv.weight"])
    return arguments


def detector_arguments(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What a published detector's checkpoint tells of the task that it fits into, beside the encoder.

    Args:
        state_dict: Keys ``roi_head.*`` of a cascade, or ``bbox_head.*`` of FCOS.

    Returns:
        Arguments of `DetectionTask`.

    Raises:
        KeyError: If there is neither.
    """
    if "bbox_head.conv_cls.weight" in state_dict:
        return {"architecture": "fcos", "num_classes": len(state_dict["bbox_head.conv_cls.weight"])}
    with_masks = any(key.startswith("roi_head.mask_head.") for key in state_dict)
    return {
        "architecture": "cascade_mask_rcnn" if with_masks else "cascade_rcnn",
        "num_classes": len(state_dict["roi_head.bbox_head.0.fc_cls.weight"]) - 1,  # without the background
    }
