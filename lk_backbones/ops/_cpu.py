"""Depthwise convolution on CPUs, arranged so that oneDNN's and MKL's fast routines do the work.

PyTorch reaches oneDNN's fast depthwise kernel for wide kernels only from channels_last tensors, and for the weight
gradient of kernels wider than 3 never: it falls back to a matrix product per channel that is 20-60 times slower.
Both are a matter of how the call is put. The functions here ask for the same numbers in the way that runs fast; for
the largest kernels and maps they go through Fourier transforms instead.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lk_backbones._private.torch import has_amx, has_avx512_bf16
from lk_backbones.ops import _fft
from lk_backbones.ops._plan import Plan
from lk_backbones.ops._shapes import is_channels_last, nchw, taps_inside

# The weight gradient uses the output's gradient as the kernel, and oneDNN keeps tables per tap: bands bound them.
MAX_TAPS = 4096

# Costs in units of one multiply-add of the direct path, fitted to benchmarks/depthwise.py --paths, one thread and two.
FFT_COST = {"AVX512": 7.5, "AVX2": 4.0}  # per transformed value and per log2 of their number, by vector instructions
CHUNK_COST = 4e6  # of the calls for one chunk of transforms in the forward; a half more in the backward
DIRECT_BACKWARD = 2.3  # the two gradients of the direct path in units of its forward
SLOW_DIRECT = 4  # how much cheaper a transform looks without AVX2 where oneDNN has no fast kernel to compete
COPY_COST = 30.0  # per value that changes its memory format
CONVERT_COST = 15.0  # per value of a map that changes its dtype
KERNEL_COST = 30.0  # per value of a kernel that changes its dtype
DIRECT_BFLOAT16 = 1.45  # oneDNN's bfloat16 kernel in channels_last in units of the float32 one
BANDS_COST = 1 / 5.5  # per multiply-add of the products with band matrices, in which columns count in blocks of 32
READ_COST = 4.0  # per element of the band matrices, which come from memory


def choose_paths(
    shape: tuple[int, int, int, int],
    kernel_size: tuple[int, int],
    dtype: torch.dtype,
    channels_last: bool,
    packed: bool = False,
) -> Plan:
    """Choose the paths.

    Args:
        shape: Of the input, ``(N, C, H, W)``, not empty.
        kernel_size: ``(kH, kW)``, odd, at most ``(2H - 1, 2W - 1)``.
        dtype: Of the input.
        channels_last: Whether the input is laid out in channels_last.
        packed: Whether the weight is packed ahead, for any path of its own: only then may the forward be ``"bands"``.
    """
    instructions = _instructions()
    (batch, channels, height, width), (kernel_height, kernel_width) = shape, kernel_size
    if dtype == torch.float64:  # oneDNN computes in float32 only
        path = "fft" if kernel_height * kernel_width >= 49 else "native"
        return Plan(path, path, path, "float64")
    lanes = 16 if instructions == "AVX512" else 8
    taps = taps_inside(height, kernel_height) * taps_inside(width, kernel_width)
    taps = math.ceil(taps * math.ceil(channels / lanes) * lanes / channels)
    rows, columns = _fft.transform_size((height, width), kernel_size)
    transform = FFT_COST.get(instructions, FFT_COST["AVX2"]) * rows * columns * math.log2(rows * columns)
    if instructions not in FFT_COST and kernel_width // 2 > widest_padding():
        transform /= SLOW_DIRECT
    # With more threads chunks grow, and so does what could be computed during the calls for one.
    calls = CHUNK_COST / math.prod(_fft.maps_per_chunk(shape, 4 * rows * columns, _fft.CHUNK_BYTES))
    copy = COPY_COST * height * width
    # Half precision is converted to float32 and back, where oneDNN does not take it as it is.
    convert = 0.0 if dtype == torch.float32 else 2 * CONVERT_COST * height * width
    convert_kernel = 0.0 if dtype == torch.float32 else KERNEL_COST * kernel_height * kernel_width / batch
    as_is = channels_last or kernel_width // 2 <= widest_padding()  # oneDNN is fast in the format at hand
    possible = min(kernel_size) >= 7 and torch.backends.mkl.is_available()

    fft_forward = (2 + 1 / batch) * transform + calls + (2 * copy if channels_last else 0)
    direct_forward = taps + (0 if as_is else 2 * copy)
    fft_backward = (3 + 2 / batch) * transform + 1.5 * calls + (3 * copy if channels_last else 0)
    direct_backward = DIRECT_BACKWARD * taps + (1 if channels_last else 0 if as_is else 3) * copy
    costs = {"direct": direct_forward + convert + (0 if packed else convert_kernel)}
    if possible:
        costs["fft"] = fft_forward + convert + convert_kernel
    if as_is and not (channels_last and columns_in_channels_last(kernel_width, width, batch) != kernel_width):
        if dtype == torch.float32:
            costs = {"native": taps, **costs}  # rather than direct, which costs the same
        elif dtype == torch.bfloat16 and channels_last and computes_bfloat16():  # in NCHW twice as slow as in float32
            costs["native"] = DIRECT_BFLOAT16 * taps
    if packed and dtype == torch.bfloat16 and channels_last and computes_bfloat16() and has_amx():
        products = height * width * math.ceil(width / 32) * 32
        bands = kernel_height * (BANDS_COST * products + READ_COST * width * width / batch)
        costs["bands"] = bands + copy
    backward = "fft" if possible and fft_backward < direct_backward else "direct"
    return Plan(
        min(costs, key=costs.__getitem__),
        backward,
        backward,
        f"{instructions}, {'channels_last' if channels_last else 'NCHW'}; estimated cost of "
        f"fft over direct: {fft_forward / direct_forward:.2f} forward, {fft_backward / direct_backward:.2f} backward",
    )


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, path: str) -> Tensor:
    """Depthwise convolution with stride 1 and the map's size kept.

    Args:
        input: ``(N, C, H, W)``, float32 or float64, not empty, any strides.
        weight: ``(C, 1, kH, kW)``, odd sizes of at most ``(2H - 1, 2W - 1)``.
        bias: ``(C,)`` or ``None``.
        path: ``"direct"`` or ``"fft"``.

    Returns:
        ``(N, C, H, W)`` in whichever memory format the path ends in.
    """
    return _fft.convolve(nchw(input), weight, bias) if path == "fft" else _convolve_directly(input, weight, bias)


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    path: str,
    output_mask: list[bool],
    dilation: tuple[int, int] = (1, 1),
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `convolve` in ``input`` and ``weight``, each ``None`` if not wanted.

    A dilation other than 1 must be narrow, see `is_narrow`, and the path ``"direct"``.
    """
    if path == "fft":
        return _fft.gradients(nchw(grad_output), nchw(input), weight, output_mask)
    grad_input = None
    if output_mask[0]:
        if dilation == (1, 1):
            grad_input = _convolve_directly(grad_output, weight.flip(2, 3), None)
        else:
            padding = (dilation[0] * (weight.shape[2] // 2), dilation[1] * (weight.shape[3] // 2))
            grad_input = F.conv2d(grad_output, weight.flip(2, 3), None, 1, padding, dilation, weight.shape[0])
    grad_weight = None
    if output_mask[1]:
        grad_weight = _weight_grad(grad_output, input, (weight.shape[2], weight.shape[3]), dilation)
    return grad_input, grad_weight


def _convolve_directly(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution in the memory format that oneDNN is fast in."""
    if _needs_channels_last(input, weight.shape[3]):
        input = input.contiguous(memory_format=torch.channels_last)
        weight = widen(weight, input.shape[3], input.shape[0])
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(input, weight, bias, padding=padding, groups=input.shape[1])


def _weight_grad(
    grad_output: Tensor, input: Tensor, kernel_size: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> Tensor:
    """Weight gradient as a depthwise convolution of the input with the output's gradient as its kernel.

    Taps ``dilation`` pixels apart make it a convolution of that stride. One image at a time: folding the batch into the
    channels costs more in transposes than it saves. oneDNN wants that kernel in NCHW whatever the format of the input.
    """
    batch, channels, height, width = input.shape
    pad_height, pad_width = dilation[0] * (kernel_size[0] // 2), dilation[1] * (kernel_size[1] // 2)
    rows = max(1, MAX_TAPS // width)
    padding = (0, pad_width) if rows < height else (pad_height, pad_width)
    if rows < height:
        input = F.pad(input, (0, 0, pad_height, pad_height))
    if _needs_channels_last(input, kernel_size[1]):
        input = input.contiguous(memory_format=torch.channels_last)
    kernels = nchw(grad_output)
    if batch == 1 and rows >= height:  # the rest for one part; indexing costs as much as a small convolution
        return F.conv2d(input, kernels.transpose(0, 1), None, dilation, padding, (1, 1), channels).transpose(0, 1)
    parts = (
        F.conv2d(
            image[:, :, top : top + rows + 2 * pad_height],
            kernel[:, :, top : top + rows],
            stride=dilation,
            padding=padding,
            groups=channels,
        )
        for image, kernel in zip(input.split(1), kernels.unsqueeze(2), strict=True)
        for top in range(0, height, rows)
    )
    return functools.reduce(Tensor.add_, parts).reshape(channels, 1, *kernel_size)


@functools.cache
def _instructions() -> str:
    """Widest vector instructions that PyTorch uses: ``"AVX512"``, ``"AVX2"`` or another name."""
    return torch.backends.cpu.get_cpu_capability() if torch.backends.mkldnn.is_available() else "no oneDNN"


def computes_bfloat16() -> bool:
    """Return whether oneDNN multiplies bfloat16 numbers as they are, adding up in float32.

    Where it does not, it imitates that, or leaves the work to far slower code.
    """
    return _instructions() == "AVX512" and has_avx512_bf16()


def _needs_channels_last(input: Tensor, kernel_width: int) -> bool:
    """Return whether oneDNN is fast at this width in channels_last only, or the input is in that format anyway."""
    return is_channels_last(input) or kernel_width // 2 > widest_padding()


def columns_in_channels_last(kernel_width: int, map_width: int, batch: int) -> int:
    """Return how wide a kernel of that width is computed in channels_last.

    oneDNN's register blocking is so poor at some widths that 15 taps take less time; on a single narrow map, padding
    the kernel costs what it saves.
    """
    enough = {11: 14, 13: 8}.get(kernel_width)
    worth_it = enough is not None and batch * map_width >= enough and _instructions() == "AVX512"
    return 15 if worth_it else kernel_width


def widen(weight: Tensor, map_width: int, batch: int) -> Tensor:
    """Pad a kernel ``(C, 1, kH, kW)`` with zeros to as many columns as it is computed with in channels_last."""
    columns = columns_in_channels_last(weight.shape[3], map_width, batch)
    return weight if columns == weight.shape[3] else F.pad(weight, [(columns - weight.shape[3]) // 2] * 2)


def is_narrow(kernel_width: int, dilation: tuple[int, int]) -> bool:
    """Return whether oneDNN is fast at a dilated kernel as it stands, in either memory format."""
    return dilation != (1, 1) and dilation[1] * (kernel_width // 2) <= widest_padding()


def widest_padding() -> int:
    """Widest padding on the left with which oneDNN is fast in NCHW or dilated: it must fit the register block."""
    return {"AVX512": 6, "AVX2": 4}.get(_instructions(), 3)
