"""The two registered torch operators behind the op: the convolution and its backward, with their autograd.

Each is linear in every tensor it takes, so the gradients of both are made of the same two operators and derivatives of
any order work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from lk_backbones._private.torch import operators_are_watched
from lk_backbones.ops import _cpu, _cuda, _paths
from lk_backbones.ops._shapes import (
    crop,
    in_format,
    is_channels_last,
    join_phases,
    memory_format,
    split_phases,
    uncrop,
)
from lk_backbones.ops._tuning import KINDS


def pair(dilation: int | tuple[int, int]) -> tuple[int, int]:
    """Dilation of rows and columns.

    Raises:
        ValueError: If it is not one or two positive integers.
    """
    steps = (dilation, dilation) if isinstance(dilation, int) else dilation
    if isinstance(steps, (tuple, list)) and len(steps) == 2:
        rows, columns = steps
        if isinstance(rows, int) and isinstance(columns, int) and rows >= 1 and columns >= 1:
            return rows, columns
    raise ValueError(f"dilation must be a positive integer or a pair of them, got {dilation}")


def _kernel_size(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2], weight.shape[3]


def _map_size(input: Tensor) -> tuple[int, int]:
    return input.shape[2], input.shape[3]


def _padding(weight: Tensor, dilation: tuple[int, int]) -> tuple[int, int]:
    # A tuple as nn.Conv2d's: counters of FLOPs that take the place of conv2d know no lists.
    return dilation[0] * (weight.shape[2] // 2), dilation[1] * (weight.shape[3] // 2)


def native(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int]) -> Tensor:
    """PyTorch's own operator."""
    padding = _padding(weight, dilation)
    return F.conv2d(input, weight, bias, (1, 1), padding, dilation, weight.shape[0])


def _convolution(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int], method: str) -> Tensor:
    """Output ``(N, C, H, W)``, in the memory format of ``input``."""
    dilation, operands = pair(dilation), (input, weight, bias)
    with _without_autocast(input.device.type):
        compute = functools.partial(_convolve_by, dilation=dilation)
        path = _paths.choose_path("forward", compute, operands, input, weight, dilation, method)
        return _convolve_by(path, operands, dilation)


def _convolve_by(path: str, operands: _paths.Operands, dilation: tuple[int, int]) -> Tensor:
    """Output by a path, from input, weight and bias."""
    input, weight, bias = operands
    assert input is not None
    assert weight is not None
    if _is_native(path):
        output = _native_by(path, native, (input, weight, bias), dilation)
    else:
        maps, kernel = _prepare(input, weight, dilation, path)
        backend = _cuda if _paths.device_type(input) == "cuda" else _cpu
        output = backend.convolve(maps, kernel, None if bias is None else bias.to(maps.dtype), path)
        output = join_phases(output, _map_size(input), dilation)
    return in_format(output.to(input.dtype), memory_format(input))


def convolve_and_more(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    relu: bool,
    dilation: tuple[int, int],
    method: str,
) -> Tensor:
    """Convolution, then a sum and a ReLU, without a gradient; in one pass where the path of the convolution has it."""
    with _without_autocast(input.device.type):
        operands = input, weight, bias
        compute = functools.partial(_convolve_by, dilation=dilation)
        path = _paths.choose_path("forward", compute, operands, input, weight, dilation, method)
        # In channels_last the addend would have to be copied into the order that the kernels compute in.
        within = addend if not is_channels_last(input) else None
        if _cuda.is_triton(path) and dilation == (1, 1) and not (relu and addend is not within):
            output = _cuda.convolve(input, crop(weight, _map_size(input)), bias, path, within, relu)
            output = in_format(output, memory_format(input))
            return output if addend is None or addend is within else output.add_(addend)
        output = _convolve_by(path, operands, dilation)
        if addend is not None:
            output.add_(addend)
        return output.relu_() if relu else output


def _is_native(path: str) -> bool:
    return path == "native" or path in _cuda.LIBRARIES or path in _cuda.FORMATS


def _native_by(path: str, run: Callable[..., Any], operands: _paths.Operands, *arguments: Any) -> Any:
    """PyTorch's own operator, told how; the weight has no memory format that matters."""
    if path in _cuda.FORMATS:
        wanted = _cuda.FORMATS[path]
        operands = tuple(
            operand if operand is None or operand.dim() != 4 else operand.contiguous(memory_format=wanted)
            for operand in operands
        )
    with _cuda.told(path):
        return run(*operands, *arguments)


convolution_op = torch.library.custom_op(
    "lk_backbones::depthwise_conv2d",
    _convolution,
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor? bias, SymInt[2] dilation, str method) -> Tensor",
)


