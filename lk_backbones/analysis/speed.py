"""How fast models are, and how much memory they take: all in one run, in turn, so that ratios hold."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lk_backbones.analysis.levels import is_detector, tensors_in
from lk_backbones.analysis.memory import require_memory_to_run
from lk_backbones.analysis.timing import interleave, peak_memory
from lk_backbones.layers import prepack_weights, reparameterize
from lk_backbones.ops import depthwise_conv2d
from lk_backbones.weights.catalogue import published_mean_iou

__all__ = [
    "KERNEL_SIZES",
    "MAP_SIZES",
    "MODES",
    "OperatorSpeed",
    "Speed",
    "benchmark",
    "benchmark_operator",
    "inference_run",
    "training_run",
]

#: As it is; folded; weights packed too (CPU, float32 and bfloat16); folded and compiled; forward and backward, no
#: optimiser.
MODES = ("plain", "folded", "packed", "compiled", "training")

#: Of the table of RepLKNet's paper (its Table 1: C = 384, batch 64, on a GPU).
MAP_SIZES, KERNEL_SIZES = (16, 32, 64), (3, 5, 7, 9, 13, 17, 21, 27, 31)


@dataclass(frozen=True)
class Speed:
    """One model in one mode.

    Attributes:
        model: Its name.
        mode: One of `MODES`.
        parameters: Number of parameters as trained.
        macs: Multiply-adds of convolutions and matrix products for one image as trained, or ``None``.
        median_ms: Median time of a batch.
        quartiles_ms: Between these lies half of the times.
        fastest_ms: Shortest time.
        calls: Number of timed calls.
        images_per_second: By the median.
        peak_memory: Most bytes that PyTorch held at once beyond the parameters.
        mean_iou: Published mean IoU on ADE20K with UPerNet, single-scale, or ``None``.
    """

    model: str
    mode: str
    parameters: int
    macs: int | None
    median_ms: float
    quartiles_ms: tuple[float, float]
    fastest_ms: float
    calls: int
    images_per_second: float
    peak_memory: int
    mean_iou: float | None


@dataclass(frozen=True)
class OperatorSpeed:
    """The depthwise convolution on one shape.

    Attributes:
        map_size: Height and width of the maps.
        kernel_size: Of the kernel.
        ours_ms: Median time of a forward of `lk_backbones.ops.depthwise_conv2d`.
        torch_ms: The same of `torch.nn.functional.conv2d`.
    """

    map_size: int
    kernel_size: int
    ours_ms: float
    torch_ms: float


def inference_run(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Return a function that runs a model on images, without gradients.

    Args:
        model: In evaluation mode.
        images: ``(N, C, H, W)``.
    """

    def run() -> object:
        with torch.inference_mode():
            output = model(images)
        _wait(images.device)
        return output

    return run


def training_run(model: nn.Module, images: torch.Tensor, autocast: torch.dtype | None = None) -> Callable[[], object]:
    """Return a function that runs forward and backward, without an optimiser; the loss is the mean of the squares.

    Args:
        model: Is set to training mode.
        images: ``(N, C, H, W)``.
        autocast: Computes in this type where autocast does.
    """
    model.train()

    def run() -> object:
        model.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, autocast) if autocast else nullcontext():
            outputs = [tensor for _, tensor in tensors_in(model(images)) if tensor.requires_grad]
        torch.stack([tensor.float().square().mean() for tensor in outputs]).sum().backward()
        _wait(images.device)
        return None

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def benchmark(
    models: Mapping[str, nn.Module],
    modes: Sequence[str] = ("folded", "training"),
    size: tuple[int, int] = (224, 224),
    batch_size: int = 1,
    *,
    channels: Mapping[str, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    seconds: float = 30.0,
    progress: Callable[[str], None] = lambda step: None,
) -> list[Speed]:
    """Time models, each in some modes, all in turn, round after round; every one is warmed up.

    Args:
        models: Models by name; they are copied. In a lower precision inference casts the weights and training runs
            under autocast.
        modes: Out of `MODES`.
        size: ``(height, width)`` of the images.
        batch_size: Images in a batch.
        channels: Channels of the images of each model, 3 if it is not named.
        device: Where they run.
        dtype: What they run in.
        memory_format: Of images and weights.
        seconds: For each model and mode, on average.
        progress: Told what is about to be done.

    Returns:
        A row for each model and mode.

    Raises:
        ValueError: If a mode is unknown or impossible there, a model does not take such images, or memory is too small.
    """
    device = torch.device(device)
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"there is no mode {mode!r}; there are {', '.join(MODES)}")
    if "packed" in modes and (device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16)):
        raise ValueError("weights are packed for float32 and bfloat16 on CPUs only: leave out the mode 'packed'")
    runs: dict[str, Callable[[], object]] = {}
    facts: dict[str, tuple[str, str, int, int | None]] = {}
    for name, model in models.items():
        progress(f"preparing {name}")
        shape = (batch_size, (channels or {}).get(name, 3), *size)
        model = copy.deepcopy(model).eval()
        if "training" in modes and is_detector(model):
            raise ValueError(
                f"{name} is a detector, which cannot be trained without boxes: leave out the mode 'training'"
            )
        try:
            _require_memory(model, shape, modes)
            macs = _multiply_adds(model, (1, *shape[1:]))
            for mode in modes:
                key = f"{name} {mode}"
                images = torch.randn(shape).to(device, torch.float32 if mode == "training" else dtype)
                images = images.contiguous(memory_format=memory_format)
                made = _prepared(model, mode, device, dtype, memory_format)
                runs[key] = (
                    training_run(made, images, dtype if dtype != torch.float32 else None)
                    if mode == "training"
                    else inference_run(made, images)
                )
                progress(f"warming up {key}")
                runs[key]()
                facts[key] = (name, mode, sum(p.numel() for p in model.parameters()), macs)
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise ValueError(f"{name}: {device} has too little memory: {str(error).splitlines()[0]}") from error
            advice = ". Its norms need --batch-size 2" if "more than 1 value per channel" in str(error) else ""
            raise ValueError(f"{name}: {str(error).splitlines()[0]}{advice}") from error
    progress("timing")
    timings = interleave(runs, seconds * len(runs), patience=math.inf)
    rows = []
    for key, run in runs.items():
        name, mode, parameters, macs = facts[key]
        timing = timings[key]
        rows.append(
            Speed(
                name,
                mode,
                parameters,
                macs,
                timing.median,
                timing.quartiles,
                timing.best,
                len(timing.calls),
                1e3 * batch_size / timing.median,
                _peak(run, device),
                published_mean_iou(name),
            )
        )
    return rows


