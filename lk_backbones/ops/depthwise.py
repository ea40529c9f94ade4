"""Depthwise 2-D convolution for large kernels: the one public op, its autograd and its dispatch.

The op is two registered torch operators, the convolution and its backward; each is linear in every tensor it takes,
so the gradients of both are made of the same two and derivatives of any order work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from lk_backbones.ops import _cpu, _cuda
from lk_backbones.ops._plan import METHODS, Method, Plan, resolve_method
from lk_backbones.ops._shapes import (
    crop,
    crop_kernel,
    in_format,
    is_channels_last,
    join_phases,
    memory_format,
    phase_size,
    split_phases,
    uncrop,
)

__all__ = ["Plan", "depthwise_conv2d", "explain"]


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int | tuple[int, int] = 1,
    method: Method = "auto",
) -> Tensor:
    """Depthwise convolution with stride 1 and zero padding that keeps the map's size, fast for large kernels.

    The same numbers as ``torch.nn.functional.conv2d(input, weight, bias, padding="same", dilation=dilation,
    groups=C)`` up to float rounding, on every device. Half precision is computed in float32 and rounded once. Results
    are deterministic on CPUs.

    Two things see PyTorch's own convolution instead: exporters and tracers (``torch.export``, ONNX, TorchScript), so
    that exported models run without this package, and function transforms (``torch.func``, forward-mode AD).

    A NaN or an infinity in the input reaches the outputs whose window covers it; on the ``"fft"`` path it reaches the
    whole map of that image and channel, and rounding errors are relative to the largest value of that map.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, floating point. The result is in its memory format.
        weight: ``(C, 1, kH, kW)``, odd sizes, of the input's dtype and device. May be larger than the map.
        bias: ``(C,)`` or ``None``.
        dilation: Distance between the taps in pixels, for both axes or for ``(rows, columns)``.
        method: ``"auto"`` chooses by shape and device (see :func:`explain`); ``"direct"``, ``"fft"`` and ``"native"``
            insist. The environment variable ``LK_BACKBONES_DEPTHWISE`` takes the place of ``"auto"``.

    Returns:
        Tensor of the input's shape and dtype. Under autocast, the dtype that autocast gives a convolution.

    Raises:
        ValueError: If shapes, dtypes, devices, dilation or method do not fit.
    """
    dilation = _pair(dilation)
    if _wants_plain_convolution(input, weight):
        return _native(input, weight, bias, dilation)
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight = _autocast(input, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    _check(input, weight, bias, method)
    if method == "native" or (method == "auto" and _native_is_best(device, _kernel_size(weight), dilation)):
        return _native(input, weight, bias, dilation)
    if input.dim() == 3:
        return _forward_op(input.unsqueeze(0), weight, bias, dilation, method).squeeze(0)
    return _forward_op(input, weight, bias, dilation, method)


def explain(
    input: Tensor,
    weight: Tensor,
    dilation: int | tuple[int, int] = 1,
    method: Method = "auto",
    device: str | None = None,
) -> Plan:
    """Say which path :func:`depthwise_conv2d` takes for these tensors, and why.

    Only shapes, dtype and memory format count, so tensors on the ``meta`` device do.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        weight: ``(C, 1, kH, kW)``.
        dilation: As :func:`depthwise_conv2d`.
        method: As :func:`depthwise_conv2d`.
        device: Device type to plan for, such as ``"cuda"``; the input's if ``None``.

    Returns:
        The plan; ``print`` it.

    Raises:
        ValueError: As :func:`depthwise_conv2d`.
    """
    dilation = _pair(dilation)
    _check(input, weight, None, method)
    input = input if input.dim() == 4 else input.unsqueeze(0)
    return _plan(input, weight, dilation, method, input.device.type if device is None else device)


def _pair(dilation: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(dilation) if isinstance(dilation, (tuple, list)) else (dilation, dilation)
    if len(pair) != 2 or not all(isinstance(step, int) and step >= 1 for step in pair):
        raise ValueError(f"dilation must be a positive integer or a pair of them, got {dilation}")
    return pair[0], pair[1]


def _kernel_size(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2], weight.shape[3]


def _map_size(input: Tensor) -> tuple[int, int]:
    return input.shape[2], input.shape[3]


def _padding(weight: Tensor, dilation: tuple[int, int]) -> list[int]:
    return [distance * (size // 2) for distance, size in zip(dilation, _kernel_size(weight), strict=True)]


def _wants_plain_convolution(input: Tensor, weight: Tensor) -> bool:
    """Whether something is at work that must see PyTorch's own operator.

    Exporters and tracers, whose results run elsewhere. Function transforms and forward-mode AD, which registered
    operators do not take part in: the latter would silently treat the output as a constant.
    """
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or torch.onnx.is_in_onnx_export()
        or torch._C._are_functorch_transforms_active()
        or forward_ad.unpack_dual(input).tangent is not None
        or forward_ad.unpack_dual(weight).tangent is not None
    )


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to a convolution's operand."""
    return tensor if tensor.dtype == torch.float64 or not tensor.is_floating_point() else tensor.to(dtype)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, method: str) -> None:
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be (N, C, H, W) or (C, H, W), got shape {tuple(input.shape)}")
    channels = input.shape[-3]
    if weight.dim() != 4 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise ValueError(
            f"weight must be ({channels}, 1, kH, kW) for the {channels} channels of input {tuple(input.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"kernel sizes must be odd for a map to keep its size, got {tuple(weight.shape[2:])}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be ({channels},), one value per channel of input, got {tuple(bias.shape)}")
    operands = {"input": input, "weight": weight, "bias": bias}
    tensors = {name: tensor for name, tensor in operands.items() if tensor is not None}
    if not input.is_floating_point() or any(tensor.dtype != input.dtype for tensor in tensors.values()):
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise ValueError(f"input, weight and bias must share one floating point dtype, got {dtypes}")
    if any(tensor.device != input.device for tensor in tensors.values()):
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"input, weight and bias must be on one device, got {devices}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def _native_is_best(device: str, kernel_size: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether PyTorch's own operator is best whatever the map, so that nothing need stand between it and the caller."""
    if device == "cpu":
        return kernel_size[1] <= 3 and dilation == (1, 1)
    return device != "cuda" or max(kernel_size) < _cuda.SMALLEST_KERNEL


def _plan(input: Tensor, weight: Tensor, dilation: tuple[int, int], method: str, device: str) -> Plan:
    if method == "auto" and _native_is_best(device, _kernel_size(weight), dilation):
        return Plan("native", "native", f"PyTorch is fast at kernels of {_kernel_size(weight)} on {device}")
    method = resolve_method(method)
    if input.numel() == 0:
        return Plan("native", "native", "the input is empty")
    if method == "native" or (method == "direct" and device != "cpu"):
        return Plan("native", "native", f"method {method!r} asked for")
    if method != "auto":
        return Plan(method, method, f"method {method!r} asked for")
    rows, columns = phase_size(_map_size(input), dilation)
    shape = (input.shape[0] * dilation[0] * dilation[1], input.shape[1], rows, columns)
    kernel_size = crop_kernel(_kernel_size(weight), (rows, columns))
    if device == "cuda":
        return _cuda.plan(shape, kernel_size, input.dtype)
    plan = _cpu.plan(shape, kernel_size, input.dtype, is_channels_last(input))
    if dilation != (1, 1) and plan.forward == "direct" and _padding(weight, dilation)[1] <= _cpu.widest_padding():
        return Plan("native", plan.backward, f"PyTorch is fast at narrow dilated kernels; {plan.reason}")
    return plan


def _native(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int]) -> Tensor:
    padding = _padding(weight, dilation)
    return F.conv2d(input, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])