@convolution_op.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int], method: str) -> Tensor:
    return torch.empty_like(input, memory_format=memory_format(input))


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    dilation: tuple[int, int],
    method: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of ``input`` and ``weight``, each in the layout of what it belongs to; empty where not wanted."""
    dilation, operands = pair(dilation), (grad_output, input, weight)
    results: list[Tensor | None] = [None, None]
    with _without_autocast(input.device.type):
        paths = ["", ""]
        for which, kind in enumerate(KINDS[1:]):
            if output_mask[which]:
                compute = functools.partial(_gradient_by, which=which, dilation=dilation)
                paths[which] = _paths.choose_path(kind, compute, operands, input, weight, dilation, method)
        if paths[0] == paths[1]:
            results[:] = _gradients_by(paths[0], operands, dilation, output_mask)
        else:
            for which, wanted in enumerate(output_mask):
                if wanted:
                    results[which] = _gradient_by(paths[which], operands, which, dilation)
        return (
            _absent(input) if results[0] is None else results[0],
            _absent(weight) if results[1] is None else results[1],
        )


def _gradient_by(path: str, operands: _paths.Operands, which: int, dilation: tuple[int, int]) -> Tensor:
    """Gradient of the input (0) or of the weight (1) by a path."""
    gradient = _gradients_by(path, operands, dilation, [which == 0, which == 1])[which]
    assert gradient is not None
    return gradient


def _gradients_by(
    path: str, operands: _paths.Operands, dilation: tuple[int, int], output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by a path, from the gradient of the output, input and weight; each in the layout of its own."""
    grad_output, input, weight = operands
    assert grad_output is not None
    assert input is not None
    assert weight is not None
    on_cpu = _paths.device_type(input) != "cuda"
    if _is_native(path):
        grad_input, grad_weight = _native_by(path, _native_backward, operands, dilation, output_mask)
    elif path == "direct" and on_cpu and _cpu.is_narrow(weight.shape[3], dilation):
        maps, kernel = _at_least_float32(input, weight)
        grad_maps = grad_output.to(maps.dtype)
        grad_input, grad_weight = _cpu.gradients(grad_maps, maps, kernel, path, output_mask, dilation)
    else:
        maps, kernel = _prepare(input, weight, dilation, path)
        grad_maps = split_phases(grad_output.to(maps.dtype), dilation)
        backend = _cpu if on_cpu else _cuda
        grad_input, grad_weight = backend.gradients(grad_maps, maps, kernel, path, output_mask)
        if grad_input is not None:
            grad_input = join_phases(grad_input, _map_size(input), dilation)
        if grad_weight is not None:
            grad_weight = uncrop(grad_weight, _kernel_size(weight))
    return (
        None if grad_input is None else in_format(grad_input.to(input.dtype), memory_format(input)),
        None if grad_weight is None else _laid_out_like(weight, grad_weight),
    )


gradients_op = torch.library.custom_op(
    "lk_backbones::depthwise_conv2d_backward",
    _gradients,
    mutates_args=(),
    schema="(Tensor grad_output, Tensor input, Tensor weight, SymInt[2] dilation, str method, bool[2] output_mask)"
    " -> (Tensor, Tensor)",
)


@gradients_op.register_fake
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


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Inside the operators dtypes are settled; entering a context costs, so only where autocast is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _absent(like: Tensor) -> Tensor:
    """Stands for a gradient that nobody asked for: operators must return tensors."""
    return like.new_empty(0)


def _laid_out_like(weight: Tensor, grad_weight: Tensor) -> Tensor:
    """Return the gradient in the weight's dtype and strides, as optimisers and DDP's buckets want it."""
    if grad_weight.dtype == weight.dtype and grad_weight.stride() == weight.stride():
        return grad_weight
    return torch.empty_like(weight).copy_(grad_weight)


def _prepare(input: Tensor, weight: Tensor, dilation: tuple[int, int], path: str) -> tuple[Tensor, Tensor]:
    """Return maps and kernel that a path computes with: no dilation, no tap out of reach, float32 if it needs that."""
    if not _cuda.is_triton(path):
        input, weight = _at_least_float32(input, weight)
    maps = split_phases(input, dilation)
    return maps, crop(weight, _map_size(maps))


def _at_least_float32(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if input.dtype in (torch.float16, torch.bfloat16):
        return input.float(), weight.float()
    return input, weight


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


def _forward_gradient(
    ctx: Any, grad_output: Tensor, gradients: Callable[..., tuple[Tensor, Tensor]] = gradients_op
) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_input = grad_weight = None
    if need_input or need_weight:
        mask = [need_input, need_weight]
        grad_input, grad_weight = gradients(grad_output, input, weight, ctx.dilation, ctx.method, mask)
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
            new_grad_output = convolution_op(grad_grad_input, weight, None, ctx.dilation, ctx.method)
        if has_weight:
            term = convolution_op(input, grad_grad_weight, None, ctx.dilation, ctx.method)
            new_grad_output = term if new_grad_output is None else new_grad_output + term
    need_input, need_weight = need_input and has_weight, need_weight and has_input
    if need_input or need_weight:
        new_input, new_weight = gradients_op(
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


convolution_op.register_autograd(_forward_gradient, setup_context=_save_for_forward)
gradients_op.register_autograd(_backward_gradient, setup_context=_save_for_backward)


class _Eager(torch.autograd.Function):
    """The same pair without PyTorch's dispatcher, whose way to a Python operator and back costs some 100 us."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int], method: str
    ) -> Tensor:
        _save_for_forward(ctx, (input, weight, bias, dilation, method), input)
        return _convolution(input, weight, bias, dilation, method)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # With gradients on, somebody will differentiate this again, for which the registered operator is made.
        return _forward_gradient(ctx, grad_output, gradients_op if torch.is_grad_enabled() else _gradients)


def apply(input: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int], method: str) -> Tensor:
    """Convolution with its gradient: the registered operator where anything looks at operators, else without it."""
    if (
        torch.compiler.is_compiling()
        or operators_are_watched()
        or not all(type(tensor) in (Tensor, torch.nn.Parameter, type(None)) for tensor in (input, weight, bias))
    ):
        return convolution_op(input, weight, bias, dilation, method)
    return _Eager.apply(input, weight, bias, dilation, method)


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
