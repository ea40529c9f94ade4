"""Depthwise convolution on CUDA devices: PyTorch's own operators or Fourier transforms, by rule.

Kernels written for the GPU plug in here: a new path in `choose_paths` and its branch in `convolve` and
`gradients`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lk_backbones.ops import _fft
from lk_backbones.ops._plan import Plan
from lk_backbones.ops._shapes import taps_inside

# Cost per transformed value and per log2 of their number, in multiply-adds of PyTorch's own kernel. An estimate from
# memory traffic that awaits its fit on a GPU.
FFT_COST = 8.0
SMALLEST_KERNEL = 7  # below, PyTorch's operators are as fast as anything


def choose_paths(shape: tuple[int, int, int, int], kernel_size: tuple[int, int], dtype: torch.dtype) -> Plan:
    """Choose the paths.

    Args:
        shape: Of the input, ``(N, C, H, W)``, not empty.
        kernel_size: ``(kH, kW)``, odd, at most ``(2H - 1, 2W - 1)``.
        dtype: Of the input.
    """
    if min(kernel_size) < SMALLEST_KERNEL:
        return Plan("native", "native", f"a kernel side below {SMALLEST_KERNEL}")
    (batch, _, height, width), (kernel_height, kernel_width) = shape, kernel_size
    taps = taps_inside(height, kernel_height) * taps_inside(width, kernel_width)
    rows, columns = _fft.transform_size((height, width), kernel_size)
    transform = FFT_COST * rows * columns * math.log2(rows * columns)
    forward, backward = (2 + 1 / batch) * transform / taps, (3 + 2 / batch) * transform / (2 * taps)
    reason = f"estimated cost of fft over PyTorch's kernels: {forward:.2f} forward, {backward:.2f} backward"
    return Plan("fft" if forward < 1 else "native", "fft" if backward < 1 else "native", reason)


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, path: str) -> Tensor:
    """Convolution of ``(N, C, H, W)``, float32 or float64, by a path of `choose_paths` other than ``"native"``."""
    if path != "fft":
        raise ValueError(f"no path {path!r} on CUDA")
    return _fft.convolve(input.contiguous(), weight, bias)


def gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, path: str, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `convolve` in ``input`` and ``weight``, each ``None`` if not wanted."""
    if path != "fft":
        raise ValueError(f"no path {path!r} on CUDA")
    return _fft.gradients(grad_output.contiguous(), input.contiguous(), weight, output_mask)
