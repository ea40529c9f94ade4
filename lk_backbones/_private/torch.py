"""Private parts of PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lk_backbones._private.borrow import borrow

__all__ = [
    "calls_onednn_undisturbed",
    "convolution_pointwise",
    "functorch_is_active",
    "has_amx",
    "has_avx512_bf16",
    "has_packed_operators",
    "hooks_see_input",
    "hooks_see_output",
    "is_view",
    "linear_pointwise",
    "operators_are_watched",
    "reorder_convolution_weight",
    "reorder_linear_weight",
    "tree_map",
    "uses_forward_gradients",
]

tree_map = borrow("torch", "torch.utils._pytree", "tree_map")
_functorch_is_active = borrow("torch", "torch._C", "_are_functorch_transforms_active")
_dispatch_modes = borrow("torch", "torch._C", "_len_torch_dispatch_stack")
_mkldnn_is_enabled = borrow("torch", "torch._C", "_get_mkldnn_enabled")
_is_tracing = borrow("torch", "torch._C", "_is_tracing")
_is_amx_tile_supported = borrow("torch", "torch.cpu", "_is_amx_tile_supported")
_is_avx512_bf16_supported = borrow("torch", "torch.cpu", "_is_avx512_bf16_supported")


def functorch_is_active() -> bool:
    """Return whether a transform of `torch.func` runs, such as ``vmap`` or ``jvp``."""
    return bool(_functorch_is_active())


def operators_are_watched() -> bool:
    """Return whether something looks at operators one by one: FLOP counters, fake tensors, selective checkpointing."""
    return bool(_dispatch_modes() > 0)


def calls_onednn_undisturbed() -> bool:
    """Return whether oneDNN is on and nothing sees operators one by one or transforms them.

    ``torch.compile``'s tracer apart; exporters trace, or have a mode of their own in which operators are seen.
    """
    return bool(
        _mkldnn_is_enabled()
        and not _is_tracing()
        and not _dispatch_modes()
        and not _functorch_is_active()
        and getattr(forward_ad, "_current_level", 0) < 0
    )


def uses_forward_gradients(tensors: Sequence[Tensor]) -> bool:
    """Return whether one of the tensors carries a tangent of forward-mode differentiation."""
    # without the level, which is -1 outside of such a context, every call would have to be unpacked
    level = getattr(forward_ad, "_current_level", 0)
    return level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def hooks_see_input(module: nn.Module) -> bool:
    """Return whether a hook of a module is called with what comes in."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def hooks_see_output(module: nn.Module) -> bool:
    """Return whether a hook of a module is called with what comes out or its gradient."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


@functools.cache
def has_amx() -> bool:
    """Return whether the processor multiplies matrices of bfloat16 numbers."""
    return bool(_is_amx_tile_supported())


@functools.cache
def has_avx512_bf16() -> bool:
    """Return whether the processor multiplies vectors of bfloat16 numbers; every processor with AMX does."""
    return bool(_is_avx512_bf16_supported())


def is_view(tensor: Tensor) -> bool:
    """Return whether autograd takes a tensor for a view of another."""
    return tensor._is_view()


# The operators that PyTorch's compiler emits for frozen weights on CPUs.
_PACKED_OPERATORS = (
    "_reorder_linear_weight",
    "_linear_pointwise",
    "_reorder_convolution_weight",
    "_convolution_pointwise",
)


@functools.cache
def has_packed_operators() -> bool:
    """Return whether this PyTorch can compute with weights that are packed ahead."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in _PACKED_OPERATORS)


def reorder_linear_weight(weight: Tensor) -> Tensor:
    """Pack the weight ``(O, I)`` of a matrix product."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def linear_pointwise(input: Tensor, packed: Tensor, bias: Tensor | None, activation: tuple[str, str]) -> Tensor:
    """Multiply ``(…, I)`` with a packed weight; the activation is oneDNN's name and variant."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, activation[0], [], activation[1])
    return output


def reorder_convolution_weight(weight: Tensor, *geometry: Any) -> Tensor:
    """Pack the weight of a convolution; padding, stride, dilation, groups and a typical input's shape follow."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry)
    return packed


def convolution_pointwise(
    input: Tensor, packed: Tensor, bias: Tensor | None, *geometry: Any, activation: tuple[str, str]
) -> Tensor:
    """Convolve with a packed weight; padding, stride, dilation and groups follow."""
    output: Tensor = torch.ops.mkldnn._convolution_pointwise(
        input, packed, bias, *geometry, activation[0], [], activation[1]
    )
    return output
