"""Exact folds of what is linear in ``eval()`` mode: norms and scales into a layer, small kernels into large ones.

A module's ``reparameterize()`` is made of these. Each computes in float64, on the CPU whatever the device, so that a
parameter is rounded once, and gives the layer new parameters: another layer that shared the old ones keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

__all__ = [
    "embed_kernel",
    "fold_norm_into_next",
    "fold_norm_into_previous",
    "fold_scale_into_previous",
    "fold_shift_into_next",
    "fold_shift_into_previous",
    "is_foldable",
    "merge_into",
    "merge_kernels",
    "norm_scale",
]


def is_foldable(norm: nn.Module) -> bool:
    """Return whether a norm is a scale and a shift per channel in ``eval()``: a batch norm, synchronised or frozen too.

    A subclass may compute something more, such as an activation; then it has a ``forward`` of its own.
    """
    known = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
    return type(norm).forward in [cls.forward for cls in known] and isinstance(norm.running_mean, torch.Tensor)


def fold_norm_into_previous(layer: nn.Conv2d | nn.Linear, norm: nn.Module) -> None:
    """Fold the batch norm that follows ``layer`` into it, in place.

    Args:
        layer: Convolution with weight ``(O, I, kH, kW)`` or linear layer with weight ``(O, I)``.
        norm: Batch norm over its ``O`` output channels, read in ``eval()`` sense (running statistics).

    Raises:
        ValueError: If ``norm`` is no batch norm with running statistics, or one of other channels.
    """
    weight, bias = _weight_and_bias(layer)
    mean, variance, eps, scale, shift = _statistics(norm)
    if len(mean) != len(weight):
        raise ValueError(f"a norm of {len(mean)} channels does not follow {layer}")
    # torch's own function, which does the same for linear layers, expects the norm to have a weight and a bias there
    _set_folded(layer, *fuse_conv_bn_weights(weight, bias, mean, variance, eps, scale, shift))


def fold_norm_into_next(norm: nn.Module, layer: nn.Conv2d | nn.Linear) -> None:
    """Fold the batch norm in front of a 1×1 convolution or linear layer into that layer, in place.

    torch.nn.utils.fusion has no such function.

    Args:
        norm: Batch norm over the ``I`` input channels of ``layer``.
        layer: Linear layer, or dense convolution with weight ``(O, I, 1, 1)`` and no padding. With padding the fold
            would be wrong at the border, where the convolution sees zeros rather than normalised zeros.

    Raises:
        ValueError: If ``layer`` is padded, grouped or larger than 1×1, or ``norm`` is no batch norm with running
            statistics, or one of other channels.
    """
    _check_pointwise(layer, "a norm")
    weight, bias = _weight_and_bias(layer)
    mean, _, _, _, shift = _statistics(norm)
    if len(mean) != weight.shape[1]:
        raise ValueError(f"a norm of {len(mean)} channels does not come before {layer}")
    scale = norm_scale(norm)
    per_input = scale.reshape(1, -1, *[1] * (weight.dim() - 2))
    _set_folded(layer, weight * per_input, bias + weight.flatten(1) @ (shift - mean * scale))


def _check_pointwise(layer: nn.Conv2d | nn.Linear, what: str) -> None:
    if isinstance(layer, nn.Conv2d) and not (
        layer.kernel_size == (1, 1) and layer.groups == 1 and layer.padding in ((0, 0), 0, "valid", "same")
    ):
        raise ValueError(f"{what} folds only into a following dense 1x1 convolution without padding, got {layer}")


def norm_scale(norm: nn.Module) -> torch.Tensor:
    """Return what a batch norm multiplies each channel by in ``eval()``, float64 ``(C,)``.

    Raises:
        ValueError: If ``norm`` is no batch norm with running statistics.
    """
    _, variance, eps, weight, _ = _statistics(norm)
    return weight / (variance + eps).sqrt()


def fold_scale_into_previous(layer: nn.Conv2d | nn.Linear, scale: torch.Tensor) -> None:
    """Fold a scale per channel that follows ``layer`` (as ConvNeXt's layer scale does) into it, in place.

    Args:
        layer: Convolution or linear layer of ``O`` output channels.
        scale: ``O`` values, in any shape.

    Raises:
        ValueError: If there are not ``O`` values.
    """
    weight, bias = _weight_and_bias(layer)
    if scale.numel() != len(weight):
        raise ValueError(f"a scale of {scale.numel()} channels does not follow {layer}")
    factor = _exact(scale).flatten()
    _set_folded(layer, weight * factor.reshape(-1, *[1] * (weight.dim() - 1)), bias * factor)


def fold_shift_into_next(shift: torch.Tensor, layer: nn.Conv2d | nn.Linear) -> None:
    """Fold a shift per channel in front of a 1×1 convolution or linear layer into that layer, in place.

    Args:
        shift: What is added to each of the ``I`` input channels of ``layer``, in any shape.
        layer: As for `fold_norm_into_next`.

    Raises:
        ValueError: If ``layer`` is padded, grouped or larger than 1×1, or there are not ``I`` values.
    """
    _check_pointwise(layer, "a shift")
    weight, bias = _weight_and_bias(layer)
    if shift.numel() != weight.shape[1]:
        raise ValueError(f"a shift of {shift.numel()} channels does not come before {layer}")
    _set_folded(layer, weight, bias + weight.flatten(1) @ _exact(shift).flatten())


def fold_shift_into_previous(layer: nn.Conv2d | nn.Linear, shift: torch.Tensor) -> None:
    """Fold a shift per channel that follows ``layer`` into its bias, in place.

    Args:
        layer: Convolution or linear layer of ``O`` output channels.
        shift: What is added to each of them, ``O`` values in any shape.

    Raises:
        ValueError: If there are not ``O`` values.
    """
    weight, bias = _weight_and_bias(layer)
    if shift.numel() != len(weight):
        raise ValueError(f"a shift of {shift.numel()} channels does not follow {layer}")
    _set_folded(layer, weight, bias + _exact(shift).flatten())


def embed_kernel(
    weight: torch.Tensor, dilation: tuple[int, int], into_size: tuple[int, int], into_dilation: tuple[int, int] = (1, 1)
) -> torch.Tensor | None:
    """Write a kernel as a larger one: zeros between the taps of a dilated kernel, and around it.

    Args:
        weight: ``(O, I, kH, kW)``, odd sizes.
        dilation: Distance between its taps in pixels, along rows and columns.
        into_size: Odd size of the larger kernel.
        into_dilation: Distance between the taps of that one.

    Returns:
        ``(O, I, *into_size)``, which computes the same as zero-padded convolution of unchanged size; ``None`` if a tap
        falls beside the taps of the larger kernel.
    """
    size = (weight.shape[2], weight.shape[3])
    if not _fits(size, dilation, into_size, into_dilation):
        return None
    steps = [1 if k == 1 else d // D for k, d, D in zip(size, dilation, into_dilation, strict=True)]
    start = [(K - 1) // 2 - (k - 1) // 2 * s for K, k, s in zip(into_size, size, steps, strict=True)]
    large = weight.new_zeros(*weight.shape[:2], *into_size)
    rows, columns = (slice(a, a + (k - 1) * s + 1, s) for a, k, s in zip(start, size, steps, strict=True))
    large[:, :, rows, columns] = weight
    return large


def merge_into(weight: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    """Add a kernel to the centre of a larger one of the same dilation.

    Args:
        weight: ``(O, I, K, L)``, odd sizes.
        small: ``(O, I, k, l)``, odd sizes.

    Returns:
        The sum, in the dtype and on the device of ``weight``, without a gradient.

    Raises:
        ValueError: If the kernel is not smaller.
    """
    embedded = embed_kernel(_exact(small), (1, 1), (weight.shape[2], weight.shape[3]))
    if embedded is None:
        raise ValueError(f"a kernel of {tuple(small.shape[2:])} does not fit inside one of {tuple(weight.shape[2:])}")
    return (_exact(weight) + embedded).to(weight.dtype).to(weight.device)


def merge_kernels(convs: Iterable[nn.Conv2d]) -> list[nn.Conv2d]:
    """Add every convolution whose kernel fits inside another one's to that one, in place.

    The sum of their outputs stays the same.

    Args:
        convs: Convolutions of one input, with odd kernels, one stride and zeros as padding that reach half a kernel
            beyond the map, all with the same channels and groups. Of two that fit inside each other the first stays.

    Returns:
        Those that are left, in their order.
    """
    left = list(convs)
    smallest_first = sorted(enumerate(left), key=lambda item: (math.prod(item[1].kernel_size), -item[0]))
    for _, conv in smallest_first:
        weight, bias = _weight_and_bias(conv)
        for host in left:
            embedded = None
            if host is not conv:
                embedded = embed_kernel(weight, _pair(conv.dilation), _pair(host.kernel_size), _pair(host.dilation))
            if embedded is not None:
                host_weight, host_bias = _weight_and_bias(host)
                _set_folded(host, host_weight + embedded, host_bias + bias)
                left = [other for other in left if other is not conv]
                break
    return left


def _fits(
    size: tuple[int, int], dilation: tuple[int, int], into_size: tuple[int, int], into_dilation: tuple[int, int]
) -> bool:
    """Return whether every tap of one kernel falls on a tap of another, both centred."""
    return all(
        k == 1 or (d % D == 0 and (k - 1) * (d // D) < K)
        for k, d, K, D in zip(size, dilation, into_size, into_dilation, strict=True)
    )


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in float64, on the CPU: some accelerators (Apple's) have no float64."""
    tensor = tensor.detach()
    return (tensor if tensor.is_meta else tensor.cpu()).double()


def _weight_and_bias(layer: nn.Conv2d | nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    weight = _exact(layer.weight)
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else _exact(layer.bias)


def _statistics(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor, torch.Tensor]:
    """Return mean, variance, epsilon, weight and bias of a batch norm of any class (plain, synchronised, frozen).

    Raises:
        ValueError: If it is no batch norm, or has no running statistics.
    """
    if not is_foldable(norm):
        raise ValueError(f"only a batch norm with running statistics can be folded, got {norm}")
    mean, variance = _exact(cast(torch.Tensor, norm.running_mean)), _exact(cast(torch.Tensor, norm.running_var))
    weight = torch.ones_like(mean) if norm.weight is None else _exact(cast(torch.Tensor, norm.weight))
    bias = torch.zeros_like(mean) if norm.bias is None else _exact(cast(torch.Tensor, norm.bias))
    return mean, variance, cast(float, norm.eps), weight, bias


def _set_folded(layer: nn.Conv2d | nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Replace the parameters of ``layer`` by folded ones, keeping its dtype, device and memory format."""
    like = layer.weight
    requires_grad = like.requires_grad
    weight, bias = weight.detach(), bias.detach()
    # The dtype first: the device may not have the one that they were computed in.
    layer.weight = nn.Parameter(weight.to(like.dtype).to(like.device), requires_grad=requires_grad)
    layer.bias = nn.Parameter(bias.to(like.dtype).to(like.device), requires_grad=requires_grad)
