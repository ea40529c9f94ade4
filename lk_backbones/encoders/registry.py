"""The one list of our encoders: timm's registry, without overwriting a name that timm already owns."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

import torch.nn as nn
from timm.models import is_model, register_model, register_notrace_module

from lk_backbones.layers import DepthwiseConv2d, InputConvNorm, PointwiseConv2d

__all__ = ["list_encoders", "register_encoder"]

# timm's graph tracing takes each of these as one node, as it does torch's own convolution.
for _layer in (DepthwiseConv2d, PointwiseConv2d, InputConvNorm):
    register_notrace_module(_layer)

_ENCODERS: list[str] = []


def register_encoder(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register ``entrypoint`` with timm under its own name, unless timm already has a model of that name.

    Use as a decorator, in place of timm's ``register_model``. timm would overwrite its own model and warn; a user who
    asks for a timm name must get timm's model.

    Args:
        entrypoint: Function ``name(pretrained=False, **kwargs) -> model``; its module must hold ``default_cfgs``.

    Returns:
        ``entrypoint``.
    """
    name = entrypoint.__name__
    if not is_model(name):
        register_model(entrypoint)
        _ENCODERS.append(name)
    return entrypoint


def list_encoders(pattern: str = "*") -> list[str]:
    """Names of the encoders that this package registered with timm and smp.

    Args:
        pattern: Shell-style pattern, such as ``"replknet_31*"``.

    Returns:
        Sorted names.
    """
    return sorted(name for name in _ENCODERS if fnmatch(name, pattern))
