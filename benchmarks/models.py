"""Whole models on this machine: encoders beside their reference formulations and the usual backbones of their sizes.

Folded inference and a training step (forward, backward; no optimiser) at 224 pixels, every contestant of a group in
turn, round after round; medians and bests. A group is one encoder, its reference formulation and backbones of its size.
The reference formulation is the same network as the authors' code computes it: plain ``nn.Conv2d`` in NCHW, linear
layers where the authors have them and, folded, what the authors fold. Weights packed: see
``lk_backbones.prepack_weights``; the folded row is what ``lk_backbones.reparameterize`` gives::

    python benchmarks/models.py                                     # every group
    python benchmarks/models.py unireplknet_t unireplknet_s         # these
    python benchmarks/models.py replknet_31n:resnet18,resnet34      # any encoder, beside any of timm's models
    python benchmarks/models.py --output results/models             # results/models.json, .md, .png
    python benchmarks/models.py --threads 1 --cpu-time              # on a machine that is busy with other work
    python benchmarks/models.py replknet_31b --profile              # also where the encoder spends its time
    python benchmarks/models.py replknet_31b --dtype bfloat16       # inference of models that are .bfloat16()
    python benchmarks/models.py replknet_31b --dtype bfloat16 --autocast  # and the same under autocast beside them
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

import lk_backbones
from lk_backbones.analysis.speed import inference_run, training_run
from lk_backbones.analysis.timing import describe_machine, interleave, peak_memory, save
from lk_backbones.encoders.pelk import PeLK
from lk_backbones.encoders.slak import SLaK
from lk_backbones.encoders.unireplknet import UniRepLKNet
from lk_backbones.layers import ConvNorm, DepthwiseConv2d, InputConvNorm, PointwiseConv2d, ReparamLargeKernelConv2d
from lk_backbones.layers.peripheral import PeripheralDepthwiseConv2d, expand_cells

# Encoder -> backbones of its size.
GROUPS = {
    "replknet_31b": ("convnext_base", "swin_base_patch4_window7_224", "resnet101"),
    "unireplknet_t": ("convnext_tiny",),
    "unireplknet_s": ("convnext_small",),
    "slak_tiny": ("convnext_tiny",),
    "pelk_tiny": ("convnext_tiny",),
}


KINDS = ("inference", "training step")


class LinearOverChannels(nn.Conv2d):
    """A 1×1 convolution as a linear layer between two permutations, as ConvNeXt's successors write it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PlainPeripheral(PeripheralDepthwiseConv2d):
    """A peripheral convolution that PyTorch computes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, expand_cells(self.weight, self.grid), self.bias)


def reference(model: nn.Module) -> nn.Module:
    """``model`` with PyTorch's own layers in the caller's memory format."""
    pointwise = LinearOverChannels if isinstance(model, UniRepLKNet | SLaK) else nn.Conv2d
    plain = {DepthwiseConv2d: nn.Conv2d, PointwiseConv2d: pointwise, InputConvNorm: ConvNorm}
    plain[PeripheralDepthwiseConv2d] = PlainPeripheral
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
    return model


def folded_as_the_reference(model: nn.Module) -> nn.Module:
    """``model`` in ``eval()`` mode, folded as far as the authors' code folds it."""
    if isinstance(model, UniRepLKNet | PeLK):  # all there is; PeLK's authors published no code
        return reference(lk_backbones.reparameterize(model))
    if isinstance(model, SLaK):  # nothing: their strips stay beside the small kernel, with the norms
        return reference(model.eval())
    for module in model.modules():
        if isinstance(module, ReparamLargeKernelConv2d):
            module.reparameterize()
    return reference(model.eval())


def packed(name: str) -> str:
    return f"{name}, weights packed"


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name)


def under_autocast(run: Callable[[], object], dtype: torch.dtype) -> Callable[[], object]:
    def inside() -> object:
        with torch.autocast("cpu", dtype):
            return run()

    return inside


def contestants(
    ours: str,
    others: tuple[str, ...],
    kind: str,
    batch: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
) -> dict[str, Callable[[], object]]:
    """Every model's run; the timm models in both memory formats, of which the faster counts.

    In a dtype other than float32 inference is of converted models, with ``autocast`` also of float32 ones under it, and
    a training step is under autocast.
    """
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size)
    plain, last = torch.contiguous_format, torch.channels_last
    runs: dict[str, Callable[[], object]] = {}

    def add(name: str, model: nn.Module, layout: torch.memory_format = plain) -> None:
        model, pictures = model.to(memory_format=layout), images.to(memory_format=layout)
        if kind != "inference":
            runs[name] = training_run(model, pictures, None if dtype == torch.float32 else dtype)
            return
        converted = copy.deepcopy(model).to(dtype) if autocast else model.to(dtype)
        runs[name] = inference_run(converted, pictures.to(dtype))
        if autocast:
            runs[f"{name}, autocast"] = under_autocast(inference_run(model, pictures), dtype)

    if kind == "inference":
        add(ours, lk_backbones.reparameterize(create(ours)))
        add(packed(ours), lk_backbones.prepack_weights(create(ours)))
        add(f"{ours}, reference formulation", folded_as_the_reference(create(ours)))
    else:
        add(ours, create(ours))
        add(f"{ours}, reference formulation", reference(create(ours)))
    for name in others:
        add(name, create(name).eval())
        add(f"{name}, channels_last", create(name).eval(), last)
    return runs


