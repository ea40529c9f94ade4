"""Back to plain ``nn.Conv2d`` and ``nn.Linear``, for whatever tells a layer by its class."""

from __future__ import annotations

from typing import TypeVar, cast

import torch.nn as nn

from lk_backbones.layers.depthwise import DepthwiseConv2d
from lk_backbones.layers.packed import unpack_inside
from lk_backbones.layers.pointwise import PointwiseConv2d

__all__ = ["restore_conv2d"]

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def restore_conv2d(model: ModuleType) -> ModuleType:
    """Make every convolution of this package inside ``model`` a plain ``nn.Conv2d``, and ``nn.Linear`` alike, in place.

    The inverse of `replace_depthwise` and of the packing (not of the folding) by
    `lk_backbones.prepack_weights`. Quantisers, counters of FLOPs, attribution and pruning often ask whether
    ``type(module) is nn.Conv2d``; they take the result as any other model. Parameters, hooks, state dict and outputs
    stay the same, but large kernels are then as slow as PyTorch computes them.

    Subclasses of our layers are left alone, as their forward may differ: a `PeripheralDepthwiseConv2d`, whose taps
    share weights, becomes a plain convolution by `lk_backbones.reparameterize`. A `PackedConv2d` or `PackedLinear` with
    an activation of its own, which only code outside this package makes, becomes ``nn.Sequential(layer, activation)``,
    which puts ``0.`` into the names of its parameters.

    Args:
        model: Any module.

    Returns:
        ``model``; the ``nn.Sequential`` if it is such a layer itself.
    """
    followed = {layer: nn.Sequential(layer, act).train(layer.training) for layer, act in unpack_inside(model).items()}
    for module in model.modules():
        if type(module) in (DepthwiseConv2d, PointwiseConv2d):
            # The class alone is what differs; a new module would lose hooks and whatever refers to the old one.
            module.__class__ = nn.Conv2d
    for path, child in list(model.named_modules(remove_duplicate=False)):  # a layer may be in several places
        if path and child in followed:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, followed[child])
    return cast(ModuleType, followed.get(model, model))
