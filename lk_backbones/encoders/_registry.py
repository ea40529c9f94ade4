"""The one list of our encoders: timm's registry, without overwriting a name that timm already owns."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from functools import wraps
from typing import Any

import torch.nn as nn
from timm.models import is_model, register_model, register_notrace_module

from lk_backbones.layers import DepthwiseConv2d, PointwiseConv2d, PreferredMemoryFormat

__all__ = ["list_encoders", "register_encoder"]

# timm's graph tracing takes each of these as one node, as it does torch's own convolution.
for _layer in (DepthwiseConv2d, PointwiseConv2d, PreferredMemoryFormat):
    register_notrace_module(_layer)

_ENCODERS: list[str] = []


def register_encoder(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register ``entrypoint`` with timm under its own name, unless timm already has a model of that name.

    Use as a decorator, in place of timm's ``register_model``. timm would overwrite its own model and warn; a user who
    asks for a timm name must get timm's model. The model remembers its keyword arguments, as those of newer timm do, so
    that it can be published and rebuilt.

    Args:
        entrypoint: Function ``name(pretrained=False, **kwargs) -> model``; its module must hold ``default_cfgs``.

    Returns:
        ``entrypoint``, remembering.
    """

    @wraps(entrypoint)
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: Any = entrypoint(pretrained, **kwargs)
        plumbing = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "device", "dtype", "pretrained_model_args")
        model._model_args = {key: value for key, value in kwargs.items() if key not in plumbing}
        return model

    name = entrypoint.__name__
    if not is_model(name):
        register_model(create)
        _ENCODERS.append(name)
    return create


def list_encoders(pattern: str = "*") -> list[str]:
    """Names of the encoders that this package registered with timm and smp.

    Args:
        pattern: Shell-style pattern, such as ``"replknet_31*"``.

    Returns:
        Sorted names.
    """
    return sorted(name for name in _ENCODERS if fnmatch(name, pattern))
