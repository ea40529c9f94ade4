"""Whole models on this machine: RepLKNet beside its reference formulation and the usual backbones.

Folded inference and a training step (forward, backward; no optimiser) at 224 pixels, every contestant in turn, round
after round; medians and bests. The reference formulation is the same network as the authors' code computes it: plain
``nn.Conv2d`` in NCHW and, folded, only the small kernels and the norms of the large ones merged. Weights packed: see
``lk_backbones.prepack_weights``; the folded row is what ``lk_backbones.reparameterize`` gives::

    python benchmarks/models.py
    python benchmarks/models.py --output results/models    # results/models.json, .md, .png
    python benchmarks/models.py --profile                   # also where RepLKNet-31B spends its time
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timing import describe_machine, interleave, peak_memory, save
from torch import nn

import lk_backbones
from lk_backbones.layers import ConvNorm, DepthwiseConv2d, InputConvNorm, PointwiseConv2d, ReparamLargeKernelConv2d

OURS = "replknet_31b"
PACKED = "replknet_31b, weights packed"
REFERENCE = "replknet_31b, reference formulation"
OTHERS = ("convnext_base", "swin_base_patch4_window7_224", "resnet101")


def reference(model: nn.Module) -> nn.Module:
    """``model`` with PyTorch's own convolutions in the caller's memory format."""
    plain = {DepthwiseConv2d: nn.Conv2d, PointwiseConv2d: nn.Conv2d, InputConvNorm: ConvNorm}
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
    return model


def folded_as_the_reference(model: nn.Module) -> nn.Module:
    """``model`` in ``eval()`` mode, folded as far as the authors' code folds it."""
    for module in model.modules():
        if isinstance(module, ReparamLargeKernelConv2d):
            module.reparameterize()
    return reference(model.eval())


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name)


def inference(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return run


def step(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    model.train()

    def run() -> object:
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()
        return None

    return run


def contestants(kind: str, batch: int, size: int) -> dict[str, Callable[[], object]]:
    """Every model's run; the timm models in both memory formats, of which the faster counts."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size)
    make = inference if kind == "inference" else step
    runs: dict[str, Callable[[], object]] = {}
    if kind == "inference":
        runs[OURS] = make(lk_backbones.reparameterize(create(OURS)), images)
        runs[PACKED] = make(lk_backbones.prepack_weights(create(OURS)), images)
        runs[REFERENCE] = make(folded_as_the_reference(create(OURS)), images)
    else:
        runs[OURS] = make(create(OURS), images)
        runs[REFERENCE] = make(reference(create(OURS)), images)
    for name in OTHERS:
        runs[name] = make(create(name).eval(), images)
        last = torch.channels_last
        runs[f"{name}, channels_last"] = make(create(name).eval().to(memory_format=last), images.to(memory_format=last))
    return runs


def measure(kind: str, batch: int, size: int, seconds: float) -> dict[str, object]:
    """Measure times, and PyTorch's peak memory beyond parameters, of all contestants."""
    runs = contestants(kind, batch, size)
    matrix = torch.randn(1024, 1024)
    timings = interleave({"sgemm": lambda: matrix @ matrix, **runs}, seconds, patience=2500)
    return {
        "kind": kind,
        "batch": batch,
        "size": size,
        "best_ms": {name: timing.best for name, timing in timings.items()},
        "median_ms": {name: timing.median for name, timing in timings.items()},
        "calls": {name: len(timing.calls) for name, timing in timings.items()},
        "sgemm_gflops": 2 * 1024**3 / timings["sgemm"].best / 1e6,
        "peak_memory_mb": {name: peak_memory(run) / 1e6 for name, run in runs.items()},
    }


def table(results: list[dict]) -> str:
    """Markdown: medians, bests and the ratio of each contestant's median to ours."""
    lines = [
        "Milliseconds, median (best) of interleaved rounds, float32. × = that model's median over ours: above 1 ours "
        "is faster. Memory: most that PyTorch held at once beyond the parameters.",
        "",
    ]
    for result in results:
        lines += [
            f"{result['kind']}, batch {result['batch']}, {result['size']} px, sgemm {result['sgemm_gflops']:.0f} GF/s:",
            "",
            "| model | ms | × | memory, MB |",
            "|---|---|---|---|",
        ]
        median, best = result["median_ms"], result["best_ms"]
        for name, memory in result["peak_memory_mb"].items():
            lines.append(
                f"| {name} | {median[name]:.0f} ({best[name]:.0f}) | {median[name] / median[OURS]:.2f} | {memory:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    """Bars of the medians, a panel per kind of run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(6.5 * len(results), 3.2), squeeze=False)
    for axes, result in zip(panels[0], results, strict=True):
        names = list(result["peak_memory_mb"])
        colors = ["#cc6677" if name in (OURS, PACKED) else "#4477aa" for name in names]
        axes.barh(range(len(names)), [result["median_ms"][name] for name in names], color=colors)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")
        axes.set_title(f"{result['kind']}, batch {result['batch']}, {result['size']} px", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def profile(run: Callable[[], object]) -> str:
    """Where the time of one run goes, by operator."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=45.0, help="per kind of run")
    parser.add_argument("--profile", action="store_true", help="also print where RepLKNet-31B spends its time")
    parser.add_argument("--output", type=Path, help="stem of the .json, .md and .png to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    results = [measure("inference", 1, 224, arguments.seconds), measure("training step", 2, 224, arguments.seconds)]
    text = table(results)
    if arguments.output:
        save(arguments.output, {"machine": describe_machine(), "results": results}, text, lambda p: plot(results, p))
    print(text)
    if arguments.profile:
        print(profile(inference(lk_backbones.reparameterize(create(OURS)), torch.randn(1, 3, 224, 224))))
        print(profile(step(create(OURS), torch.randn(2, 3, 224, 224))))


if __name__ == "__main__":
    main()
