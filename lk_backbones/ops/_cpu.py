"""Depthwise convolution on CPUs, arranged so that oneDNN's fast kernels do the work.

PyTorch reaches oneDNN's fast depthwise kernel for wide kernels only from channels_last tensors, and for the weight
gradient of kernels wider than 3 never. Both are a matter of how the call is put: the functions here ask for the same
numbers in the way that runs fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The weight gradient uses the output's gradient as the kernel; oneDNN builds tables per tap of it, so their number is bounded.
MAX_TAPS = 4096


def direct_forward(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution in channels_last.

    Args:
        input: ``(N, C, H, W)``, any strides.
        weight: ``(C, 1, kH, kW)``, odd sizes.
        bias: ``(C,)`` or ``None``.

    Returns:
        ``(N, C, H, W)`` in channels_last.
    """
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    input = input.contiguous(memory_format=torch.channels_last)
    return F.conv2d(input, weight, bias, padding=padding, groups=input.shape[1])


def direct_weight_grad(input: Tensor, grad_output: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Weight gradient as a forward depthwise convolution of the input with the output's gradient as its kernel.

    Args:
        input: ``(N, C, H, W)``, any strides.
        grad_output: ``(N, C, H, W)``, any strides.
        kernel_size: ``(kH, kW)``, odd sizes.

    Returns:
        ``(C, 1, kH, kW)``.
    """
    (kernel_height, kernel_width), (batch, channels, height, width) = kernel_size, input.shape
    pad_height, pad_width = kernel_height // 2, kernel_width // 2
    input = input.contiguous(memory_format=torch.channels_last)
    rows = max(1, MAX_TAPS // width)
    if rows < height:
        input = F.pad(input, (0, 0, pad_height, pad_height)).contiguous(memory_format=torch.channels_last)
    grad: Tensor | None = None
    for image, grad_image in zip(input.split(1), grad_output.unsqueeze(2), strict=True):
        if rows >= height:
            part = F.conv2d(image, grad_image, padding=(pad_height, pad_width), groups=channels)
            grad = part if grad is None else grad.add_(part)
            continue
        for top in range(0, height, rows):
            band = grad_image[:, :, top : top + rows]
            window = image[:, :, top : top + band.shape[2] + 2 * pad_height]
            part = F.conv2d(window, band, padding=(0, pad_width), groups=channels)
            grad = part if grad is None else grad.add_(part)
    assert grad is not None  # the caller handles empty batches
    return grad.transpose(0, 1)
