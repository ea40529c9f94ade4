"""Back to plain ``nn.Conv2d``, for whatever tells a convolution by its class."""

from __future__ import annotations

from typing import TypeVar, cast

import torch.nn as nn

from lk_backbones.layers.depthwise import DepthwiseConv2d
from lk_backbones.layers.packed import unpack
from lk_backbones.layers.pointwise import PointwiseConv2d
from lk_backbones.layers.reparam import ConvNorm

__all__ = ["restore_conv2d"]

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def restore_conv2d(model: ModuleType) -> ModuleType:
    """Make every convolution of this package inside ``model`` a plain ``nn.Conv2d``, in place.

    The inverse of `replace_depthwise` and of the packing (not of the folding) by
    `lk_backbones.prepack_weights`. Quantisers, counters of FLOPs, attribution and pruning often ask whether
    ``type(module) is nn.Conv2d``; they take the result as any other model. Parameters, hooks, state dict and outputs
    stay the same, but large kernels are then as slow as PyTorch computes them.

    Subclasses of our layers are left alone, as their forward may differ. A
    `PackedConv2d` with an activation of its own, which only code outside this package
    makes, becomes ``nn.Sequential(convolution, activation)``, which puts ``0.`` into the names of its parameters.

    Args:
        model: Any module.

    Returns:
        ``model``; the ``nn.Sequential`` if it is such a layer itself.
    """
    followed: dict[nn.Module, nn.Sequential] = {}
    for module in list(model.modules()):
        if isinstance(module, ConvNorm):
            module.unpack()  # before its convolution's turn comes: it has a place for the activation
        act = unpack(module)
        if not isinstance(act, nn.Identity):
            followed[module] = nn.Sequential(module, act).train(module.training)
        if type(module) in (DepthwiseConv2d, PointwiseConv2d):
            # The class alone is what differs; a new module would lose hooks and whatever refers to the old one.
            module.__class__ = nn.Conv2d
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # named_children() omits repetitions
            if child in followed:
                setattr(module, name, followed[child])
    return cast(ModuleType, followed.get(model, model))
