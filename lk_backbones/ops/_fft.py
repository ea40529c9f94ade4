"""Depthwise convolution through the discrete Fourier transform: its cost hardly grows with the kernel.

Same-size output needs only that no offset between two pixels of the map wraps around into the kernel's reach, so
transforms of length ``H + kH // 2`` (not ``H + kH - 1``) are enough. Channels go in chunks whose temporaries stay
small: large ones would be paged in afresh by the operating system on every call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 500_000  # per CPU thread: with the temporaries, about a core's second-level cache
CUDA_CHUNK_BYTES = 256_000_000  # bounds the temporaries


@functools.cache
def good_length(length: int) -> int:
    """Smallest even length of at least ``length`` without a prime factor above 7; odd ones transform half as fast."""
    length += length % 2
    while True:
        rest = length
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 2


def transform_size(map_size: tuple[int, int], kernel_size: tuple[int, int]) -> tuple[int, int]:
    """Size ``(rows, columns)`` of the transforms for a map ``(H, W)`` and a kernel ``(kH, kW)``."""
    rows, columns = (good_length(n + k // 2) for n, k in zip(map_size, kernel_size, strict=True))
    return rows, columns


def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution.

    Args:
        input: ``(N, C, H, W)``, float32 or float64, contiguous.
        weight: ``(C, 1, kH, kW)``, odd sizes of at most ``(2H - 1, 2W - 1)``.
        bias: ``(C,)`` or ``None``.

    Returns:
        ``(N, C, H, W)``, contiguous.
    """
    size = transform_size(_map_size(input), _map_size(weight))
    output = torch.empty_like(input)
    for channels, image_chunks in _chunks(input, size):
        kernels = _transform_kernels(weight[channels, 0], size).conj_physical_()
        for images in image_chunks:
            spectrum = _transform_maps(input[images, channels], size).mul_(kernels)
            output[images, channels] = _restore_maps(spectrum, size, _map_size(input))
    return output if bias is None else output.add_(bias[:, None, None])


def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`forward`; both together share the transform of ``grad_output``.

    Args:
        grad_output: ``(N, C, H, W)``, contiguous.
        input: ``(N, C, H, W)``, contiguous.
        weight: ``(C, 1, kH, kW)``.
        output_mask: Whether the gradients of ``input`` and of ``weight`` are wanted.

    Returns:
        The gradients of ``input`` and ``weight``, each ``None`` if not wanted.
    """
    (height, width), size = _map_size(weight), transform_size(_map_size(input), _map_size(weight))
    grad_input = torch.empty_like(input) if output_mask[0] else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if output_mask[1] else None
    for channels, image_chunks in _chunks(input, size):
        kernels = _transform_kernels(weight[channels, 0], size) if output_mask[0] else None
        total: Tensor | None = None
        for images in image_chunks:
            spectrum = _transform_maps(grad_output[images, channels], size)
            if grad_weight is not None:
                # Conjugated at once: inside compiled graphs a lazy conjugate is not always resolved.
                product = spectrum.conj_physical().mul_(_transform_maps(input[images, channels], size)).sum(0)
                total = product if total is None else total.add_(product)
            if grad_input is not None and kernels is not None:
                grad_input[images, channels] = _restore_maps(spectrum.mul_(kernels), size, _map_size(input))
        if grad_weight is not None:
            wrapped = torch.fft.irfft2(total, s=size).roll((height // 2, width // 2), (-2, -1))
            grad_weight[channels, 0] = wrapped[:, :height, :width]
    return grad_input, grad_weight


def _map_size(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[-2], tensor.shape[-1]


def _chunks(input: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, list[slice]]]:
    """Slices over channels, each with slices over images, such that one chunk's transforms fit the caches."""
    (images, channels), map_bytes = input.shape[:2], size[0] * size[1] * input.element_size()
    budget = CUDA_CHUNK_BYTES if input.is_cuda else CHUNK_BYTES * torch.get_num_threads()
    maps = max(1, budget // map_bytes)
    # Several channels per chunk before several images: the kernels' transforms are shared by the images.
    channel_step = min(channels, max(8, maps // images))
    image_step = max(1, maps // channel_step)
    image_chunks = [slice(start, start + image_step) for start in range(0, images, image_step)]
    for start in range(0, channels, channel_step):
        yield slice(start, start + channel_step), image_chunks


def _transform_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.fft.rfft2(maps, s=size)


def _transform_kernels(kernels: Tensor, size: tuple[int, int]) -> Tensor:
    """Spectra of the kernels ``(C, kH, kW)`` with the centre tap at the origin, so that nothing shifts."""
    height, width = _map_size(kernels)
    padded = F.pad(kernels, (0, size[1] - width, 0, size[0] - height))
    return torch.fft.rfft2(padded.roll((-(height // 2), -(width // 2)), (-2, -1)))


def _restore_maps(spectrum: Tensor, size: tuple[int, int], map_size: tuple[int, int]) -> Tensor:
    rows = torch.fft.ifft(spectrum, dim=-2)[..., : map_size[0], :]  # crop before the second half
    return torch.fft.irfft(rows, n=size[1])[..., : map_size[1]]