def measure(
    ours: str,
    others: tuple[str, ...],
    kind: str,
    batch: int,
    size: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
) -> dict[str, object]:
    """Measure times, and PyTorch's peak memory beyond parameters, of all contestants of a group."""
    runs = contestants(ours, others, kind, batch, size, dtype, autocast)
    matrix = torch.randn(1024, 1024)
    timings = interleave({"sgemm": lambda: matrix @ matrix, **runs}, seconds, clock, patience=2500)
    return {
        "ours": ours,
        "kind": kind,
        "batch": batch,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "best_ms": {name: timing.best for name, timing in timings.items()},
        "median_ms": {name: timing.median for name, timing in timings.items()},
        "calls": {name: len(timing.calls) for name, timing in timings.items()},
        "sgemm_gflops": 2 * 1024**3 / timings["sgemm"].best / 1e6,
        "peak_memory_mb": {name: peak_memory(run) / 1e6 for name, run in runs.items()},
    }


def table(results: list[dict]) -> str:
    """Markdown: medians, bests and the ratio of each contestant's median to ours."""
    lines = [
        f"Milliseconds, median (best) of interleaved rounds, {results[0]['dtype']}. × = that model's median over ours: "
        "above 1 ours is faster. Memory: most that PyTorch held at once beyond the parameters.",
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
            ratio = median[name] / median[result["ours"]]
            lines.append(f"| {name} | {median[name]:.0f} ({best[name]:.0f}) | {ratio:.2f} | {memory:.0f} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    """Bars of the medians, a panel per kind of run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(result["kind"] for result in results))
    rows = -(-len(results) // len(kinds))
    figure, panels = plt.subplots(rows, len(kinds), figsize=(6.5 * len(kinds), 3.2 * rows), squeeze=False)
    for axes, result in zip(panels.flat, results, strict=True):
        names, ours = list(result["peak_memory_mb"]), result["ours"]
        colors = ["#cc6677" if name.removesuffix(", autocast") in (ours, packed(ours)) else "#4477aa" for name in names]
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


def group(text: str) -> tuple[str, tuple[str, ...]]:
    """Read an encoder's name and those of the backbones beside it, out of ``NAME`` or ``NAME:OTHER,OTHER``."""
    ours, _, others = text.partition(":")
    names = tuple(filter(None, others.split(","))) or GROUPS.get(ours, ())
    if unknown := [name for name in (ours, *names) if not timm.is_model(name)]:
        raise argparse.ArgumentTypeError(f"timm knows no model {', '.join(unknown)}; `lk-backbones models` lists ours")
    return ours, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", type=group, help="NAME or NAME:OTHER,OTHER; all by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=224, help="height and width of the pictures")
    parser.add_argument("--batch", type=int, default=2, help="pictures of a training step")
    parser.add_argument("--inference-batch", type=int, nargs="+", default=[1], help="pictures of an inference")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what to time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--autocast", action="store_true", help="infer also with float32 models under autocast")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU rather than wall time, for a machine that others use; with 1 thread",
    )
    parser.add_argument("--seconds", type=float, default=45.0, help="per group and kind of run")
    parser.add_argument("--profile", action="store_true", help="also print where the encoders spend their time")
    parser.add_argument("--output", type=Path, help="stem of the .json, .md and .png to write")
    arguments = parser.parse_args()
    if arguments.autocast and arguments.dtype == "float32":
        parser.error("--autocast needs --dtype bfloat16 or float16: autocast computes in those")
    torch.set_num_threads(arguments.threads)

    clock = time.process_time if arguments.cpu_time else time.perf_counter
    dtype = getattr(torch, arguments.dtype)
    groups, size, batch = arguments.groups or list(GROUPS.items()), arguments.size, arguments.batch
    results = [
        measure(ours, others, kind, pictures, size, arguments.seconds, clock, dtype, arguments.autocast)
        for ours, others in groups
        for kind in arguments.kinds
        for pictures in (arguments.inference_batch if kind == "inference" else [batch])
    ]
    text = table(results)
    if arguments.output:
        save(arguments.output, {"machine": describe_machine(), "results": results}, text, lambda p: plot(results, p))
    print(text)
    if arguments.profile:
        for ours, _ in groups:
            print(profile(inference_run(lk_backbones.reparameterize(create(ours)), torch.randn(1, 3, size, size))))
            print(profile(training_run(create(ours), torch.randn(batch, 3, size, size))))


if __name__ == "__main__":
    main()
