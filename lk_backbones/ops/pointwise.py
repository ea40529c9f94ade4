"""Pointwise (1×1) convolution as a matrix product where that is faster."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lk_backbones.ops._plan import wants_plain_convolution
from lk_backbones.ops._shapes import is_channels_last

__all__ = ["pack_pointwise_weight", "packed_pointwise_conv2d", "pointwise_conv2d", "takes_packed_weight"]


def pointwise_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1×1 convolution, the same numbers as ``torch.nn.functional.conv2d(input, weight, bias)`` up to float rounding.

    In channels_last a 1×1 convolution is the product of a matrix ``(N * H * W, C)`` and the weight. On CPUs a plain
    matrix product computes it faster than oneDNN's convolution, which rearranges the weight on every call and copies
    its gradient back. Elsewhere, in other memory formats, and for exporters and tracers it is PyTorch's convolution.

    Args:
        input: ``(N, C, H, W)``, floating point.
        weight: ``(O, C, 1, 1)``, of the input's dtype and device.
        bias: ``(O,)`` or ``None``.

    Returns:
        ``(N, O, H, W)`` in the input's memory format. Under autocast, the dtype that autocast gives a convolution.
    """
    if input.device.type != "cpu" or wants_plain_convolution(input, weight) or not is_channels_last(input):
        return F.conv2d(input, weight, bias)
    return F.linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def takes_packed_weight(input: Tensor, weight: Tensor) -> bool:
    """Whether :func:`packed_pointwise_conv2d` can stand in for :func:`pointwise_conv2d`.

    It has no derivative and is made for float32 on CPUs with oneDNN; exporters, tracers and compilers cannot look into
    a packed weight.

    Args:
        input: ``(N, C, H, W)``.
        weight: ``(O, C, 1, 1)``, not packed.
    """
    return (
        input.dtype == weight.dtype == torch.float32
        and input.device.type == weight.device.type == "cpu"
        and not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not wants_plain_convolution(input, weight)
        and is_channels_last(input)
        and bool(torch.backends.mkldnn.enabled)
        and _has_packed_products()
    )


@functools.cache
def _has_packed_products() -> bool:
    """Whether this PyTorch has the operators that its own compiler emits for products with packed weights."""
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def pack_pointwise_weight(weight: Tensor) -> Tensor:
    """Copy a weight into the blocks that oneDNN multiplies with, which otherwise happens on every call.

    Args:
        weight: ``(O, C, 1, 1)``, float32, on the CPU.

    Returns:
        ``(O, C)``, an opaque tensor: it cannot be copied, saved or moved, only multiplied with.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().flatten(1).contiguous())
    return packed


def packed_pointwise_conv2d(
    input: Tensor, packed: Tensor, bias: Tensor | None = None, activation: tuple[str, str] = ("none", "")
) -> Tensor:
    """1×1 convolution with a packed weight, then an activation while the result is in the cache.

    Args:
        input: ``(N, C, H, W)``, float32, channels_last.
        packed: From :func:`pack_pointwise_weight`.
        bias: ``(O,)`` or ``None``.
        activation: oneDNN's name of an activation and of its variant: ``("none", "")``, ``("relu", "")``,
            ``("gelu", "none")`` or ``("gelu", "tanh")``.

    Returns:
        ``(N, O, H, W)``, channels_last. No gradient flows through it.
    """
    name, variant = activation
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input.permute(0, 2, 3, 1), packed, bias, name, [], variant)
    return output.permute(0, 3, 1, 2)
