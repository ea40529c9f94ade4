"""Which path a depthwise convolution takes: by rule, or as was measured on the device at hand."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lk_backbones.ops import _cpu, _cuda
from lk_backbones.ops._plan import Plan, resolve_method
from lk_backbones.ops._shapes import crop_kernel, is_channels_last, phase_size
from lk_backbones.ops._tuning import KINDS, Choice, Kind, Problem, is_lost

_log = logging.getLogger(__name__)

MEASURING = ("auto", "lookup")  # methods that what was measured counts for

Operands = tuple[Tensor | None, ...]


def device_type(tensor: Tensor) -> str:
    """Return the type of the device whose paths a tensor's convolution takes."""
    return tensor.device.type


def native_is_best(device: str, weight: Tensor, dilation: tuple[int, int]) -> bool:
    """Return whether PyTorch's own operator is best whatever the map, so that nothing need stand before it."""
    if device == "cpu":
        return weight.shape[3] <= 3 and dilation == (1, 1)
    return device != "cuda" or max(weight.shape[2:]) < _cuda.SMALLEST_KERNEL


def plan_for(
    input: Tensor,
    weight: Tensor,
    dilation: tuple[int, int],
    method: str,
    device: str,
    packed: bool = False,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Choose the paths for an input ``(N, C, H, W)`` and a weight ``(C, 1, kH, kW)``, which may be packed ahead.

    The dtype is the input's if it is ``None``.
    """
    if method == "auto" and native_is_best(device, weight, dilation):
        reason = f"PyTorch is fast at {weight.shape[2]}x{weight.shape[3]} kernels on {device}"
        return Plan("native", "native", "native", reason)
    return _cached_plan(
        input.shape,
        weight.shape,
        input.dtype if dtype is None else dtype,
        is_channels_last(input),
        dilation,
        resolve_method(method),
        device,
        packed,
        _cuda.precision(input.dtype) if device == "cuda" else "ieee",
        _index(input) if device == "cuda" else 0,
    )


@functools.lru_cache(maxsize=4096)
def _cached_plan(
    input_shape: torch.Size,
    weight_shape: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    dilation: tuple[int, int],
    method: str,
    device: str,
    packed: bool,
    precision: str,
    index: int,
) -> Plan:
    if 0 in input_shape:
        return Plan("native", "native", "native", "the input is empty")
    if method == "native" or (method == "direct" and device != "cpu"):
        return Plan("native", "native", "native", f"method {method!r} asked for")
    shape, kernel_size = _dense(input_shape, weight_shape, dilation)
    forced = {"cpu": ("direct", "fft"), "cuda": ("fft", "triton", "cudnn", "aten")}.get(device, ("fft",))
    lacking = ""
    if method in forced:
        if device != "cuda" or _cuda.can_compute(method, shape, kernel_size, dtype, index):
            return Plan(method, method, method, f"method {method!r} asked for")
        lacking = f"method {method!r} asked for, which is not to be had for this device and dtype; "
    if device not in ("cpu", "cuda"):
        return Plan("native", "native", "native", f"{lacking}nothing was tried on {device}")
    if device == "cuda":
        plan = _cuda.choose_paths(shape, kernel_size, dtype, index)
        return replace(plan, reason=lacking + plan.reason)
    whole_kernel = weight_shape[2], weight_shape[3]
    chosen = _cpu.choose_paths(shape, kernel_size, dtype, channels_last, packed and dilation == (1, 1))
    if chosen.forward in ("fft", "bands") or (dilation == (1, 1) and kernel_size == whole_kernel):
        return chosen
    # The plan is for the cropped, dense problem, while the native path computes the one that was asked for.
    narrow = _cpu.is_narrow(whole_kernel[1], dilation)
    return replace(chosen, forward="native" if narrow else "direct")


def _dense(
    input_shape: Sequence[int], weight_shape: Sequence[int], dilation: tuple[int, int]
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Shape of the maps and size of the kernel that are computed with: no dilation, no tap out of reach."""
    batch, channels, height, width = input_shape
    rows, columns = phase_size((height, width), dilation)
    kernel_size = crop_kernel((weight_shape[2], weight_shape[3]), (rows, columns))
    return (batch * dilation[0] * dilation[1], channels, rows, columns), kernel_size


def _index(input: Tensor) -> int:
    """Index of the CUDA device of a tensor; of one on another device, that of the current one."""
    if input.is_cuda:
        return input.get_device()
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _problem(kind: Kind, input: Tensor, weight: Tensor, dilation: tuple[int, int]) -> Problem:
    return Problem(
        kind,
        input.shape,
        weight.shape[2:],
        dilation,
        input.dtype,
        is_channels_last(input),
        _cuda.precision(input.dtype),
        _index(input),
    )


def measured_plan(
    input: Tensor, weight: Tensor, dilation: tuple[int, int], method: str, device: str, packed: bool = False
) -> Plan:
    """Choose the paths as `plan_for`, or as was measured on the device at hand where that counts."""
    plan = plan_for(input, weight, dilation, method, device, packed)
    if device != "cuda" or _is_trivial(input, weight, dilation):
        return plan
    counts = _measuring_counts(resolve_method(method))
    choices: dict[str, Choice] = {}
    planned: dict[str, Any] = {}
    for kind in KINDS:
        problem = _problem(kind, input, weight, dilation)
        choice = _cuda.tuner.look_up(problem, _can_compute(problem)) if counts else _cuda.tuner.known.get(problem)
        if counts and choice is not None:
            choices[kind] = choice
        else:
            planned[kind] = _planned_path(problem, choice, input, weight, dilation, method)
    plan = replace(plan, **planned)
    if not choices:
        return plan
    reason = f"measured on {_cuda.device_name(_index(input))}"
    if estimated := [kind.replace("_", " ") for kind in KINDS if kind not in choices]:
        reason += f"; not yet measured: {', '.join(estimated)} ({plan.reason})"
    paths: dict[str, Any] = {kind: choice.path for kind, choice in choices.items()}
    milliseconds: dict[str, dict[str, float]] = {kind: dict(choice.milliseconds) for kind, choice in choices.items()}
    return replace(plan, **paths, reason=reason, milliseconds=milliseconds)


def _measuring_counts(method: str) -> bool:
    """Return whether what was measured on a CUDA device decides, for a method of `resolve_method`.

    Also in what is captured as a graph: no kernels can be loaded meanwhile, and those that the user's warm-up ran are.
    """
    return method in MEASURING and not _cuda.must_follow_rule()


def _is_trivial(input: Tensor, weight: Tensor, dilation: tuple[int, int]) -> bool:
    """Return whether there is nothing to measure on a CUDA device."""
    return 0 in input.shape or native_is_best("cuda", weight, dilation)


def _can_compute(problem: Problem) -> Callable[[str], bool]:
    shape, kernel_size = _dense(problem.shape, (0, 0, *problem.kernel_size), problem.dilation)
    return lambda path: _cuda.can_compute(path, shape, kernel_size, problem.dtype, problem.device)


def choose_path(
    kind: Kind,
    compute: Callable[[str, Operands], Tensor],
    operands: Operands,
    input: Tensor,
    weight: Tensor,
    dilation: tuple[int, int],
    method: str,
) -> str:
    """Choose the path of one result: on CUDA devices what was measured, measuring if need be, else by rule.

    Args:
        kind: Which result.
        compute: Computes it by a path from operands.
        operands: The numbers at hand.
        input: ``(N, C, H, W)``.
        weight: ``(C, 1, kH, kW)``.
        dilation: Of rows and columns.
        method: As `depthwise_conv2d`.
    """
    device = device_type(input)
    if device != "cuda":
        planned: str = getattr(plan_for(input, weight, dilation, method, device), kind)
        return planned
    mode = resolve_method(method)
    problem = _problem(kind, input, weight, dilation)
    choice = _cuda.tuner.known.get(problem)
    if _measuring_counts(mode):
        if choice is None and _cuda.may_measure() and not _is_trivial(input, weight, dilation):
            choice = _cuda.tuner.look_up(problem, _can_compute(problem))
            if choice is None and mode == "auto":
                choice = _measure(problem, compute, operands)
        if choice is not None:
            return choice.path
    return _planned_path(problem, choice, input, weight, dilation, method)


def _planned_path(
    problem: Problem, choice: Choice | None, input: Tensor, weight: Tensor, dilation: tuple[int, int], method: str
) -> str:
    """Return the path by rule, unless it is known to be wrong or impossible on this device."""
    path: str = getattr(plan_for(input, weight, dilation, method, "cuda"), problem.kind)
    if not _cuda.is_triton(path) or resolve_method(method) == path:  # who insists on it gets it
        return path
    if path in _cuda.tuner.broken:
        return "native"
    if choice is None:
        choice = _cuda.tuner.look_up(problem, _can_compute(problem))
    return "native" if choice is not None and path in choice.rejected else path


def _measure(problem: Problem, compute: Callable[[str, Operands], Tensor], operands: Operands) -> Choice | None:
    shape, kernel_size = _dense(problem.shape, (0, 0, *problem.kernel_size), problem.dilation)
    paths = _cuda.candidates(problem.kind, shape, kernel_size, problem.dtype, problem.channels_last, problem.device)

    def candidates(operands: Operands) -> dict[str, Callable[[], Tensor]]:
        return {path: functools.partial(compute, path, operands) for path in paths}

    def made_up() -> dict[str, Callable[[], Tensor]]:
        generator = torch.Generator(problem_device).manual_seed(0)  # the program's random numbers stay as they are
        return candidates(
            tuple(
                None if operand is None else torch.empty_like(operand).normal_(generator=generator)
                for operand in operands
            )
        )

    problem_device = next(operand.device for operand in operands if operand is not None)
    on_device = torch.cuda.device(problem_device) if problem_device.type == "cuda" else nullcontext()
    try:
        with torch.no_grad(), on_device:  # whose stream the clock is on
            return _cuda.tuner.measure(problem, candidates(operands), ("native", "fft"), made_up)
    except Exception as error:
        if is_lost(error):
            raise
        # What is taken by rule may need less, and if not says so itself.
        _log.warning("nothing could be measured for %s: %s", _cuda.tuner.key(problem), error)
        return None
