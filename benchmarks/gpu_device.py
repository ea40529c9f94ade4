"""The device of ``gpu.py``: its clock, its own top rates, what its errors mean, and a pretence for machines without."""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lk_backbones.ops import _cuda, _paths

FILL_BYTES = 2**28  # of the work that keeps a device busy while calls queue up behind it
TURN_MS = 2.0  # of calls in a row, at least
LOAD_MS = 1500.0  # of work for the card while the driver is asked how it is
SLOW, SLOW_MS = 10.0, 5.0  # who takes so many times as long as the fastest, and so long at all, is timed once


OUT_OF_MEMORY = "out of memory"


class DeviceLost(RuntimeError):
    """An error after which this process can do nothing more on the device."""


def first_line(error: BaseException) -> str:
    """Return type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def explain_failure(error: BaseException) -> str:
    """Return an error in words.

    Raises:
        DeviceLost: If the device does not work any more after it, as after an access to wrong memory.
    """
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    text = OUT_OF_MEMORY if out_of_memory else first_line(error)
    if torch.cuda.is_available():
        error.__traceback__ = None  # its frames hold tensors
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").item()
        except torch.OutOfMemoryError:
            pass
        except Exception as lost:
            raise DeviceLost(text if "CUDA" in text else f"{text}; then {first_line(lost)}") from error
        gc.collect()
        torch.cuda.empty_cache()
    return text


forbidden: set[str] = set()  # paths that nothing in this process takes any more


def forbid(path: str) -> None:
    """Let nothing in this process take a path any more, the tuner included."""
    if not forbidden:
        can_compute = _cuda.can_compute

        def can_still_compute(wanted: str, *arguments: Any) -> bool:
            return wanted not in forbidden and can_compute(wanted, *arguments)

        _cuda.can_compute = can_still_compute
    forbidden.add(path)
    _paths._cached_plan.cache_clear()  # which may say so


def free_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Times:
    """Times of one contestant, milliseconds per call.

    Attributes:
        called: Of calls in a row as a program makes them: as long as the device or Python takes, whichever is longer.
        device: Of the device alone: the calls waited behind other work, so that Python was ahead.
    """

    called: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float | int]:
        """Return best and median of both."""
        return {
            "device_ms_best": min(self.device),
            "device_ms_median": statistics.median(self.device),
            "called_ms_best": min(self.called),
            "called_ms_median": statistics.median(self.called),
            "samples": len(self.called),
        }


class Stopwatch:
    """Times calls on a device; on a CPU, for the pretence, by the clock on the wall."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._fill = torch.empty(FILL_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
        self._fill_ms = 1.0
        if device.type == "cuda":
            self._fill.zero_()
            self._fill_ms = max(self.called(self._fill.zero_, 20), 1e-3)

    def called(self, run: Callable[[], object], calls: int) -> float:
        """Milliseconds per call of calls in a row."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - begin) * 1e3 / calls
        torch.cuda.synchronize()
        return _cuda.milliseconds(run, calls)

    def alone(self, run: Callable[[], object], calls: int, python_ms: float) -> float:
        """Milliseconds per call that the device takes.

        Args:
            run: What is called.
            calls: How often.
            python_ms: How long a call keeps Python busy, about.
        """
        torch.cuda.synchronize()
        wait = 1.5 * python_ms * calls + 0.2
        for _ in range(min(400, round(wait / self._fill_ms) + 1)):
            self._fill.zero_()
        return _cuda.milliseconds(run, calls)

    def python(self, run: Callable[[], object]) -> float:
        """Milliseconds until a call returns, whether or not the device is done."""
        self.synchronize()
        begin = time.perf_counter()
        run()
        taken = (time.perf_counter() - begin) * 1e3
        self.synchronize()
        return taken

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def race(
        self, runs: dict[str, Callable[[], object]], seconds: float, rounds: int = 7
    ) -> tuple[dict[str, Times], dict[str, str]]:
        """Time contestants in turn, round after round.

        Args:
            runs: What is called, by name.
            seconds: After which no further round begins, once there were two.
            rounds: How many there are at most.

        Returns:
            The times of those that ran, and why the others did not.
        """
        times: dict[str, Times] = {}
        failed: dict[str, str] = {}
        calls: dict[str, int] = {}
        python_ms: dict[str, float] = {}
        fastest = math.inf
        for name, run in runs.items():
            try:
                run()  # compiles and plans
                first = self.called(run, 1)
                if first > max(SLOW * fastest, SLOW_MS):
                    times[name] = Times([first], [first])
                    continue
                if self.device.type == "cuda":
                    python_ms[name] = min(self.python(run) for _ in range(2))
            except Exception as error:
                failed[name] = explain_failure(error)
                continue
            fastest = min(fastest, first)
            times[name] = Times()
            calls[name] = max(1, min(20, round(TURN_MS / max(first, 1e-3))))
        begin = time.perf_counter()
        for number in range(rounds):
            if number >= 2 and time.perf_counter() - begin > seconds:
                break
            for name in [name for name in times if name in calls]:
                try:
                    called = self.called(runs[name], calls[name])
                    alone = self.device.type == "cuda"
                    device = self.alone(runs[name], calls[name], python_ms[name]) if alone else called
                except Exception as error:
                    failed[name] = explain_failure(error)
                    del times[name], calls[name]
                    continue
                times[name].called.append(called)
                times[name].device.append(device)
        return times, failed


def measure_rates(watch: Stopwatch) -> dict[str, object]:
    """Measure what the device reaches at most: TFLOP/s of matrix products by type, GB/s of a copy."""
    cuda = watch.device.type == "cuda"
    rates: dict[str, object] = {}
    for name, dtype, size in (
        ("bfloat16", torch.bfloat16, 8192),
        ("float16", torch.float16, 8192),
        ("tf32", torch.float32, 8192),
        ("float32", torch.float32, 4096),
    ):
        before = torch.backends.cuda.matmul.fp32_precision
        try:
            torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
            size = size if cuda else 64
            left, right = (torch.randn(size, size, device=watch.device, dtype=dtype) for _ in range(2))
            out = torch.empty_like(left)

            def multiply(left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out) -> object:
                return torch.mm(left, right, out=out)

            multiply()
            best = min(watch.called(multiply, 5) for _ in range(7))
            rates[name] = 2 * size**3 / best / 1e9
        except Exception as error:
            rates[name] = explain_failure(error)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    try:
        source = torch.empty(2**29 if cuda else 2**20, dtype=torch.uint8, device=watch.device)
        target = torch.empty_like(source)
        target.copy_(source)
        best = min(watch.called(lambda: target.copy_(source), 5) for _ in range(7))
        rates["copy_gb_per_second"] = 2 * source.numel() / best / 1e6
    except Exception as error:
        rates["copy_gb_per_second"] = explain_failure(error)
    return rates


def describe_device(device: torch.device) -> dict[str, object]:
    """Describe card and releases, as far as they are to be had."""
    facts: dict[str, object] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    for package in ("triton", "timm"):
        try:
            facts[package] = __import__(package).__version__
        except Exception as error:
            facts[package] = first_line(error)
    if device.type != "cuda":
        return facts | {"card": "pretended card"}
    properties = torch.cuda.get_device_properties(device)
    facts |= {
        "card": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    try:
        facts |= _ask_driver(device, "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu")
    except (OSError, subprocess.SubprocessError) as error:
        facts["driver_version"] = f"unknown ({first_line(error)})"
    return facts


def _ask_driver(device: torch.device, query: str) -> dict[str, str]:
    """Return what nvidia-smi says of a card."""
    # By its serial: CUDA counts only the cards that this process may see.
    identity = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = f"--id={device.index or 0}" if identity is None else f"--id=GPU-{identity}"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", which]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    return dict(zip(query.split(","), (part.strip() for part in answer.strip().split(",")), strict=False))


def measure_condition(watch: Stopwatch) -> dict[str, object]:
    """Measure what a card that has become hot, or has met its power limit, does less well, and ask it why.

    Returns:
        TFLOP/s of products in bfloat16; clock, temperature, power and the driver's reasons to slow down, under load.
    """
    cuda = watch.device.type == "cuda"
    try:
        size = 8192 if cuda else 64
        left, right = (torch.randn(size, size, device=watch.device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(left)
        multiply = functools.partial(torch.mm, left, right, out=out)
        multiply()
        best = min(watch.called(multiply, 5) for _ in range(7))
        found: dict[str, object] = {"bfloat16": 2 * size**3 / best / 1e9}
        if cuda:
            for _ in range(round(LOAD_MS / best)):  # the driver is asked while the device is busy with these
                multiply()
            try:
                found |= _ask_driver(watch.device, "clocks.sm,temperature.gpu,clocks_event_reasons.active,power.draw")
            except (OSError, subprocess.SubprocessError) as error:
                found["driver"] = first_line(error)
            torch.cuda.synchronize()
    except Exception as error:
        return {"failed": explain_failure(error)}
    return found


def start_helper() -> torch.device:
    """Read the command line of a process that ``gpu.py`` starts, and make its device the current one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--pretend", action="store_true")
    parser.add_argument("--forbid", action="append", default=[], help="a path that must not be taken")
    arguments = parser.parse_args()
    if arguments.pretend:
        pretend()
    for path in arguments.forbid:
        forbid(path)
    if arguments.pretend:
        return torch.device("cpu")
    device = torch.device("cuda", arguments.device)
    torch.cuda.set_device(device)
    return device