def benchmark_operator(
    channels: int = 384,
    batch_size: int = 1,
    map_sizes: Sequence[int] = MAP_SIZES,
    kernel_sizes: Sequence[int] = KERNEL_SIZES,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 1.0,
) -> Iterator[OperatorSpeed]:
    """Time the depthwise convolution beside PyTorch's, as the table of RepLKNet's paper has it (section 3, Table 1).

    Args:
        channels: Of the maps.
        batch_size: Maps at once.
        map_sizes: Heights and widths of the maps.
        kernel_sizes: Heights and widths of the kernels, odd.
        device: Where they run.
        dtype: What they run in.
        seconds: For each shape.

    Yields:
        A row for each shape.
    """
    for map_size in map_sizes:
        for kernel_size in kernel_sizes:
            maps = torch.randn(batch_size, channels, map_size, map_size, device=device, dtype=dtype)
            weight = torch.randn(channels, 1, kernel_size, kernel_size, device=device, dtype=dtype)

            def ours(maps: torch.Tensor = maps, weight: torch.Tensor = weight) -> object:
                with torch.inference_mode():
                    depthwise_conv2d(maps, weight)
                _wait(maps.device)
                return None

            def native(maps: torch.Tensor = maps, weight: torch.Tensor = weight) -> object:
                with torch.inference_mode():
                    F.conv2d(maps, weight, padding=weight.shape[2] // 2, groups=weight.shape[0])
                _wait(maps.device)
                return None

            timings = interleave({"ours": ours, "torch": native}, seconds)
            yield OperatorSpeed(map_size, kernel_size, timings["ours"].median, timings["torch"].median)


def _prepared(
    model: nn.Module, mode: str, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> nn.Module:
    made: Any = copy.deepcopy(model)
    if mode in ("folded", "compiled"):
        made = reparameterize(made, inplace=True)
    if mode != "training":
        made = made.to(dtype)
    made = made.to(device, memory_format=memory_format)
    if mode == "packed":
        made = prepack_weights(made, inplace=True)
    if mode == "compiled":
        made = torch.compile(made)
    prepared: nn.Module = made
    return prepared


def _require_memory(model: nn.Module, shape: tuple[int, ...], modes: Sequence[str]) -> None:
    size, copies = (shape[2], shape[3]), len(modes) + 2 * ("training" in modes)

    def infer(size: tuple[int, int]) -> object:
        return inference_run(model, torch.zeros(1, shape[1], *size))()

    def train(size: tuple[int, int]) -> object:
        # of two images, as norms may need; those of evaluation hold as much
        trained = training_run(copy.deepcopy(model), torch.zeros(2, shape[1], *size))
        return trained()

    if "training" in modes:
        require_memory_to_run(model, train, size, -(-shape[0] // 2), copies)
    else:
        require_memory_to_run(model, infer, size, shape[0], copies)


def _multiply_adds(model: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Count those of convolutions and matrix products, without computing anything where the model allows it."""
    for device in ("meta", "cpu"):
        try:
            counted = copy.deepcopy(model).to(device)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                counted(torch.zeros(shape, device=device))
        except (RuntimeError, NotImplementedError, ValueError):
            continue
        return int(counter.get_total_flops()) // 2
    return None


def _peak(run: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        return peak_memory(run)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before
