"""Depthwise convolution as products of rows with band matrices, for processors that multiply matrices of bfloat16.

A row of a kernel that moves along a row of a map is a matrix of the map's width by its width, with the taps along its
diagonals. A kernel is one such matrix for each of its rows, and the whole a grouped convolution over rows, whose
channels are columns. That multiplies far more, much of it by zeros, but AMX is so fast at matrices that it takes as
little as a third of the time. The matrices take memory and time to make: this is for packed weights and narrow maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lk_backbones._private.torch import convolution_pointwise, reorder_convolution_weight

__all__ = ["bands_conv2d", "pack_bands"]


def pack_bands(weight: Tensor, input_shape: Sequence[int]) -> Tensor:
    """Make the band matrices, in bfloat16, and lay them out as oneDNN computes with them.

    They have ``C * kH * W * W`` elements.

    Args:
        weight: ``(C, 1, kH, kW)``, odd sizes, float32 or bfloat16, on the CPU.
        input_shape: ``(N, C, H, W)`` of a typical input; others of that width work too.

    Returns:
        An opaque tensor for `bands_conv2d`: it cannot be copied, saved or moved.
    """
    weight = weight.detach().bfloat16()
    batch, channels, height, width = input_shape
    rows, columns = weight.shape[2:]
    # Offset by offset from width - 1 to the left to width - 1 to the right, which is all that meets on a row.
    margin = width - 1 - columns // 2
    taps = F.pad(weight[:, 0], (margin, margin))
    matrices = taps.unfold(2, width, 1).flip(2)  # (C, kH, column of the output, column of the input)
    matrices = matrices.permute(0, 2, 3, 1).reshape(channels * width, width, rows, 1)
    shape = [batch, channels * width, height, 1]
    return reorder_convolution_weight(matrices.contiguous(), [rows // 2, 0], [1, 1], [1, 1], channels, shape)


def bands_conv2d(
    input: Tensor, packed: Tensor, bias: Tensor | None = None, activation: tuple[str, str] = ("none", "")
) -> Tensor:
    """Depthwise convolution with stride 1 and zero padding that keeps the map's size, then an activation.

    Sums are in float32 and rounded once. A NaN or an infinity in the input reaches all of the rows whose windows
    cover it.

    Args:
        input: ``(N, C, H, W)``, any strides; is converted to bfloat16.
        packed: From `pack_bands`, for maps of this width.
        bias: ``(C,)``, float32 or bfloat16, or ``None``.
        activation: As `lk_backbones.ops.packed_conv2d`.

    Returns:
        ``(N, C, H, W)``, bfloat16, channels_last. No gradient flows through it.
    """
    input = input.bfloat16()
    batch, channels, height, width = input.shape
    rows = input.permute(0, 2, 1, 3).reshape(batch, height, 1, channels * width).permute(0, 3, 1, 2)
    bias = None if bias is None else bias.repeat_interleave(width)
    padding = [packed.shape[2] // 2, 0]
    output = convolution_pointwise(rows, packed, bias, padding, [1, 1], [1, 1], channels, activation=activation)
    maps = output.permute(0, 2, 3, 1).reshape(batch, height, channels, width).permute(0, 2, 1, 3)
    return maps.contiguous(memory_format=torch.channels_last)