def use_folders_of_our_own(folder: Path) -> None:
    """Keep choices and compiled kernels in a folder, so that nothing known from before counts and nothing stays."""
    os.environ.pop("LK_BACKBONES_DEPTHWISE", None)  # a method that the user's programs insist on
    os.environ["LK_BACKBONES_CACHE"] = str(folder / "choices")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")


def pretend() -> None:
    """Let the operator take its road for CUDA devices on a CPU, with kernels in Triton's interpreter.

    Two of its candidates are there to be turned down: one raises an error and one computes wrong numbers. The tuner's
    clock is made up and lets it always choose ``"triton"``.
    ``TRITON_INTERPRET=1`` must have been set before Triton was imported.
    """
    from lk_backbones.ops import _triton, _tuning

    configs = {name: _triton.Config(16, 32, 32, warps, 3) for warps, name in enumerate(PRETENDED_PATHS, start=1)}
    _triton.CONFIGS.clear()
    _triton.CONFIGS.update(configs)

    def worth_timing(*arguments: object) -> list[str]:
        return list(configs)

    convolve, weight_gradient = _triton.convolve, _triton.weight_gradient

    def spoiled(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*arguments: object, config: object, **options: object) -> torch.Tensor:
            if config is configs["triton-raises"]:
                raise RuntimeError("out of resource: pretended shared memory")
            result = compute(*arguments, config=config, **options)
            return result * 1.5 if config is configs["triton-wrong"] else result

        return run

    replacements: tuple[tuple[object, str, object], ...] = (
        (_triton, "worth_timing", worth_timing),
        (_triton, "convolve", spoiled(convolve)),
        (_triton, "weight_gradient", spoiled(weight_gradient)),
        (_paths, "device_type", lambda tensor: "cuda"),
        (_cuda, "capability", lambda device: (9, 0)),
        (_cuda, "device_name", lambda device: "pretended card (9.0)"),
        (_cuda, "_products", lambda input: "ieee"),  # the interpreter knows no others
        (_cuda, "precision", lambda dtype: "ieee"),
    )
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)

    def made_up_time(run: Callable[[], object], calls: int) -> float:
        return 1.0 if run.args[0] == "triton" else 2.0  # type: ignore[attr-defined]

    _cuda.tuner = _tuning.Tuner(_cuda.device_name, made_up_time)
    _paths._cached_plan.cache_clear()


PRETENDED_PATHS = ("triton", "triton-raises", "triton-wrong")
