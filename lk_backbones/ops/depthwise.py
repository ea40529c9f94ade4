"""Depthwise 2-D convolution for large kernels: the one public op, its autograd and its dispatch."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lk_backbones.ops import _cpu

__all__ = ["depthwise_conv2d"]

Method = Literal["auto", "direct", "fft", "native"]


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int | tuple[int, int] = 1,
    method: Method = "auto",
) -> Tensor:
    """Depthwise convolution with stride 1 and zero padding that keeps the map's size, fast for large kernels.

    The same numbers as ``torch.nn.functional.conv2d(input, weight, bias, padding="same", dilation=dilation,
    groups=C)`` up to float rounding.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, floating point. Its memory format is kept.
        weight: ``(C, 1, kH, kW)``, odd sizes, of the input's dtype and device. May be larger than the map.
        bias: ``(C,)`` or ``None``.
        dilation: Distance between the taps, in pixels, for both axes or ``(rows, columns)``.
        method: ``"auto"`` lets the shape decide.

    Returns:
        Tensor of the input's shape and dtype.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
    """
    dilation = (dilation, dilation) if isinstance(dilation, int) else dilation
    if _must_stay_plain(input, weight):
        return _plain(input, weight, bias, dilation)
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(input, weight, bias, dilation)
    if method == "native" or input.device.type not in ("cpu",) or max(weight.shape[2:]) <= 3:
        return _plain(input, weight, bias, dilation)
    if input.dim() == 3:
        return _forward_op(input.unsqueeze(0), weight, bias, dilation, method).squeeze(0)
    return _forward_op(input, weight, bias, dilation, method)


def _must_stay_plain(input: Tensor, weight: Tensor) -> bool:
    """Whether the caller needs PyTorch's own operator: exporters, and function transforms that custom ops lack."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or torch.onnx.is_in_onnx_export()
        or torch._C._are_functorch_transforms_active()
        or forward_ad.unpack_dual(input).tangent is not None
        or forward_ad.unpack_dual(weight).tangent is not None
    )


def _plain(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int]) -> Tensor:
    padding = (dilation[0] * (weight.shape[2] // 2), dilation[1] * (weight.shape[3] // 2))
    return F.conv2d(input, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int]) -> None:
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be (N, C, H, W) or (C, H, W), got shape {tuple(input.shape)}")
    channels = input.shape[-3]
    if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise ValueError(
            f"weight must be ({channels}, 1, kH, kW) for an input of {channels} channels, got {tuple(weight.shape)}"
        )
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"kernel sizes must be odd, got {tuple(weight.shape[2:])}")


def _memory_format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _padding(weight: Tensor, dilation: list[int]) -> list[int]:
    return [dilation[0] * (weight.shape[2] // 2), dilation[1] * (weight.shape[3] // 2)]


@torch.library.custom_op(
    "lk_backbones::depthwise_conv2d",
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor? bias, SymInt[2] dilation, str method) -> Tensor",
)
def _forward_op(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: list[int], method: str) -> Tensor:
    with torch.autocast(input.device.type, enabled=False):
        if input.numel() == 0 or tuple(dilation) != (1, 1):
            output = F.conv2d(input, weight, bias, 1, _padding(weight, dilation), dilation, input.shape[1])
        else:
            compute = torch.promote_types(input.dtype, torch.float32)
            output = _cpu.direct_forward(
                input.to(compute), weight.to(compute), None if bias is None else bias.to(compute)
            )
    return output.to(input.dtype).contiguous(memory_format=_memory_format(input))


@_forward_op.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: list[int], method: str) -> Tensor:
    return torch.empty_like(input, memory_format=_memory_format(input))


@torch.library.custom_op(
    "lk_backbones::depthwise_conv2d_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor input, Tensor weight, SymInt[2] dilation, str method, bool[2] output_mask)"
    " -> (Tensor, Tensor)",
)
def _backward_op(
    grad_output: Tensor, input: Tensor, weight: Tensor, dilation: list[int], method: str, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    grad_input = grad_weight = None
    with torch.autocast(input.device.type, enabled=False):
        if input.numel() == 0 or tuple(dilation) != (1, 1):
            grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad_output,
                input,
                weight,
                None,
                [1, 1],
                _padding(weight, dilation),
                dilation,
                False,
                [0, 0],
                input.shape[1],
                [*output_mask, False],
            )
        else:
            compute = torch.promote_types(input.dtype, torch.float32)
            grad = grad_output.to(compute)
            if output_mask[0]:
                grad_input = _cpu.direct_forward(grad, weight.to(compute).flip(2, 3))
            if output_mask[1]:
                grad_weight = _cpu.direct_weight_grad(input.to(compute), grad, (weight.shape[2], weight.shape[3]))
    empty = input.new_empty(0)
    return (
        grad_input.to(input.dtype).contiguous(memory_format=_memory_format(input)) if output_mask[0] else empty,
        torch.empty_like(weight).copy_(grad_weight) if output_mask[1] else input.new_empty(0),
    )


@_backward_op.register_fake
def _(
    grad_output: Tensor, input: Tensor, weight: Tensor, dilation: list[int], method: str, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(input, memory_format=_memory_format(input)) if output_mask[0] else input.new_empty(0),
        torch.empty_like(weight) if output_mask[1] else input.new_empty(0),
    )


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, ctx.dilation, ctx.method = inputs
    ctx.save_for_backward(input, weight)


def _forward_op_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_input, grad_weight = _backward_op(
        grad_output, input, weight, ctx.dilation, ctx.method, [need_input, need_weight]
    )
    return (
        grad_input if need_input else None,
        grad_weight if need_weight else None,
        grad_output.sum((0, 2, 3)) if need_bias else None,
        None,
        None,
    )


_forward_op.register_autograd(_forward_op_backward, setup_context=_save_forward)
