"""Depthwise convolution on CUDA devices: which paths there are, which one the rule takes, and how each computes."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from lk_backbones.ops import _fft
from lk_backbones.ops._plan import Plan
from lk_backbones.ops._shapes import taps_inside
from lk_backbones.ops._tuning import Tuner

_log = logging.getLogger(__name__)

# Cost per transformed value and per log2 of their number, in multiply-adds of PyTorch's own kernel. An estimate from
# memory traffic that awaits its fit on a GPU.
FFT_COST = 8.0
SMALLEST_KERNEL = 7  # below, PyTorch's operators are as fast as anything
TENSOR_CORES = (8, 0)  # compute capability from which Triton's products are good; before, they spill registers

# PyTorch's operator, told which library to use where PyTorch can be told.
LIBRARIES = {"cudnn": "cudnn", "aten": "native"}
# PyTorch's operator in a memory format that may not be the input's.
FORMATS = {"native-contiguous": torch.contiguous_format, "native-channels_last": torch.channels_last}
# These compute on maps and kernels as `_operators` prepares them; the others are PyTorch's operator.
TRITON = "triton"


@functools.cache
def _kernels() -> ModuleType | None:
    """Return the module of Triton kernels, or ``None`` where there is no Triton; importing it takes its time."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module("lk_backbones.ops._triton")
        if torch.cuda.is_available() and torch.version.hip is None:
            _ = kernels.triton.runtime.driver.active  # compiles its way to the driver, once for all: needs a C compiler
        return kernels
    except Exception as error:  # a Triton that does not fit its Python or driver; everything works without it
        _log.warning("convolutions on GPUs do without kernels of their own, as Triton cannot be used: %s", error)
        return None


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """Return the compute capability of a device; without one, that of those that the rule is planned for."""
    if torch.version.hip is not None:
        return 0, 0  # AMD's numbers mean something else, and nothing was tried there
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else TENSOR_CORES


def precision(dtype: torch.dtype) -> str:
    """Return whether PyTorch may round the factors of convolutions in a type: ``"tf32"``, else ``"ieee"``."""
    return "tf32" if dtype == torch.float32 and _convolutions_round() else "ieee"


def _convolutions_round() -> bool:
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def choose_paths(
    shape: tuple[int, int, int, int], kernel_size: tuple[int, int], dtype: torch.dtype, device: int = 0
) -> Plan:
    """Choose the paths by rule.

    Args:
        shape: Of the input, ``(N, C, H, W)``, not empty.
        kernel_size: ``(kH, kW)``, odd, at most ``(2H - 1, 2W - 1)``.
        dtype: Of the input.
        device: Index of the device.
    """
    if max(kernel_size) < SMALLEST_KERNEL:
        return Plan("native", "native", "native", f"kernel sides below {SMALLEST_KERNEL}")
    exact = dtype == torch.float64 or (dtype == torch.float32 and precision(dtype) == "ieee")
    if not exact and can_compute(TRITON, shape, kernel_size, dtype, device):
        name = str(dtype).removeprefix("torch.")
        rounding = " (TF32 is allowed)" if dtype == torch.float32 else ""
        return Plan(TRITON, TRITON, TRITON, f"estimated: products on tensor cores are fastest in {name}{rounding}")
    if min(kernel_size) < SMALLEST_KERNEL:
        return Plan("native", "native", "native", f"estimated: a kernel side below {SMALLEST_KERNEL}")
    (batch, _, height, width), (kernel_height, kernel_width) = shape, kernel_size
    taps = taps_inside(height, kernel_height) * taps_inside(width, kernel_width)
    rows, columns = _fft.transform_size((height, width), kernel_size)
    transform = FFT_COST * rows * columns * math.log2(rows * columns)
    forward, backward = (2 + 1 / batch) * transform / taps, (3 + 2 / batch) * transform / (2 * taps)
    reason = f"estimated cost of fft over PyTorch's kernels: {forward:.2f} forward, {backward:.2f} backward"
    gradients = "fft" if backward < 1 else "native"
    return Plan("fft" if forward < 1 else "native", gradients, gradients, reason)


def candidates(
    kind: str,
    shape: tuple[int, int, int, int],
    kernel_size: tuple[int, int],
    dtype: torch.dtype,
    channels_last: bool,
    device: int,
) -> list[str]:
    """Return the paths that are worth timing, the likely ones first.

    Args:
        kind: Which result is wanted.
        shape: Of the input, ``(N, C, H, W)``, not empty.
        kernel_size: ``(kH, kW)``, odd, at most ``(2H - 1, 2W - 1)``.
        dtype: Of the input.
        channels_last: Whether the input is laid out in channels_last.
        device: Index of the device.
    """
    other = "native-contiguous" if channels_last else "native-channels_last"
    kernels = _kernels()
    products = [] if kernels is None else kernels.worth_timing(kind, shape, dtype, precision(dtype))
    paths = [*products, "fft", "native", other, *LIBRARIES]
    return [path for path in paths if can_compute(path, shape, kernel_size, dtype, device)]