@torch.library.custom_op(
    "lk_backbones::depthwise_conv2d",
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor? bias, SymInt[2] dilation, str method) -> Tensor",
)
def _forward_op(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int], method: str) -> Tensor:
    device, dilation = input.device.type, _pair(dilation)
    path = _plan(input, weight, dilation, method, device).forward
    with torch.autocast(device, enabled=False):  # the dtypes are already what autocast wants
        if path == "native":
            output = _native(input, weight, bias, dilation)
        else:
            maps, kernel = _prepare(input, weight, dilation)
            backend = _cuda if device == "cuda" else _cpu
            output = backend.forward(maps, kernel, None if bias is None else bias.to(maps.dtype), path)
            output = join_phases(output, _map_size(input), dilation)
        return in_format(output.to(input.dtype), memory_format(input))


@_forward_op.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int], method: str) -> Tensor:
    return torch.empty_like(input, memory_format=memory_format(input))


@torch.library.custom_op(
    "lk_backbones::depthwise_conv2d_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor input, Tensor weight, SymInt[2] dilation, str method, bool[2] output_mask)"
    " -> (Tensor, Tensor)",
)
def _backward_op(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: tuple[int, int],
    method: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    device, dilation = input.device.type, _pair(dilation)
    path = _plan(input, weight, dilation, method, device).backward
    with torch.autocast(device, enabled=False):
        if path == "native":
            grad_input, grad_weight = _native_backward(grad_output, input, weight, dilation, output_mask)
        else:
            maps, kernel = _prepare(input, weight, dilation)
            grad_maps = split_phases(grad_output.to(maps.dtype), dilation)
            backend = _cuda if device == "cuda" else _cpu
            grad_input, grad_weight = backend.backward(grad_maps, maps, kernel, path, output_mask)
            if grad_input is not None:
                grad_input = join_phases(grad_input, _map_size(input), dilation)
            if grad_weight is not None:
                grad_weight = uncrop(grad_weight, _kernel_size(weight))
        return (
            _absent(input) if grad_input is None else in_format(grad_input.to(input.dtype), memory_format(input)),
            _absent(weight) if grad_weight is None else torch.empty_like(weight).copy_(grad_weight),
        )


@_backward_op.register_fake
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: tuple[int, int],
    method: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(input, memory_format=memory_format(input)) if output_mask[0] else _absent(input),
        torch.empty_like(weight) if output_mask[1] else _absent(weight),
    )


