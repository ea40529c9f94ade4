"""Convolutions and linear layers with weights that are packed ahead, for inference on CPUs.

oneDNN multiplies with a weight in blocks of its own, which PyTorch otherwise arranges anew on every call. The operators
are those that PyTorch's compiler emits for frozen weights; where this PyTorch lacks them, nothing can be packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lk_backbones._private.torch import (
    calls_onednn_undisturbed,
    convolution_pointwise,
    has_packed_operators,
    linear_pointwise,
    operators_are_watched,
    reorder_convolution_weight,
    reorder_linear_weight,
)
from lk_backbones.ops import _cpu
from lk_backbones.ops._plan import operand_dtype, wants_plain_convolution
from lk_backbones.ops._shapes import is_channels_last

__all__ = [
    "direct_conv2d",
    "ordinary_state",
    "pack_direct",
    "pack_weight",
    "packed_conv2d",
    "packed_dtype",
    "packed_linear",
]


def packed_dtype(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> torch.dtype | None:
    """Say in which dtype `packed_conv2d` can stand in for a convolution, or `packed_linear` for a linear layer.

    They have no derivative and are made for CPUs with oneDNN: for float32, and for bfloat16, also by autocast, where
    the processor has instructions for it; maps in channels_last. Exporters, tracers and compilers cannot look into a
    packed weight. A weight made in inference mode does not count its changes, so that a packed copy could go out of
    date. They do not check what a layer does: a bias is read as ``(O,)`` numbers in a row.

    Args:
        input: ``(N, C, H, W)``, or ``(*, C)`` for a linear layer.
        weight: ``(O, C / groups, kH, kW)``, or ``(O, C)`` for a linear layer; not packed.
        bias: ``(O,)`` or ``None``.

    Returns:
        The dtype to pack the weight in, or ``None`` where they cannot.
    """
    # Spelled out: between large kernels Python runs from cold caches, and every call counts.
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if torch.compiler.is_compiling() or wants_plain_convolution(*tensors):
        return None
    dtype = operand_dtype(input)
    if not (dtype == torch.float32 or (dtype == torch.bfloat16 and _cpu.computes_bfloat16())):
        return None
    autocast = torch.is_autocast_enabled("cpu")
    if weight.dtype != dtype and not (autocast and operand_dtype(weight) == dtype):
        return None
    if bias is not None and not (
        (bias.dtype == dtype or (autocast and operand_dtype(bias) == dtype))
        and bias.is_cpu
        and bias.shape == weight.shape[:1]
        and bias.is_contiguous()
    ):
        return None
    possible = (
        input.is_cpu
        and weight.is_cpu
        and input.layout == torch.strided
        and not input.is_nested
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not operators_are_watched()  # who looks at operators knows others
        and (_is_rows(input, weight) if weight.dim() == 2 else input.dim() == 4 and is_channels_last(input))
        and not weight.is_inference()
        and bool(torch.backends.mkldnn.enabled)
        and has_packed_operators()
    )
    return dtype if possible else None


def ordinary_state() -> tuple[bool, torch.dtype] | None:
    """Tell whether two calls with tensors of the same dtypes are the same to `packed_dtype`.

    Returns:
        Whether autocast is on for CPUs and its dtype; ``None`` in any state in which more than the tensors counts, or
        their gradients do.
    """
    if torch.is_grad_enabled() or not calls_onednn_undisturbed():
        return None
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def pack_weight(
    weight: Tensor,
    input_shape: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Copy a weight into the blocks that oneDNN computes with.

    Args:
        weight: ``(O, C / groups, kH, kW)``, or ``(O, C)`` for a linear layer; float32 or bfloat16, on the CPU.
        input_shape: ``(N, C, H, W)`` of a typical input of a convolution; others work too.
        padding: Of the convolution.
        stride: Of the convolution.
        dilation: Of the convolution.
        groups: Of the convolution.
        dtype: What to compute in; the weight's if ``None``.

    Returns:
        An opaque tensor for `packed_conv2d` or `packed_linear`: it cannot be copied, saved or moved.
    """
    weight = weight.detach().to(dtype)
    if weight.dim() == 2 or _is_product(weight.shape[2:], padding, stride, groups):
        return reorder_linear_weight(weight.flatten(1).contiguous())
    return reorder_convolution_weight(
        weight.contiguous(), list(padding), list(stride), list(dilation), groups, list(input_shape)
    )


