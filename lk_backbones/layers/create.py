"""Activations and norms by timm's names, as timm's own models take them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
from timm.layers import get_act_layer, get_norm_layer

__all__ = ["ActLayer", "NormLayer", "create_norm", "find_act", "find_norm"]

ActLayer = str | Callable[..., nn.Module]
NormLayer = Callable[..., nn.Module]


def find_act(act_layer: ActLayer) -> ActLayer:
    """Look up an activation.

    Args:
        act_layer: Its name in timm, such as ``"silu"``, or its class.

    Returns:
        Its class.

    Raises:
        ValueError: If timm has none of that name.
    """
    try:
        found = get_act_layer(act_layer)
    except KeyError:
        found = None
    if not callable(found):
        raise ValueError(f"act_layer must be a class or timm's name of an activation, got {act_layer!r}")
    layer: ActLayer = found
    return layer


def find_norm(norm_layer: str | NormLayer) -> NormLayer:
    """Look up a norm of maps ``(N, C, H, W)``.

    Args:
        norm_layer: Its name in timm, such as ``"layernorm2d"`` (or ``"layernorm"``, of which timm keeps one for each
            layout of the map) or ``"frozenbatchnorm2d"``; or its class, called with the number of channels.

    Returns:
        Its class.

    Raises:
        ValueError: If timm has none of that name.
    """
    for name in (f"{norm_layer}2d", norm_layer) if isinstance(norm_layer, str) and norm_layer else (norm_layer,):
        try:
            found = get_norm_layer(name)
        except (KeyError, AssertionError):
            continue
        if callable(found):
            layer: NormLayer = found
            return layer
    raise ValueError(f"norm_layer must be a class or timm's name of a norm, got {norm_layer!r}")


def create_norm(
    norm_layer: NormLayer, channels: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    """Build a norm; not every class takes a device and a dtype.

    Args:
        norm_layer: Its class.
        channels: Of the map.
        device: Of the parameters, or ``None`` for the default.
        dtype: Of the parameters, or ``None`` for the default.
    """
    if device is None and dtype is None:
        return norm_layer(channels)
    try:
        return norm_layer(channels, device=device, dtype=dtype)
    except TypeError:  # such as torchvision's frozen batch norm
        return norm_layer(channels).to(device=device, dtype=dtype)