def _absent(like: Tensor) -> Tensor:
    """Stands for a gradient that nobody asked for: operators must return tensors."""
    return like.new_empty(0)


def _prepare(input: Tensor, weight: Tensor, dilation: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Maps and kernel to compute with: at least float32, no dilation, no tap out of reach."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    maps = split_phases(input.to(dtype), dilation)
    return maps, crop(weight.to(dtype), _map_size(maps))


def _native_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, dilation: tuple[int, int], output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        weight,
        None,  # no bias
        [1, 1],
        _padding(weight, dilation),
        dilation,
        False,  # not transposed
        [0, 0],
        weight.shape[0],
        [*output_mask, False],
    )
    return grad_input, grad_weight


def _save_for_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, ctx.dilation, ctx.method = inputs
    ctx.save_for_backward(input, weight)


def _forward_gradient(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_input = grad_weight = None
    if need_input or need_weight:
        mask = [need_input, need_weight]
        grad_input, grad_weight = _backward_op(grad_output, input, weight, ctx.dilation, ctx.method, mask)
    return (
        grad_input if need_input else None,
        grad_weight if need_weight else None,
        grad_output.sum((0, 2, 3)) if need_bias else None,
        None,
        None,
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad_output, input, weight, ctx.dilation, ctx.method, ctx.output_mask = inputs
    ctx.save_for_backward(grad_output, input, weight)


def _backward_gradient(ctx: Any, grad_grad_input: Tensor, grad_grad_weight: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of the backward: as it is linear in each tensor, the same two operators with other operands."""
    grad_output, input, weight = ctx.saved_tensors
    need_grad_output, need_input, need_weight = ctx.needs_input_grad[:3]
    has_input, has_weight = ctx.output_mask
    new_grad_output = new_input = new_weight = None
    if need_grad_output:
        if has_input:
            new_grad_output = _forward_op(grad_grad_input, weight, None, ctx.dilation, ctx.method)
        if has_weight:
            term = _forward_op(input, grad_grad_weight, None, ctx.dilation, ctx.method)
            new_grad_output = term if new_grad_output is None else new_grad_output + term
    need_input, need_weight = need_input and has_weight, need_weight and has_input
    if need_input or need_weight:
        new_input, new_weight = _backward_op(
            grad_output,
            grad_grad_input if has_input else input,  # the mask keeps the second choice out of the results
            grad_grad_weight if has_weight else weight,
            ctx.dilation,
            ctx.method,
            [need_input, need_weight],
        )
    return (
        new_grad_output,
        new_input if need_input else None,
        new_weight if need_weight else None,
        None,
        None,
        None,
    )


_forward_op.register_autograd(_forward_gradient, setup_context=_save_for_forward)
_backward_op.register_autograd(_backward_gradient, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.lk_backbones.depthwise_conv2d)
def _forward_flops(
    input: list[int], weight: list[int], bias: list[int] | None, dilation: list[int], method: str, **_: Any
) -> int:
    """As PyTorch counts its own convolution: every tap, also those over the padding."""
    return conv_flop_count(input, weight, input, transposed=False)


@register_flop_formula(torch.ops.lk_backbones.depthwise_conv2d_backward)
def _backward_flops(
    grad_output: list[int],
    input: list[int],
    weight: list[int],
    dilation: list[int],
    method: str,
    output_mask: list[bool],
    **_: Any,
) -> int:
    return sum(output_mask) * conv_flop_count(input, weight, input, transposed=False)
