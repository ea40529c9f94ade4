"""Published OpenMMLab segmentation checkpoints (UPerNet on a RepLKNet, and their like) in a `SegmentationTask`."""

from collections.abc import Mapping
from importlib import import_module

import torch

from lk_backbones.heads.upernet import checkpoint_filter_fn
from lk_backbones.tasks.encoder import timm_model, timm_names
from lk_backbones.tasks.segmentation import SegmentationTask

__all__ = ["openmmlab_state_dict"]


def openmmlab_state_dict(task: SegmentationTask, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename an OpenMMLab segmentation checkpoint to the keys of a task.

    The heads are renamed by `lk_backbones.heads.upernet`, the backbone by its own family's ``checkpoint_filter_fn``::

        task = SegmentationTask("upernet_openmmlab", "replknet_31b", num_classes=150, auxiliary_weight=0.4)
        checkpoint = torch.load("published.pth", map_location="cpu", weights_only=True)
        task.load_state_dict(openmmlab_state_dict(task, checkpoint["state_dict"]))

    Args:
        task: A task with the architecture ``upernet_openmmlab`` on a timm encoder; with an auxiliary head, as
            published, or without one, whose keys are then left out.
        state_dict: Keys ``backbone.*``, ``decode_head.*`` and ``auxiliary_head.*``.

    Returns:
        State dict for ``task.load_state_dict``, which reports whatever does not fit. No other key is dropped.

    Raises:
        ValueError: If the encoder is not a timm model.
        KeyError: If a key belongs to none of the three parts, or to no head of OpenMMLab's UPerNet.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {"backbone": {}, "decode_head": {}, "auxiliary_head": {}}
    for key, value in state_dict.items():
        part = key.partition(".")[0]
        if part not in parts:
            raise KeyError(f"'{key}' is in no part of an OpenMMLab segmentation model: {', '.join(parts)}")
        parts[part][key] = value

    renamed = {f"model.{key}": value for key, value in checkpoint_filter_fn(parts["decode_head"]).items()}
    if task.auxiliary_head is not None:
        renamed |= checkpoint_filter_fn(parts["auxiliary_head"])
    full = timm_model(task.encoder, task.hparams["encoder_kwargs"] or {})
    backbone = {key.removeprefix("backbone."): value for key, value in parts["backbone"].items()}
    family_filter = getattr(import_module(type(full).__module__), "checkpoint_filter_fn", None)
    if family_filter is not None:
        backbone = family_filter(backbone, full)
    names = {full_name: name for name, full_name in timm_names(task.encoder, full).items()}
    return renamed | {f"model.encoder.{names.get(key, key)}": value for key, value in backbone.items()}
