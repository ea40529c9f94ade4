"""Depthwise convolution through the discrete Fourier transform: its cost hardly grows with the kernel.

Same-size output needs only that no offset between two pixels of the map wraps around into the kernel's reach, so
transforms of length ``H + kH // 2`` (not ``H + kH - 1``) are enough. Channels go in chunks whose temporaries stay
small: large ones would be paged in afresh by the operating system on every call.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK_BYTES = 500_000  # per CPU thread: with the temporaries, about a core's second-level cache
CHUNK_SHARE = 0.45  # of the input's bytes: with several threads no chunk is larger, unless as large as one thread's
CUDA_CHUNK_BYTES = 256_000_000  # bounds the temporaries
ROWS_DETOUR, COLUMNS_DETOUR = 1.14, 1.4  # see good_length


@functools.cache
def good_length(length: int, detour: float) -> int:
    """Return the even length of at least ``length`` whose transforms take the least time.

    Lengths without a prime factor above 7 count; odd ones transform half as fast. Of the even ones multiples of 16 and,
    almost, of 24 are fastest; the others take up to ``detour`` times as long per element.
    """
    candidates = [even for even in range(length + length % 2, 2 * length + 2, 2) if _has_small_factors(even)]
    return min(candidates, key=lambda n: n * (1.0 if n % 16 == 0 else 1.05 if n % 24 == 0 else detour))


def _has_small_factors(length: int) -> bool:
    for factor in (2, 3, 5, 7):
        while length % factor == 0:
            length //= factor
    return length == 1


def transform_size(map_size: tuple[int, int], kernel_size: tuple[int, int]) -> tuple[int, int]:
    """Size ``(rows, columns)`` of the transforms for a map ``(H, W)`` and a kernel ``(kH, kW)``.

    Along the columns real numbers are transformed, whose time depends far more on the length (docs/depthwise.md).
    """
    rows, columns = (n + k // 2 for n, k in zip(map_size, kernel_size, strict=True))
    return good_length(rows, ROWS_DETOUR), good_length(columns, COLUMNS_DETOUR)


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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


def gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `convolve`; both together share the transform of ``grad_output``.

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
            if grad_input is not None and kernels is not None:
                grad_input[images, channels] = _restore_maps(spectrum * kernels, size, _map_size(input))
            if grad_weight is not None:
                # Conjugated at once: inside compiled graphs a lazy conjugate is not always resolved.
                product = spectrum.conj_physical_().mul_(_transform_maps(input[images, channels], size))
                product = product[0] if len(product) == 1 else product.sum(0)
                total = product if total is None else total.add_(product)
        if grad_weight is not None and total is not None:
            grad_weight[channels, 0] = _restore_kernels(total, size, (height, width))
    return grad_input, grad_weight


def _map_size(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[-2], tensor.shape[-1]


def maps_per_chunk(shape: Sequence[int], map_bytes: int, budget: int) -> tuple[int, int]:
    """Channels and images that are transformed at once, for an input ``(N, C, H, W)``.

    Args:
        shape: Of the input.
        map_bytes: Size of one map's transform.
        budget: Size of one chunk's.
    """
    images, channels = shape[:2]
    maps = max(1, budget // map_bytes)
    # Several channels per chunk before several images: the kernels' transforms are shared by the images.
    channel_step = _even_step(channels, max(8, maps // images))
    return channel_step, min(images, max(1, maps // channel_step))


def _chunks(input: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, list[slice]]]:
    """Slices over channels, each with slices over images, such that one chunk's transforms fit the caches."""
    (images, channels), map_bytes = input.shape[:2], size[0] * size[1] * input.element_size()
    budget = CUDA_CHUNK_BYTES
    if not input.is_cuda:
        budget = min(CHUNK_BYTES * torch.get_num_threads(), max(CHUNK_BYTES, int(CHUNK_SHARE * input.nbytes)))
    channel_step, image_step = maps_per_chunk(input.shape, map_bytes, budget)
    image_chunks = [slice(start, start + image_step) for start in range(0, images, image_step)]
    for start in range(0, channels, channel_step):
        yield slice(start, start + channel_step), image_chunks


def _even_step(total: int, step: int) -> int:
    """Return the largest step up to ``step`` that cuts ``total`` into parts of almost the same size."""
    return math.ceil(total / math.ceil(total / step))


def _transform_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.fft.rfft2(maps, s=size)


def _transform_kernels(kernels: Tensor, size: tuple[int, int]) -> Tensor:
    """Spectra of the kernels ``(C, kH, kW)`` with the centre tap at the origin, so that nothing shifts."""
    padded = kernels.new_zeros(kernels.shape[0], *size)
    for place, part in _quadrants(_map_size(kernels)):
        padded[place] = kernels[part]
    return torch.fft.rfft2(padded)


def _restore_kernels(spectrum: Tensor, size: tuple[int, int], kernel_size: tuple[int, int]) -> Tensor:
    """Inverse of `_transform_kernels`."""
    padded = torch.fft.irfft2(spectrum, s=size)
    kernels = padded.new_empty(padded.shape[0], *kernel_size)
    for place, part in _quadrants(kernel_size):
        kernels[part] = padded[place]
    return kernels


def _quadrants(kernel_size: tuple[int, int]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Where each quarter of a kernel lies, corner to corner with the others, when its centre is at the origin."""
    everything = slice(None)
    for (row, part_row), (column, part_column) in itertools.product(*map(_halves, kernel_size)):
        yield (everything, row, column), (everything, part_row, part_column)


def _halves(size: int) -> list[tuple[slice, slice]]:
    """Places from the origin on with the taps from the centre on; places before the origin with the taps before it."""
    half = size // 2
    later, earlier = (slice(0, size - half), slice(half, size)), (slice(-half, None), slice(0, half))
    return [later, earlier] if half else [later]


def _restore_maps(spectrum: Tensor, size: tuple[int, int], map_size: tuple[int, int]) -> Tensor:
    rows = torch.fft.ifft(spectrum, dim=-2)[..., : map_size[0], :]  # crop before the second half
    return torch.fft.irfft(rows, n=size[1])[..., : map_size[1]]
