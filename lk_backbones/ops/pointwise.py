"""Pointwise (1×1) convolution as a matrix product where that is faster."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lk_backbones.ops._plan import wants_plain_convolution
from lk_backbones.ops._shapes import is_channels_last

__all__ = ["pointwise_conv2d"]


def pointwise_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1×1 convolution, the same numbers as ``torch.nn.functional.conv2d(input, weight, bias)`` up to float rounding.

    In channels_last a 1×1 convolution is the product of a matrix ``(N * H * W, C)`` and the weight. On CPUs a plain
    matrix product computes it faster than oneDNN's convolution, which rearranges the weight on every call and copies
    its gradient back. Elsewhere, in other memory formats, and for exporters and tracers it is PyTorch's convolution.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, floating point.
        weight: ``(O, C, 1, 1)``, of the input's dtype and device.
        bias: ``(O,)`` or ``None``.

    Returns:
        ``(N, O, H, W)`` or ``(O, H, W)`` in the input's memory format. Under autocast, the dtype that autocast gives a
        convolution.
    """
    plain = input.device.type != "cpu" or input.dim() != 4 or wants_plain_convolution(input, weight)
    if plain or not is_channels_last(input):
        return F.conv2d(input, weight, bias)
    return F.linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
