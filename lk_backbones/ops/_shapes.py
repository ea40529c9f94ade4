"""Exact rearrangements around a depthwise convolution: out-of-reach taps, dilation, memory formats."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lk_backbones._private.torch import is_view


def crop_kernel(kernel_size: tuple[int, int], map_size: tuple[int, int]) -> tuple[int, int]:
    """Size of the part of a kernel that any pixel of the map can reach, at most ``(2H - 1, 2W - 1)``."""
    return min(kernel_size[0], 2 * map_size[0] - 1), min(kernel_size[1], 2 * map_size[1] - 1)


def crop(weight: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Weight ``(C, 1, kH, kW)`` without the taps that no pixel of the map reaches."""
    height, width = crop_kernel((weight.shape[2], weight.shape[3]), map_size)
    if weight.shape[2:] == (height, width):
        return weight
    top, left = (weight.shape[2] - height) // 2, (weight.shape[3] - width) // 2
    return weight[:, :, top : top + height, left : left + width]


def uncrop(grad_weight: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Inverse of `crop` for the gradient: taps out of reach have none."""
    rows, columns = (kernel_size[0] - grad_weight.shape[2]) // 2, (kernel_size[1] - grad_weight.shape[3]) // 2
    return F.pad(grad_weight, (columns, columns, rows, rows)) if rows or columns else grad_weight


def phase_size(map_size: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    """Size of the maps that `split_phases` makes of a map ``(H, W)``."""
    return -(-map_size[0] // dilation[0]), -(-map_size[1] // dilation[1])


def split_phases(maps: Tensor, dilation: tuple[int, int]) -> Tensor:
    """Turn a dilated problem into dense ones: every ``dilation``-th row and column becomes an image of its own.

    Args:
        maps: ``(N, C, H, W)``.
        dilation: ``(dH, dW)``.

    Returns:
        ``(N * dH * dW, C, ceil(H / dH), ceil(W / dW))``; the zeros that fill up the last row and column are the ones
        that the convolution pads with anyway.
    """
    if dilation == (1, 1):
        return maps
    (batch, channels, height, width), (down, across) = maps.shape, dilation
    rows, columns = phase_size((height, width), dilation)
    maps = F.pad(maps, (0, columns * across - width, 0, rows * down - height))
    phases = maps.reshape(batch, channels, rows, down, columns, across).permute(0, 3, 5, 1, 2, 4)
    return phases.reshape(batch * down * across, channels, rows, columns)


def join_phases(phases: Tensor, map_size: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Inverse of `split_phases` for maps ``(H, W)``."""
    if dilation == (1, 1):
        return phases
    (images, channels, rows, columns), (down, across) = phases.shape, dilation
    batch = images // (down * across)
    maps = phases.reshape(batch, down, across, channels, rows, columns).permute(0, 3, 4, 1, 5, 2)
    return maps.reshape(batch, channels, rows * down, columns * across)[:, :, : map_size[0], : map_size[1]]


def is_channels_last(maps: Tensor) -> bool:
    """Return whether ``(N, C, H, W)`` lies in memory in channels_last order; where both orders fit, it does not."""
    return maps.shape[1] > 1 and maps.stride(1) == 1 and not maps.is_contiguous()


def memory_format(maps: Tensor) -> torch.memory_format:
    """Memory format that results computed from ``maps`` have."""
    return torch.channels_last if is_channels_last(maps) else torch.contiguous_format


def nchw(maps: Tensor) -> Tensor:
    """Return ``maps`` contiguous in NCHW.

    PyTorch copies a strided tensor on all cores but walks through it badly where planes are large or strides powers of
    two; it transposes a matrix well but on one core. With one thread or two, one transpose per image can be faster.
    """
    if maps.is_contiguous():
        return maps
    batch, channels, height, width = maps.shape
    pixels, threads = height * width, torch.get_num_threads()
    walks_badly = pixels >= 128 * 128 or (pixels >= 64 * 64 and channels % 128 == 0)
    transpose = pixels > 100 if threads == 1 else threads == 2 and walks_badly
    if not (transpose and maps.device.type == "cpu" and maps.is_contiguous(memory_format=torch.channels_last)):
        return maps.contiguous()
    output = maps.new_empty(maps.shape)
    for target, source in zip(
        output.flatten(2), maps.permute(0, 2, 3, 1).reshape(batch, pixels, channels), strict=True
    ):
        target.copy_(source.t())
    return output


def in_format(maps: Tensor, wanted: torch.memory_format) -> Tensor:
    """Return ``maps`` in the memory format ``wanted``, copied only if need be, and no view.

    Autograd forbids in-place changes, such as an activation's, to a view that an operator returns.
    """
    if not maps.is_contiguous(memory_format=wanted):
        maps = nchw(maps) if wanted is torch.contiguous_format else maps.contiguous(memory_format=wanted)
    return maps.clone() if is_view(maps) else maps


@functools.cache
def taps_inside(length: int, kernel: int) -> int:
    """Return the number of (pixel, tap) pairs along one axis whose tap falls inside a map of that length."""
    half = kernel // 2
    return sum(min(length - 1, i + half) - max(0, i - half) + 1 for i in range(length))
