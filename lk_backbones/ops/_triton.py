"""Depthwise convolution on NVIDIA GPUs as matrix products on tensor cores, written in Triton: nothing to compile.

A depthwise convolution is a product of the map with a block-Toeplitz matrix of the kernel. One program computes a tile
of ``rows`` × ``columns`` output pixels of one channel for many images at once:

- N, the columns of the product, are the pixels of the output tile;
- M, the rows, are (tile row, image) pairs: the Toeplitz block depends on where a pixel lies within its tile and not on
  which tile or image it is, so they all share it, and M is full at any batch size;
- K are the pixels of the input window, in steps of ``block_k`` pixels.

The Toeplitz block is never built. It is read out of a copy of the kernel with zeros around it, in which no index can
leave the copy, so it needs no mask. The copy exists ``V`` times, each shifted by one more column, ``V`` values being 16
bytes: so every run of ``V`` entries starts at a multiple of 16 bytes and loads as one vector, like those of the map.

The weight gradient is the adjoint of the same: the product over M of window and output gradient gives the gradient of
every Toeplitz block, and a second kernel sums the entries that belong to one tap. Nothing is added atomically, so the
same input gives the same bits.

Source: the extension of the RepLKNet paper (arXiv 2203.06717) also computes a product per channel, with the images
alone as M and a gather per Toeplitz entry.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["CONFIGS", "Config", "convolve", "is_supported", "weight_gradient", "worth_timing"]

VERSION = 1  # of the kernels: what was measured of another one counts for nothing
SCRATCH_BYTES = 128 * 2**20  # bounds the gradients of the Toeplitz blocks that wait for their sum
LARGEST_OFFSET = 2**31 - 1  # offsets within one program's maps are 32 bits wide
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as triton reads it when kernels are defined


@dataclass(frozen=True)
class Config:
    """How the products are cut up.

    Attributes:
        block_m: (tile row, image) pairs of a program.
        block_n: Output pixels of a tile, at most.
        block_k: Input pixels of one step; half as many of float32.
        warps: Of a program.
        stages: Of the software pipeline.
        pad: Whether rows whose length is no multiple of 16 bytes are copied to ones that are. Rows of a multiple of 8
            bytes can do without.
        cached: Whether operands go through the first-level cache, in which neighbouring steps find most of theirs.
        narrow: Whether windows may be as narrow as makes the fewest products, although their short rows take more
            instructions and cache lines per byte.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    pad: bool = True
    cached: bool = True
    narrow: bool = False


# What the tuner tries, the first is what the rule takes.
CONFIGS: dict[str, Config] = {
    "triton": Config(128, 128, 64, 8, 3),
    "triton-wide": Config(128, 256, 64, 8, 3),
    "triton-narrow": Config(128, 128, 64, 8, 3, narrow=True),
    "triton-small": Config(64, 64, 64, 4, 3),
    "triton-uncached": Config(128, 128, 64, 8, 3, cached=False),
    "triton-unpadded": Config(128, 128, 64, 8, 3, pad=False),
}


@dataclass(frozen=True)
class Tiling:
    """Where tiles and windows lie, of one shape.

    Attributes:
        rows: Output rows of a tile.
        columns: Output columns of a tile.
        window_rows: Input rows of one step.
        window_columns: Input columns of one step.
        reach: Columns by which a window begins before its tile, a multiple of 8; 0 where a tile spans the map.
        row_steps: Steps that cover every row from the tile's first tap to its last.
        column_steps: Steps that cover every column of a window.
        products: Multiplications for one image and channel, roughly, those by zero included.
    """

    rows: int
    columns: int
    window_rows: int
    window_columns: int
    reach: int
    row_steps: int
    column_steps: int
    products: float


# How much dearer a product is whose window has rows of so many columns, unless a configuration is narrow.
ROW_COSTS = {64: 1.0, 32: 1.1, 16: 1.35, 8: 1.7}