def packed_conv2d(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    padding: Sequence[int] = (0, 0),
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: tuple[str, str] = ("none", ""),
) -> Tensor:
    """Convolution with a packed weight, then an activation while the result is in the cache.

    Args:
        input: ``(N, C, H, W)``, channels_last; is converted to the packed weight's dtype.
        packed: From `pack_weight`, with the same padding, stride, dilation and groups.
        bias: ``(O,)``, float32 or of the packed weight's dtype, or ``None``.
        padding: Zeros on each side of rows and columns.
        stride: Of rows and columns.
        dilation: Of rows and columns.
        groups: Number of groups.
        activation: oneDNN's name of an activation and of its variant: ``("none", "")``, ``("relu", "")``,
            ``("gelu", "none")`` or ``("gelu", "tanh")``.

    Returns:
        ``(N, O, H', W')``, of the packed weight's dtype, channels_last. No gradient flows through it.
    """
    if packed.dim() == 2:
        rows = input.permute(0, 2, 3, 1).to(packed.dtype)
        return linear_pointwise(rows, packed, bias, activation).permute(0, 3, 1, 2)
    return convolution_pointwise(
        input.to(packed.dtype), packed, bias, list(padding), list(stride), list(dilation), groups, activation=activation
    )


def pack_direct(weight: Tensor, input_shape: Sequence[int]) -> Tensor:
    """Copy a depthwise weight, in float32, into the blocks that the path ``"direct"`` of a plan computes with.

    Args:
        weight: ``(C, 1, kH, kW)``, odd sizes, float32 or bfloat16, on the CPU.
        input_shape: ``(N, C, H, W)`` of a typical input; others work too.

    Returns:
        An opaque tensor for `direct_conv2d`: it cannot be copied, saved or moved. Its shape is the kernel's, which may
        be wider than the weight.
    """
    weight = _cpu.widen(weight.detach().float(), input_shape[3], input_shape[0])
    return pack_weight(weight, input_shape, (weight.shape[2] // 2, weight.shape[3] // 2), groups=weight.shape[0])


def direct_conv2d(
    input: Tensor, packed: Tensor, bias: Tensor | None = None, activation: tuple[str, str] = ("none", "")
) -> Tensor:
    """Depthwise convolution with stride 1 and zero padding that keeps the map's size, then an activation.

    Computed in float32 and rounded once.

    Args:
        input: ``(N, C, H, W)``, float32 or bfloat16, channels_last.
        packed: From `pack_direct`.
        bias: ``(C,)`` or ``None``.
        activation: As `packed_conv2d`.

    Returns:
        ``(N, C, H, W)``, channels_last, of the dtype that autocast gives a convolution, or the input's. No gradient
        flows through it.
    """
    padding = packed.shape[2] // 2, packed.shape[3] // 2
    bias = None if bias is None else bias.float()
    output = packed_conv2d(input, packed, bias, padding, groups=input.shape[1], activation=activation)
    return output.to(operand_dtype(input))


def packed_linear(
    input: Tensor, packed: Tensor, bias: Tensor | None = None, activation: tuple[str, str] = ("none", "")
) -> Tensor:
    """Linear layer with a packed weight, then an activation while the result is in the cache.

    Args:
        input: ``(*, C)`` of two dimensions or more; is converted to the packed weight's dtype.
        packed: From `pack_weight`.
        bias: ``(O,)``, float32 or of the packed weight's dtype, or ``None``.
        activation: As `packed_conv2d`.

    Returns:
        ``(*, O)``, of the packed weight's dtype. No gradient flows through it.
    """
    return linear_pointwise(input.to(packed.dtype), packed, bias, activation)


def _is_rows(input: Tensor, weight: Tensor) -> bool:
    """Return whether a linear layer takes the input, as more than one vector."""
    return input.dim() >= 2 and input.shape[-1] == weight.shape[1]


def _is_product(kernel_size: Sequence[int], padding: Sequence[int], stride: Sequence[int], groups: int) -> bool:
    """Return whether every output pixel is one matrix times the input pixel."""
    return tuple(kernel_size) == (1, 1) == tuple(stride) and tuple(padding) == (0, 0) and groups == 1
