"""Speed and memory of ``lk_backbones.ops.depthwise_conv2d`` against PyTorch's own convolution, on this machine.

Every contestant of a shape runs in turn, round after round, so that whatever else the machine does hits all of them
alike; the best round counts. Rates are useful multiply-adds only (taps over the padding do not count) and stand beside
sgemm, measured in the same rounds::

    python benchmarks/depthwise.py                        # the grid, all cores
    python benchmarks/depthwise.py --threads 1 --clock process --seconds 1
    python benchmarks/depthwise.py --paths                # also every path by force: does the rule choose well?
    python benchmarks/depthwise.py --output results/op    # results/op.json, results/op.md, results/op.png

Clock ``process`` counts processor time instead of time on the wall: for one thread on a shared machine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from case import Case
from torch import Tensor

from lk_backbones.analysis.timing import describe_machine, interleave, peak_memory, save
from lk_backbones.ops import depthwise_conv2d, explain

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def _square(group: str, *rows: tuple[int, int, int, int]) -> list[Case]:
    return [Case(group, batch, channels, size, size, kernel, kernel) for batch, channels, size, kernel in rows]


GRID = [
    # RepLKNet-31B's four stages at 224 px, one image and eight.
    *_square("RepLKNet 224 px", (1, 128, 56, 31), (1, 256, 28, 29), (1, 512, 14, 27), (1, 1024, 7, 13)),
    *_square("RepLKNet 224 px", (8, 128, 56, 31), (8, 256, 28, 29), (8, 512, 14, 27), (8, 1024, 7, 13)),
    # The same at a segmentation crop of 512 px, and two odd maps.
    *_square("RepLKNet 512 px", (1, 128, 128, 31), (1, 256, 64, 29), (1, 512, 32, 27), (1, 1024, 16, 13)),
    Case("RepLKNet 480×640", 1, 64, 120, 160, 31, 31),
    Case("RepLKNet 480×640", 1, 256, 60, 80, 29, 29),
    # SLaK and PeLK: strips and the largest kernels.
    Case("strips", 1, 96, 56, 56, 51, 5),
    Case("strips", 1, 96, 56, 56, 5, 51),
    Case("strips", 8, 192, 28, 28, 49, 5),
    Case("strips", 8, 192, 28, 28, 5, 49),
    *_square("largest", (1, 96, 56, 51), (1, 96, 128, 51), (1, 96, 56, 101), (8, 192, 28, 49)),
    # ConvNeXt's 7×7 and sizes around it.
    *_square("ConvNeXt", (1, 128, 56, 7), (1, 256, 28, 7), (1, 512, 14, 7), (1, 1024, 7, 7), (8, 128, 56, 7)),
    *_square("small", (1, 128, 56, 3), (1, 128, 56, 5), (1, 128, 56, 9), (1, 128, 56, 11), (1, 128, 56, 13)),
    *_square("small", (1, 128, 56, 17), (1, 128, 56, 21), (8, 256, 28, 13)),
    # Few or odd channels.
    *_square("channels", (1, 3, 56, 31), (1, 1, 128, 31), (1, 124, 56, 31), (4, 16, 56, 15)),
]
# The op table of the RepLKNet and UniRepLKNet papers: C = 384, maps of 16, 32 and 64 pixels, kernels 3 to 31 (there at
# batch 64 on a GPU).
PAPER = _square(
    "paper", *((1, 384, size, kernel) for size in (16, 32, 64) for kernel in (3, 5, 7, 9, 13, 17, 21, 27, 31))
)


def native(input: Tensor, weight: Tensor) -> Tensor:
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.conv2d(input, weight, padding=padding, groups=weight.shape[0])


def measure(case: Case, seconds: float, clock: Callable[[], float], paths: bool) -> dict[str, object]:
    """Measure the times of one shape, forward and forward plus backward, in both memory formats."""
    torch.manual_seed(0)
    maps = torch.randn(case.batch, case.channels, case.height, case.width)
    weight = torch.randn(case.channels, 1, case.kernel_height, case.kernel_width, requires_grad=True)
    matrix = torch.randn(1024, 1024)
    contestants: dict[str, Callable[[], object]] = {"sgemm": lambda: matrix @ matrix}
    steps: dict[str, Callable[[], object]] = {}

    def add(name: str, convolve: Callable[[Tensor, Tensor], Tensor], input: Tensor, grad: Tensor) -> None:
        def forward() -> Tensor:
            with torch.no_grad():
                return convolve(input, weight)

        def step() -> object:
            return torch.autograd.grad(convolve(input, weight), (input, weight), grad)

        contestants[f"{name} forward"] = forward
        contestants[f"{name} step"] = steps[name] = step

    plans = {}
    for name, memory_format in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        input = maps.to(memory_format=memory_format, copy=True).requires_grad_()
        grad = torch.randn_like(input)
        plans[name] = explain(input, weight)
        if paths or name == "NCHW":  # in channels_last PyTorch's backward is slow beyond patience
            add(f"torch {name}", native, input, grad)
        add(f"ours {name}", depthwise_conv2d, input, grad)
        if paths:
            for path in ("direct", "fft"):
                add(
                    f"{path} {name}",
                    lambda x, w, path=path: depthwise_conv2d(x, w, method=path),  # type: ignore[misc]
                    input,
                    grad,
                )
    timings = interleave(contestants, seconds, clock)
    size = maps.numel() * maps.element_size()
    return {
        **asdict(case),
        "flops": case.flops,
        "best_ms": {name: timing.best for name, timing in timings.items()},
        "median_ms": {name: timing.median for name, timing in timings.items()},
        "calls": {name: len(timing.calls) for name, timing in timings.items()},
        "sgemm_gflops": 2 * 1024**3 / timings["sgemm"].best / 1e6,
        "plans": {name: asdict(plan) for name, plan in plans.items()},
        # Input, output, and the two maps of the backward are there whoever computes.
        "peak_memory_over_input_and_output": {name: peak_memory(step) / (2 * size) for name, step in steps.items()},
    }


def table(results: list[dict], threads: int, clock: str) -> str:
    """Markdown table: best times of ours in each memory format, and ratios to PyTorch in NCHW."""
    lines = [
        f"{threads} thread(s), {clock} clock, float32, best of interleaved rounds; ms. step = forward + backward; × = "
        "torch NCHW over ours NCHW; GF/s: useful rate of the forward in the faster format, and its share of sgemm.",
        "",
        "| shape | torch forward | ours (channels_last) | × | torch step | ours (channels_last) | × | path | GF/s "
        "| memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        case = Case(**{key: result[key] for key in Case.__dataclass_fields__})
        best = result["best_ms"]
        cells = [case.label]
        for kind in ("forward", "step"):
            torch_ms, ours, ours_last = (
                best[f"{name} {kind}"] for name in ("torch NCHW", "ours NCHW", "ours channels_last")
            )
            cells += [f"{torch_ms:.2f}", f"{ours:.2f} ({ours_last:.2f})", f"**{torch_ms / ours:.1f}**"]
        plan = result["plans"]["NCHW"]
        rate = result["flops"] / min(best["ours NCHW forward"], best["ours channels_last forward"]) / 1e6
        cells.append(
            plan["forward"] if plan["forward"] == plan["backward"] else f"{plan['forward']}/{plan['backward']}"
        )
        cells.append(f"{rate:.0f} ({rate / result['sgemm_gflops']:.2f})")
        peak = result["peak_memory_over_input_and_output"]
        cells.append(f"{peak['ours NCHW']:.1f} ({peak['ours channels_last']:.1f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def regret(results: list[dict]) -> str:
    """How much slower the chosen path is than the better of the two, per memory format and computation."""
    lines, logs = ["\n", "Rule against the better path, by force (step = forward + backward):", ""], []
    for result in results:
        case, best = Case(**{key: result[key] for key in Case.__dataclass_fields__}), result["best_ms"]
        for name in ("NCHW", "channels_last"):
            plan = result["plans"][name]
            if plan["backward"] == "native":
                continue
            times = {}
            for path in ("direct", "fft"):
                forward, step = best[f"{path} {name} forward"], best[f"{path} {name} step"]
                times[path] = {"forward": forward, "backward": step - forward}
            for kind in ("forward", "backward"):
                chosen = times[plan[kind]][kind] if plan[kind] in times else best[f"ours {name} forward"]
                ratio = chosen / min(times["direct"][kind], times["fft"][kind])
                logs.append(math.log(max(1.0, ratio)))
                if ratio > 1.1:
                    lines.append(
                        f"- {case.label} {name} {kind}: chose {plan[kind]}, {ratio:.2f} times the better; direct "
                        f"{times['direct'][kind]:.2f} ms, fft {times['fft'][kind]:.2f} ms"
                    )
    if not logs:
        return ""
    mean, worst = (math.exp(value) for value in (sum(logs) / len(logs), max(logs)))
    return "\n".join([*lines, "", f"Mean {mean:.3f}, worst {worst:.2f}, of {len(logs)}."])


def plot(results: list[dict], path: Path, title: str) -> None:
    """Bars of the speed-up over PyTorch's own operator, NCHW, forward and step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [Case(**{key: result[key] for key in Case.__dataclass_fields__}).label for result in results]
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(labels) + 1.5))
    for offset, kind, color in ((-0.2, "forward", "#4477aa"), (0.2, "step", "#cc6677")):
        ratios = [r["best_ms"][f"torch NCHW {kind}"] / r["best_ms"][f"ours NCHW {kind}"] for r in results]
        name = "forward" if kind == "forward" else "forward + backward"
        axes.barh([i + offset for i in range(len(labels))], ratios, 0.4, label=name, color=color)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times faster than torch.nn.functional.conv2d, NCHW")
    axes.set_title(title, fontsize=9)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--seconds", type=float, default=3.0, help="per shape")
    parser.add_argument("--paths", action="store_true", help="also time every path by force")
    parser.add_argument("--only", default="", help="shapes whose group or label contains this")
    parser.add_argument("--output", type=Path, help="stem of the .json, .md and .png to write")
    arguments = parser.parse_args()
    if arguments.clock == "process" and arguments.threads != 1:
        parser.error("--clock process adds up the threads' times, so it needs --threads 1")
    cases = [case for case in GRID + PAPER if arguments.only in case.group or arguments.only in case.label]
    if not cases:
        groups = ", ".join(dict.fromkeys(case.group for case in GRID + PAPER))
        parser.error(f"--only {arguments.only!r} fits no shape; the groups are {groups}")
    torch.set_num_threads(arguments.threads)

    machine = {**describe_machine(), "clock": arguments.clock}
    results: list[dict] = []
    for case in cases:
        results.append(measure(case, arguments.seconds, CLOCKS[arguments.clock], arguments.paths))
        best = results[-1]["best_ms"]
        print(case.label, {name: round(milliseconds, 2) for name, milliseconds in best.items()}, flush=True)
        text = table(results, arguments.threads, arguments.clock) + (regret(results) if arguments.paths else "")
        if arguments.output:  # after every shape, so that a run cut short leaves what it has measured
            save(
                arguments.output,
                {"machine": machine, "results": results},
                text,
                lambda path: plot(results, path, f"{machine['threads']} thread(s), {machine['instructions']}"),
            )
    print("\n" + text)


if __name__ == "__main__":
    main()