@functools.lru_cache(maxsize=4096)
def choose_tiling(
    height: int, width: int, kernel_size: tuple[int, int], config: Config, itemsize: int, clipped: bool = True
) -> Tiling:
    """Choose the tiling that multiplies the fewest numbers.

    Args:
        height: Of the map.
        width: Of the map.
        kernel_size: ``(kH, kW)``.
        config: How products are cut up.
        itemsize: Bytes of a value.
        clipped: Whether the parts of windows to the left and right of the map are left out.
    """
    block_n, block_k = config.block_n, _block_k(config, itemsize)
    best: tuple[float, Tiling] | None = None
    for columns in (64, 32, 16, 8):
        if columns > 8 and (columns >= 2 * width or columns > block_n):
            continue
        rows = max(16 // columns, min(block_n // columns, _power_of_two(height)))
        tiles = math.ceil(width / columns)
        reach = 0 if tiles == 1 else _round_up(kernel_size[1] // 2, 8)
        for window_columns in (64, 32, 16, 8):
            if window_columns > block_k:
                continue
            window_rows = block_k // window_columns
            window = min(width, columns) + kernel_size[1] // 2 + reach if tiles > 1 else width
            column_steps = math.ceil(window / window_columns)
            row_steps = math.ceil((kernel_size[0] - 1 + rows) / window_rows)
            steps = tiles * column_steps
            if clipped:
                windows = (_window(tile * columns, columns, width, reach, kernel_size[1]) for tile in range(tiles))
                steps = sum(math.ceil((end - start) / window_columns) for start, end in windows)
            # Steps that lie outside the map are left out: on average the taps' share that is inside.
            inside = min(1.0, height / (kernel_size[0] - 1 + rows))
            products = steps * max(1.0, row_steps * (inside if row_steps > 2 else 1)) * math.ceil(height / rows)
            products *= block_k * rows * columns
            cost = products * (1.0 if config.narrow else ROW_COSTS[window_columns])
            tiling = Tiling(rows, columns, window_rows, window_columns, reach, row_steps, column_steps, products)
            if best is None or cost < best[0] * 0.95:
                best = cost, tiling
    assert best is not None
    return best[1]


def _block_k(config: Config, itemsize: int) -> int:
    return config.block_k if itemsize < 4 else config.block_k // 2


def _window(first: int, columns: int, width: int, reach: int, kernel_width: int) -> tuple[int, int]:
    """First column of a tile's window and the one after its last."""
    return max(0, first - reach), min(width, first + columns + kernel_width // 2)


def _shift_range(tiling: Tiling, width: int, kernel_width: int) -> tuple[int, int]:
    """Smallest and largest column of the kernel, also beyond it, that an entry of any tile's Toeplitz block reads."""
    low, high = 0, 0
    for first in range(0, width, tiling.columns):
        start, end = _window(first, tiling.columns, width, tiling.reach, kernel_width)
        steps = math.ceil((end - start) / tiling.window_columns)
        low = min(low, start - first - (tiling.columns - 1) + kernel_width // 2)
        high = max(high, start - first + steps * tiling.window_columns - 1 + kernel_width // 2)
    return low, high


@functools.lru_cache(maxsize=4096)
def _split_rows(batch: int, row_tiles: int, block_m: int, image_values: int) -> int:
    """Return how many images a program takes, a power of two; the rest of M are tile rows.

    Of the splits that waste least, the one with the most images: they share what they read of the kernel.
    """
    images = block_m
    best = (math.inf, 1)
    while images >= 1:
        fits = images == 1 or images * image_values <= LARGEST_OFFSET
        programs = math.ceil(batch / images) * math.ceil(row_tiles / (block_m // images))
        if fits and programs < best[0]:
            best = programs, images
        images //= 2
    return best[1]


def _power_of_two(number: int) -> int:
    return 1 << max(0, (number - 1).bit_length())


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


# What differs between batches and maps: Triton would compile anew where one is 1 or a multiple of 16. How operands are
# aligned is in constants of the kernels.
VARYING = [
    *("batch", "channel_blocks", "image_blocks", "column_tiles", "half_height", "half_width", "left"),
    *("splits", "row_blocks", "channel_first", "kernel_height", "kernel_width", "above"),
    *("height", "input_width", "input_channel", "input_image"),
    *("output_width", "output_channel", "output_image", "channel_stride", "image_stride"),
]


def _jit(kernel: Any) -> Any:
    names = inspect.signature(kernel).parameters
    return triton.jit(kernel, do_not_specialize=[name for name in VARYING if name in names])


@_jit
def _copy_kernel(
    weight,
    copies,
    kernel_height,
    kernel_width,
    above,
    left,
    COPY_HEIGHT: tl.constexpr,
    COPY_WIDTH: tl.constexpr,
    COPIES: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the shifted copies of kernels ``(C, kH, kW)``: ``(C, COPIES, COPY_HEIGHT, COPY_WIDTH)``, zeros around."""
    SIZE: tl.constexpr = COPIES * COPY_HEIGHT * COPY_WIDTH
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    channel = (tl.program_id(0) // BLOCKS).to(tl.int64)
    index = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    shift = index // (COPY_HEIGHT * COPY_WIDTH)
    row = (index // COPY_WIDTH) % COPY_HEIGHT - above
    column = index % COPY_WIDTH + shift - left
    inside = (row >= 0) & (row < kernel_height) & (column >= 0) & (column < kernel_width) & (index < SIZE)
    if FLIP:
        row = kernel_height - 1 - row
        column = kernel_width - 1 - column
    value = tl.load(
        weight + channel * (kernel_height * kernel_width) + row * kernel_width + column, mask=inside, other=0.0
    )
    tl.store(copies + channel * SIZE + index, value, mask=index < SIZE)


@_jit
def _convolve_kernel(
    input,
    copies,
    output,
    bias,
    addend,
    batch,
    height,
    input_width,  # in units of INPUT_UNIT values, as all that is of the input
    input_channel,
    input_image,
    output_width,  # in units of OUTPUT_UNIT
    output_channel,
    output_image,
    channel_blocks,
    image_blocks,
    column_tiles,
    half_height,
    half_width,
    left,
    KERNEL_STEPS: tl.constexpr,
    COPY_HEIGHT: tl.constexpr,
    COPY_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    REACH: tl.constexpr,
    ONE_COLUMN_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IMAGES: tl.constexpr,
    COPIES: tl.constexpr,
    INPUT_UNIT: tl.constexpr,
    OUTPUT_UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    RELU: tl.constexpr,
    CACHE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    TILE_ROWS: tl.constexpr = BLOCK_M // IMAGES
    pitch = input_width * INPUT_UNIT
    width = output_width * OUTPUT_UNIT
    channel = tl.program_id(0) // channel_blocks
    block = tl.program_id(0) % channel_blocks
    image_first = (block % image_blocks) * IMAGES
    column_tile = (block // image_blocks) % column_tiles
    row_first = (block // image_blocks // column_tiles) * (TILE_ROWS * ROWS)
    row_last = tl.minimum(row_first + (TILE_ROWS - 1) * ROWS, height - 1)

    column_first = column_tile * COLUMNS
    start = tl.maximum(column_tile * (COLUMNS // 8) - REACH // 8, 0) * 8
    end = tl.minimum(column_first + COLUMNS + half_width, width)

    # Steps of rows that meet the map at all.
    step_first = tl.maximum(half_height - row_last, 0) // WINDOW_ROWS
    step_last = tl.minimum((height - 1 - row_first + half_height) // WINDOW_ROWS + 1, KERNEL_STEPS)

    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, WINDOW_ROWS * WINDOW_COLUMNS)
    n = tl.arange(0, ROWS * COLUMNS)
    tile_row, image = m // IMAGES, m % IMAGES
    window_row, window_column = k // WINDOW_COLUMNS, k % WINDOW_COLUMNS
    row, column = n // COLUMNS, n % COLUMNS

    channel_long = channel.to(tl.int64)
    image_long = image_first.to(tl.int64)
    input_base = input + (channel_long * input_channel + image_long * input_image) * INPUT_UNIT
    input_base += (row_first - half_height) * pitch + start
    input_offset = (
        (image * (input_image * INPUT_UNIT))[:, None]
        + (tile_row[:, None] * ROWS + window_row[None, :]) * pitch
        + window_column[None, :]
    )
    input_row = row_first - half_height + tile_row[:, None] * ROWS + window_row[None, :]
    present = image[:, None] < batch - image_first
    columns_left = pitch - start

    copies_base = copies + channel_long * (COPIES * COPY_HEIGHT * COPY_WIDTH) + (start - column_first)
    kernel_column = half_width + left - column
    copies_offset = (
        (kernel_column % COPIES) * (COPY_HEIGHT * COPY_WIDTH)
        + (ROWS - 1 - row) * COPY_WIDTH
        + (kernel_column // COPIES) * COPIES
    )[None, :] + (window_row * COPY_WIDTH + window_column)[:, None]

    total = tl.zeros((BLOCK_M, ROWS * COLUMNS), tl.float32)
    if ONE_COLUMN_STEP:
        for step in range(step_first, step_last):
            first = step * WINDOW_ROWS
            inside = present & (input_row + first >= 0) & (input_row + first < height)
            inside &= window_column[None, :] < columns_left
            maps = tl.load((input_base + first * pitch) + input_offset, mask=inside, other=0.0, cache_modifier=CACHE)
            toeplitz = tl.load((copies_base + first * COPY_WIDTH) + copies_offset, cache_modifier=CACHE)
            if UPCAST:
                maps = maps.to(tl.float32)
                toeplitz = toeplitz.to(tl.float32)
            total = tl.dot(maps, toeplitz, total, input_precision=PRECISION)
    else:
        column_steps = (end - start + WINDOW_COLUMNS - 1) // WINDOW_COLUMNS
        for step in range(step_first * column_steps, step_last * column_steps):
            first = (step // column_steps) * WINDOW_ROWS
            across = (step % column_steps) * WINDOW_COLUMNS
            inside = present & (input_row + first >= 0) & (input_row + first < height)
            inside &= window_column[None, :] < columns_left - across
            maps = tl.load(
                (input_base + first * pitch + across) + input_offset, mask=inside, other=0.0, cache_modifier=CACHE
            )
            toeplitz = tl.load((copies_base + first * COPY_WIDTH + across) + copies_offset, cache_modifier=CACHE)
            if UPCAST:
                maps = maps.to(tl.float32)
                toeplitz = toeplitz.to(tl.float32)
            total = tl.dot(maps, toeplitz, total, input_precision=PRECISION)

    output_start = (channel_long * output_channel + image_long * output_image) + row_first * width + column_first
    output_offset = (
        (image * output_image)[:, None] + (tile_row[:, None] * ROWS + row[None, :]) * width + column[None, :]
    )
    wanted = present & (row_first + tile_row[:, None] * ROWS + row[None, :] < height)
    wanted &= column[None, :] < width - column_first
    if HAS_BIAS:
        total += tl.load(bias + channel).to(tl.float32)
    if HAS_ADDEND:
        total += tl.load(addend + output_start + output_offset, mask=wanted, other=0.0).to(tl.float32)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # a NaN stays one, as in PyTorch
    tl.store(output + output_start + output_offset, total.to(output.dtype.element_ty), mask=wanted)


@_jit
def _toeplitz_gradient_kernel(
    input,
    grad_output,
    scratch,
    channel_first,
    batch,
    height,
    input_width,  # in units of UNIT values, as all strides of both; the rows of both have this length
    channel_stride,
    image_stride,
    splits,
    image_blocks,
    column_tiles,
    row_blocks,
    half_height,
    ROW_STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IMAGES: tl.constexpr,
    UNIT: tl.constexpr,
    CACHE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write ``(channels, splits, steps, K, N)``: the gradients of the Toeplitz blocks of a group of channels."""
    TILE_ROWS: tl.constexpr = BLOCK_M // IMAGES
    K: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    N: tl.constexpr = ROWS * COLUMNS
    STEPS: tl.constexpr = ROW_STEPS * COLUMN_STEPS
    pitch = input_width * UNIT
    split = tl.program_id(0) // STEPS % splits
    own_channel = tl.program_id(0) // STEPS // splits
    step = tl.program_id(0) % STEPS
    first = (step // COLUMN_STEPS) * WINDOW_ROWS - half_height
    across = (step % COLUMN_STEPS) * WINDOW_COLUMNS - REACH

    # Blocks of tile rows whose windows meet the map at this step, and of these this split's part.
    block_rows = TILE_ROWS * ROWS
    rows_above = tl.maximum(-first - (WINDOW_ROWS - 1) - (block_rows - 1), 0)
    block_first = (rows_above + block_rows - 1) // block_rows
    block_last = tl.minimum(tl.maximum(height - first + block_rows - 1, 0) // block_rows, row_blocks)
    per_row_block = column_tiles * image_blocks
    blocks = tl.maximum(block_last - block_first, 0) * per_row_block
    per_split = (blocks + splits - 1) // splits
    begin = block_first * per_row_block + split * per_split
    end = tl.minimum(begin + per_split, block_first * per_row_block + blocks)

    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, K)
    n = tl.arange(0, N)
    tile_row, image = m // IMAGES, m % IMAGES
    window_row, window_column = k // WINDOW_COLUMNS, k % WINDOW_COLUMNS
    row, column = n // COLUMNS, n % COLUMNS
    channel_long = (channel_first + own_channel).to(tl.int64) * (channel_stride * UNIT)
    offset = (image * (image_stride * UNIT))[:, None] + (tile_row * (ROWS * pitch))[:, None]
    input_offset = offset + (window_row * pitch + window_column)[None, :]
    grad_offset = offset + (row * pitch + column)[None, :]
    input_row = tile_row[:, None] * ROWS + window_row[None, :]
    grad_row = tile_row[:, None] * ROWS + row[None, :]

    total = tl.zeros((K, N), tl.float32)
    for index in range(begin, end):
        image_first = (index % image_blocks) * IMAGES
        column_first = (index // image_blocks % column_tiles) * COLUMNS
        row_first = (index // per_row_block) * block_rows
        base = channel_long + image_first.to(tl.int64) * image_stride * UNIT + row_first * pitch + column_first
        present = image[:, None] < batch - image_first
        inside = present & (input_row + (row_first + first) >= 0) & (input_row + (row_first + first) < height)
        window_first = column_first + across
        inside &= (window_column[None, :] + window_first >= 0) & (window_column[None, :] < pitch - window_first)
        maps = tl.load(
            (input + base + first * pitch + across) + input_offset, mask=inside, other=0.0, cache_modifier=CACHE
        )
        wanted = present & (grad_row + row_first < height) & (column[None, :] < pitch - column_first)
        grad = tl.load((grad_output + base) + grad_offset, mask=wanted, other=0.0, cache_modifier=CACHE)
        if UPCAST:
            maps = maps.to(tl.float32)
            grad = grad.to(tl.float32)
        total = tl.dot(tl.trans(maps), grad, total, input_precision=PRECISION)
    target = scratch + ((own_channel * splits + split) * STEPS + step).to(tl.int64) * (K * N)
    tl.store(target + (k[:, None] * N + n[None, :]), total)


@_jit
def _sum_kernel(
    scratch,
    grad_weight,
    channel_first,
    splits,
    kernel_height,
    kernel_width,
    left,
    ROW_STEPS: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the entries of the Toeplitz blocks' gradients that are one tap's: one program per channel and kernel row."""
    K: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    N: tl.constexpr = ROWS * COLUMNS
    STEPS: tl.constexpr = ROW_STEPS * COLUMN_STEPS
    own_channel = tl.program_id(0) // kernel_height
    kernel_row = tl.program_id(0) % kernel_height
    kernel_column = tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)[None, :]
    position = kernel_column[:, None] + (column - left)
    inside = (kernel_column[:, None] < kernel_width) & (position >= 0) & (position < COLUMN_STEPS * WINDOW_COLUMNS)
    entry = (position // WINDOW_COLUMNS) * (K * N) + (position % WINDOW_COLUMNS) * N + column
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for split in range(splits):
        source = scratch + (own_channel * splits + split).to(tl.int64) * (STEPS * K * N)
        for row in range(ROWS):
            window_row = kernel_row + row
            part = (window_row // WINDOW_ROWS) * COLUMN_STEPS * (K * N)
            part += (window_row % WINDOW_ROWS) * WINDOW_COLUMNS * N + row * COLUMNS
            total += tl.load(source + part + entry, mask=inside, other=0.0)
    channel = (channel_first + own_channel).to(tl.int64)
    target = grad_weight + (channel * kernel_height + kernel_row) * kernel_width + kernel_column
    tl.store(target, tl.sum(total, 1), mask=kernel_column < kernel_width)


def is_supported(shape: Sequence[int], kernel_size: tuple[int, int], dtype: torch.dtype, config: Config) -> bool:
    """Return whether the kernels are made for a problem.

    Args:
        shape: Of the input, ``(N, C, H, W)``.
        kernel_size: ``(kH, kW)``, odd.
        dtype: Of the input.
        config: How to cut it up.
    """
    row_bytes = shape[3] * dtype.itemsize
    return (
        dtype in DTYPES
        and (shape[2] + kernel_size[0]) * (shape[3] + kernel_size[1])
        < 2**24  # offsets within a map, with room to spare
        and (config.pad or (row_bytes % 8 == 0 and row_bytes % 16 != 0))  # not the same as the padded one
    )


def worth_timing(kind: str, shape: Sequence[int], dtype: torch.dtype, precision: str) -> list[str]:
    """Return the names of the configurations that may be best, the likely ones first; each costs its compilation.

    Args:
        kind: ``"forward"``, ``"input_gradient"`` or ``"weight_gradient"``.
        shape: Of the input, ``(N, C, H, W)``.
        dtype: Of the input.
        precision: Of products of float32: ``"ieee"`` or ``"tf32"``.
    """
    if dtype == torch.float32 and precision == "ieee":  # three products each: larger tiles want too many registers
        return ["triton-small"]
    names = ["triton", "triton-wide", "triton-unpadded"]
    if kind == "weight_gradient" and dtype == torch.float32:
        names.remove("triton-wide")  # for some maps of a class it takes more shared memory than smaller cards have
    if shape[3] > 32:  # smaller maps are one tile wide
        names.append("triton-narrow")
    if kind != "weight_gradient":
        names.append("triton-uncached")
    pixels = shape[0] * shape[2] * shape[3]
    return [*names, "triton-small"] if pixels < 128 * 128 else names


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    relu: bool = False,
    flip: bool = False,
    config: Config = CONFIGS["triton"],
    precision: str = "ieee",
) -> Tensor:
    """Depthwise convolution with stride 1 and the map's size kept; with ``flip`` its gradient in the input.

    Beside its result it takes the memory of the copies, ``C × V × (kH + block_n / 4 + block_k / 8) × (kW + 224)``
    values at most, ``V`` values being 16 bytes, and, where rows are padded or the input is not contiguous, one more
    input.
    Kernels that are much taller than wide are turned, which takes one more input and output.

    Args:
        input: ``(N, C, H, W)``, float16, bfloat16 or float32, not empty, any strides.
        weight: ``(C, 1, kH, kW)``, odd sizes, of the input's dtype.
        bias: ``(C,)`` to be added, or ``None``.
        addend: ``(N, C, H, W)`` of the input's dtype to be added, or ``None``.
        relu: Whether negative values become zero at last.
        flip: Whether the kernel is turned by 180 degrees.
        config: How to cut the products up.
        precision: Of the products of float32: ``"ieee"``, ``"tf32"``, or ``"tf32x3"`` (three products of tf32 that
            together are nearly as exact as float32).

    Returns:
        ``(N, C, H, W)``, contiguous, of the input's dtype; sums are float32.
    """
    batch, channels, height, width = input.shape
    kernel_height, kernel_width = weight.shape[2:]
    if _is_faster_turned((height, width), (kernel_height, kernel_width), config):
        relu_within = relu and addend is None
        turned, weight = input.transpose(2, 3), weight.transpose(2, 3)
        output = convolve(turned, weight, bias, None, relu_within, flip, config, precision).transpose(2, 3)
        if addend is None:
            return output.contiguous()
        output = torch.add(addend.contiguous(), output)  # the pass that turns it back adds
        return output.relu_() if relu else output
    vector = 16 // input.element_size()
    maps = _with_pitch(input, vector, config.pad)
    pitch = maps.shape[3]
    tiling = choose_tiling(height, width, (kernel_height, kernel_width), config, input.element_size())
    low, high = _shift_range(tiling, width, kernel_width)
    left = -low
    copy_height = tiling.rows - 1 + tiling.row_steps * tiling.window_rows
    copy_width = _round_up(left + high + 1, vector)
    copies = input.new_empty(channels, vector, copy_height, copy_width)
    output = torch.empty((batch, channels, height, width), dtype=input.dtype, device=input.device)
    row_tiles, column_tiles = math.ceil(height / tiling.rows), math.ceil(width / tiling.columns)
    images = _split_rows(batch, row_tiles, config.block_m, channels * height * pitch)
    image_blocks, row_blocks = math.ceil(batch / images), math.ceil(row_tiles / (config.block_m // images))
    blocks = image_blocks * row_blocks * column_tiles
    input_unit, output_unit = math.gcd(pitch, vector), math.gcd(width, vector)
    block = 1024
    with _on_device(input):
        _copy_kernel[(channels * math.ceil(vector * copy_height * copy_width / block),)](
            weight.contiguous(),
            copies,
            kernel_height,
            kernel_width,
            tiling.rows - 1,
            left,
            COPY_HEIGHT=copy_height,
            COPY_WIDTH=copy_width,
            COPIES=vector,
            FLIP=flip,
            BLOCK=block,
        )
        _convolve_kernel[(channels * blocks,)](
            maps,
            copies,
            output,
            output if bias is None else bias.contiguous(),
            output if addend is None else addend.contiguous(),
            batch,
            height,
            pitch // input_unit,
            height * pitch // input_unit,
            channels * height * pitch // input_unit,
            width // output_unit,
            height * width,
            channels * height * width,
            blocks,
            image_blocks,
            column_tiles,
            kernel_height // 2,
            kernel_width // 2,
            left,
            KERNEL_STEPS=tiling.row_steps,
            COPY_HEIGHT=copy_height,
            COPY_WIDTH=copy_width,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            WINDOW_ROWS=tiling.window_rows,
            WINDOW_COLUMNS=tiling.window_columns,
            REACH=tiling.reach,
            ONE_COLUMN_STEP=tiling.column_steps == 1,
            BLOCK_M=config.block_m,
            IMAGES=images,
            COPIES=vector,
            INPUT_UNIT=input_unit,
            OUTPUT_UNIT=output_unit,
            HAS_BIAS=bias is not None,
            HAS_ADDEND=addend is not None,
            RELU=relu,
            CACHE=".ca" if config.cached else "",
            PRECISION=precision,
            UPCAST=INTERPRETED,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return output


def weight_gradient(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: tuple[int, int],
    config: Config = CONFIGS["triton"],
    precision: str = "ieee",
) -> Tensor:
    """Gradient of `convolve` in its weight; deterministic, as nothing is added atomically.

    Beside its result it takes the memory of the Toeplitz blocks' gradients, at most 128 MiB or those of one channel
    (``splits × (kH + block_n / 8 + block_k / 8) × (kW + 136) × block_n`` float32 values at most), and, where rows are
    padded, an operand is not contiguous or a kernel is turned, that of one more such operand.

    Args:
        grad_output: ``(N, C, H, W)``, of the input's dtype, any strides.
        input: ``(N, C, H, W)``, float16, bfloat16 or float32, not empty, any strides.
        kernel_size: ``(kH, kW)``, odd.
        config: As `convolve`.
        precision: As `convolve`.

    Returns:
        ``(C, 1, kH, kW)``, float32.
    """
    batch, channels, height, width = input.shape
    if _is_faster_turned((height, width), kernel_size, config):
        turned = kernel_size[1], kernel_size[0]
        output = weight_gradient(grad_output.transpose(2, 3), input.transpose(2, 3), turned, config, precision)
        return output.transpose(2, 3).contiguous()
    vector = 16 // input.element_size()
    maps, grad = _with_pitch(input, vector, config.pad), _with_pitch(grad_output, vector, config.pad)
    pitch = maps.shape[3]
    tiling = choose_tiling(height, width, kernel_size, config, input.element_size(), clipped=False)
    steps = tiling.row_steps * tiling.column_steps
    row_tiles, column_tiles = math.ceil(height / tiling.rows), math.ceil(width / tiling.columns)
    block_m = min(config.block_m, 64)
    images = _split_rows(batch, row_tiles, block_m, channels * height * pitch)
    image_blocks, row_blocks = math.ceil(batch / images), math.ceil(row_tiles / (block_m // images))
    # Few channels would leave most of the GPU idle, so that each sum goes to several programs.
    programs_wanted = 4 * _multiprocessors(input)
    splits = max(1, min(programs_wanted // (channels * steps), image_blocks * row_blocks * column_tiles))
    entries = splits * steps * _block_k(config, input.element_size()) * tiling.rows * tiling.columns
    group = max(1, min(channels, SCRATCH_BYTES // (4 * entries)))
    scratch = torch.empty(group * entries, dtype=torch.float32, device=input.device)
    output = torch.empty((channels, 1, *kernel_size), dtype=torch.float32, device=input.device)
    unit = math.gcd(pitch, vector)
    geometry: dict[str, Any] = {
        "ROW_STEPS": tiling.row_steps,
        "COLUMN_STEPS": tiling.column_steps,
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
        "WINDOW_ROWS": tiling.window_rows,
        "WINDOW_COLUMNS": tiling.window_columns,
    }
    with _on_device(input):
        for first in range(0, channels, group):
            own = min(group, channels - first)
            _toeplitz_gradient_kernel[(own * splits * steps,)](
                maps,
                grad,
                scratch,
                first,
                batch,
                height,
                pitch // unit,
                height * pitch // unit,
                channels * height * pitch // unit,
                splits,
                image_blocks,
                column_tiles,
                row_blocks,
                kernel_size[0] // 2,
                **geometry,
                REACH=tiling.reach,
                BLOCK_M=block_m,
                IMAGES=images,
                UNIT=unit,
                CACHE=".ca" if config.cached else "",
                PRECISION=precision,
                UPCAST=INTERPRETED,
                num_warps=config.warps,
                num_stages=config.stages,
            )
            _sum_kernel[(own * kernel_size[0],)](
                scratch,
                output,
                first,
                splits,
                *kernel_size,
                kernel_size[1] // 2 - tiling.reach,
                **geometry,
                BLOCK=_power_of_two(kernel_size[1]),
                num_warps=4,
            )
    return output


def _is_faster_turned(map_size: tuple[int, int], kernel_size: tuple[int, int], config: Config) -> bool:
    """Return whether rows and columns are to change places: a tall narrow kernel makes few of its products count.

    That takes a copy of the input and one of the output, so it must save more than a little.
    """
    if kernel_size[0] <= kernel_size[1]:
        return False
    as_is = choose_tiling(*map_size, kernel_size, config, itemsize=2)
    turned = choose_tiling(*map_size[::-1], kernel_size[::-1], config, itemsize=2)
    return as_is.products > 1.5 * turned.products


def _with_pitch(maps: Tensor, vector: int, pad: bool) -> Tensor:
    """Return maps contiguous in NCHW and, if wanted, with zeros after each row up to a whole number of vectors."""
    missing = -maps.shape[3] % vector if pad else 0
    if missing:  # F.pad would keep channels_last, and that take a second copy
        padded = maps.new_empty(*maps.shape[:3], maps.shape[3] + missing)
        padded[..., : maps.shape[3]] = maps
        padded[..., maps.shape[3] :] = 0
        return padded
    maps = maps.contiguous()
    return maps if maps.data_ptr() % 16 == 0 else maps.clone()  # a view may begin anywhere


def _on_device(tensor: Tensor) -> Any:
    """Kernels run on the current device; make it the tensor's."""
    return torch.cuda.device_of(tensor)


@functools.cache
def _multiprocessors_of(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _multiprocessors(tensor: Tensor) -> int:
    return _multiprocessors_of(tensor.get_device()) if tensor.is_cuda else 1
