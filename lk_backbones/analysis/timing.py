"""What the benchmarks share: timing side by side, peak memory, and files that are replaced as a whole."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Timing:
    """Times of one contestant, milliseconds."""

    calls: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The shortest."""
        return min(self.calls)

    @property
    def median(self) -> float:
        """The one in the middle."""
        return sorted(self.calls)[len(self.calls) // 2]

    @property
    def quartiles(self) -> tuple[float, float]:
        """Those at a quarter and at three quarters."""
        calls = sorted(self.calls)
        return calls[len(calls) // 4], calls[(3 * len(calls)) // 4]


def interleave(
    contestants: dict[str, Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    patience: float = 500,
) -> dict[str, Timing]:
    """Time every contestant in turn, at least 10 ms each, until ``seconds`` are over.

    Three rounds at least; whoever takes more than ``patience`` milliseconds sits out after the second.
    """
    timings = {name: Timing() for name in contestants}
    for run in contestants.values():
        run()  # the first call builds oneDNN's and MKL's tables
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or rounds < 3:
        rounds += 1
        for name, run in contestants.items():
            turn = time.perf_counter()
            while len(timings[name].calls) < 2 or timings[name].best < patience:
                begin = clock()
                run()
                timings[name].calls.append((clock() - begin) * 1e3)
                if time.perf_counter() - turn > 0.01:
                    break
    return timings


def peak_memory(run: Callable[[], object]) -> int:
    """Most bytes that PyTorch held at once during ``run``, beyond what it held before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library reports its own steps otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def describe_machine() -> dict[str, object]:
    """Describe what the numbers depend on, as far as PyTorch knows it."""
    return {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def save(stem: Path, content: dict[str, object], text: str, plot: Callable[[Path], None]) -> None:
    """Write the JSON, the table and the plot beside each other; each file is replaced as a whole."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    contents = {".json": json.dumps(content, indent=1) + "\n", ".md": text + "\n"}
    for suffix, body in contents.items():
        partial = stem.with_suffix(suffix + ".partial")
        partial.write_text(body)
        partial.replace(stem.with_suffix(suffix))
    partial = stem.with_suffix(".partial.png")
    plot(partial)
    partial.replace(stem.with_suffix(".png"))