def can_compute(
    path: str, shape: tuple[int, int, int, int], kernel_size: tuple[int, int], dtype: torch.dtype, device: int
) -> bool:
    """Return whether a path, of whatever name, can be taken for a problem; arguments as of `candidates`."""
    if is_triton(path):
        kernels = _kernels() if capability(device) >= TENSOR_CORES else None
        if kernels is None or path not in kernels.CONFIGS:
            return False
        return bool(kernels.is_supported(shape, kernel_size, dtype, kernels.CONFIGS[path]))
    if path in LIBRARIES:
        return hasattr(torch.backends.cudnn, "depthwise_kernel") and not torch.backends.flags_frozen()
    return path in ("fft", "native", *FORMATS)


def convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None, path: str, addend: Tensor | None = None, relu: bool = False
) -> Tensor:
    """Convolution of ``(N, C, H, W)`` by ``"fft"``, in float32 or float64, or by a path of Triton's.

    The latter adds ``addend``, of the output's shape, and sets what is negative to zero along the way.
    """
    if path == "fft":
        return _fft.convolve(input.contiguous(), weight, bias)
    kernels, config = _config(path, input)
    output: Tensor = kernels.convolve(input, weight, bias, addend, relu, config=config, precision=_products(input))
    return output


def gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, path: str, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `convolve` in ``input`` and ``weight``, each ``None`` if not wanted."""
    if path == "fft":
        return _fft.gradients(grad_output.contiguous(), input.contiguous(), weight, output_mask)
    (kernels, config), products = _config(path, input), _products(input)
    grad_input = grad_weight = None
    if output_mask[0]:
        grad_input = kernels.convolve(grad_output, weight, flip=True, config=config, precision=products)
    if output_mask[1]:
        size = weight.shape[2], weight.shape[3]
        grad_weight = kernels.weight_gradient(grad_output, input, size, config=config, precision=products)
    return grad_input, grad_weight


def is_triton(path: str) -> bool:
    """Return whether a path is one of Triton's, which take float16 and bfloat16 as they are."""
    return path.partition("-")[0] == TRITON


def _config(path: str, input: Tensor) -> tuple[ModuleType, object]:
    kernels = _kernels()
    if kernels is None or path not in kernels.CONFIGS:
        raise ValueError(f"no path {path!r} on {input.device}")
    # Three products for one want more shared memory than the larger tiles leave on smaller cards.
    return kernels, kernels.CONFIGS["triton-small" if _products(input) == "tf32x3" else path]


def _products(input: Tensor) -> str:
    """Return how Triton multiplies: where TF32 may not stand in for float32, three of its products do."""
    if input.dtype != torch.float32:
        return "ieee"
    return "tf32" if precision(input.dtype) == "tf32" else "tf32x3"


_flag_lock = threading.RLock()  # backward threads of several devices would restore each other's setting


@contextmanager
def _library(name: str) -> Iterator[None]:
    with _flag_lock:
        before = torch.backends.cudnn.depthwise_kernel
        torch.backends.cudnn.depthwise_kernel = name
        try:
            yield
        finally:
            torch.backends.cudnn.depthwise_kernel = before


def told(path: str) -> AbstractContextManager[None]:
    """Return a context in which PyTorch's operator computes by a path that is one of its own."""
    return _library(LIBRARIES[path]) if path in LIBRARIES else nullcontext()


def may_measure() -> bool:
    """Return whether there may be a wait for the device: not while a CUDA graph is captured, or a program traced."""
    return not (
        torch.compiler.is_compiling() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def must_follow_rule() -> bool:
    """Return whether nothing may depend on what was measured: deterministic algorithms are the same in every run."""
    return bool(torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic)


def device_name(device: int) -> str:
    """Name a device with its compute capability."""
    if not torch.cuda.is_available():
        return "no device"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.major}.{properties.minor})"


def milliseconds(run: Callable[[], object], calls: int) -> float:
    """Time calls in a row on the current stream: as long as the device or the way to it takes, whichever is longer."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


@functools.cache
def _releases(benchmark: bool) -> str:
    kernels = _kernels()
    parts = [f"torch {torch.__version__}"]
    if kernels is not None:
        parts.append(f"triton {kernels.triton.__version__} with kernels {kernels.VERSION}")
    if torch.backends.cudnn.is_available():
        parts.append(f"cudnn {torch.backends.cudnn.version()}{', benchmarked' if benchmark else ''}")
    return ", ".join(parts)


tuner = Tuner(device_name, milliseconds, releases=lambda: _releases(torch.backends.cudnn.benchmark))
