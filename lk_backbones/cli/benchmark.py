"""``lk-backbones benchmark``: how fast models are, side by side."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Column, Table
from rich.text import Text

from lk_backbones._printing import printable
from lk_backbones.cli.arguments import (
    choose_device,
    console,
    positive,
    require_new,
    seconds,
    size_of,
    step_printer,
    write_text,
)

if TYPE_CHECKING:
    from lk_backbones.analysis.speed import OperatorSpeed, Speed

__all__ = ["run"]

_DTYPES = ("float32", "bfloat16", "float16")
_MEMORY_FORMATS = {"contiguous": "contiguous_format", "channels-last": "channels_last"}


def run(args: Sequence[str]) -> None:
    """Run ``benchmark``: time models in turn, print the table, write it as CSV, Markdown and plot.

    Args:
        args: What follows the command.

    Raises:
        ValueError: If a model or setting is impossible, or memory is too small.
        OSError: If something cannot be read, or would be written over.
    """
    from lk_backbones.analysis.models import MODELS  # torch and timm take their time
    from lk_backbones.analysis.speed import MODES

    parser = argparse.ArgumentParser(
        prog="lk-backbones benchmark",
        description="Time models, all of them in turn, round after round, so that whatever else the machine does hits "
        "all alike. Prints a table and writes it (.csv, .md), with a plot of the throughput against the published mean "
        "IoU where there is one.",
        epilog=f"MODEL is {MODELS}. Modes: plain (as it is), folded, packed (folded, weights packed: CPU, float32 or "
        "bfloat16), compiled (folded, by torch.compile), training (forward and backward, no optimiser).",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=["folded", "training"], help="default: folded training"
    )
    parser.add_argument("--input-size", type=size_of, default=(224, 224), metavar="PIXELS", help="224, or 512x1024")
    parser.add_argument("--batch-size", type=positive, default=1)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--memory-format", choices=tuple(_MEMORY_FORMATS), default="contiguous")
    parser.add_argument("--threads", type=positive, help="of the CPU (default: PyTorch's)")
    parser.add_argument(
        "--seconds", type=seconds, help="for each model and mode (default: 10), or each shape of --ops (0.5)"
    )
    parser.add_argument(
        "--ops",
        action="store_true",
        help="time the depthwise convolution instead, beside PyTorch's: maps of 16, 32 and 64, kernels of 3 to 31",
    )
    parser.add_argument("--channels", type=positive, default=384, help="of --ops (default: 384, as published)")
    parser.add_argument("--pretrained", action="store_true", help="default weights for bare names (else random ones)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default: 0)")
    parser.add_argument("--to", metavar="DIR", default="benchmark", help="folder to write into (default: benchmark)")
    parser.add_argument("--overwrite", action="store_true", help="write over what an earlier run has left there")
    arguments = parser.parse_args(args)
    if arguments.ops == bool(arguments.models):
        parser.error("either models are named, or --ops is given")
    _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    import torch

    folder = Path(arguments.to)
    stem = "operators" if arguments.ops else "models"
    names = [f"{stem}.csv", f"{stem}.md", *([] if arguments.ops else ["models.png"])]
    require_new([folder / name for name in names], arguments.overwrite)
    device, dtype = choose_device(arguments.device), getattr(torch, arguments.dtype)
    before = torch.get_num_threads()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        if arguments.ops:
            _operators(arguments, folder, device, dtype)
        else:
            _models(arguments, folder, device, dtype)
    finally:
        torch.set_num_threads(before)


def _setting(arguments: argparse.Namespace, device: object) -> str:
    """Tell what the numbers depend on."""
    from lk_backbones.analysis.timing import describe_machine

    machine = describe_machine()
    threads = f", {machine['threads']} threads, {machine['instructions']}" if str(device) == "cpu" else ""
    return f"{device}{threads}, torch {machine['torch']}, {arguments.dtype}"


def _models(arguments: argparse.Namespace, folder: Path, device: object, dtype: object) -> None:
    import torch

    from lk_backbones.analysis.models import load_named_model
    from lk_backbones.analysis.speed import benchmark
    from lk_backbones.drawing.canvas import save_png
    from lk_backbones.drawing.scatter import draw_scatter

    if len(set(arguments.models)) != len(arguments.models):
        raise ValueError(f"a model is named twice: {', '.join(arguments.models)}")
    loaded = {name: load_named_model(name, arguments.pretrained, arguments.seed) for name in arguments.models}
    rows = benchmark(
        {name: named.model for name, named in loaded.items()},
        list(dict.fromkeys(arguments.modes)),
        arguments.input_size,
        arguments.batch_size,
        channels={name: named.in_channels for name, named in loaded.items()},
        device=device,  # type: ignore[arg-type]
        dtype=dtype,  # type: ignore[arg-type]
        memory_format=getattr(torch, _MEMORY_FORMATS[arguments.memory_format]),
        seconds=arguments.seconds or 10.0,
        progress=step_printer(),
    )
    size = arguments.input_size
    caption = (
        f"{_setting(arguments, device)}, {arguments.memory_format}, batch {arguments.batch_size}, {size[0]} × {size[1]}"
    )
    table = _cells(rows)
    write_text(folder / "models.csv", _as_csv(rows))
    write_text(folder / "models.md", _as_markdown(table, f"{caption}. {_NOTE}"))
    written = [folder / "models.csv", folder / "models.md"]
    timed = [row for row in rows if row.mode == _plotted(arguments.modes)]
    if points := [(row.model, row.images_per_second, row.mean_iou) for row in timed if row.mean_iou is not None]:
        title = f"published mean IoU on ADE20K against speed ({timed[0].mode})"
        below = caption.replace("×", "x")  # Pillow's own font lacks it
        figure = draw_scatter(points, "images per second", "mean IoU, % (UPerNet, single-scale)", title, below)
        save_png(figure, folder / "models.png")
        written.append(folder / "models.png")
    console().print(_table(table, "speed", f"{caption}. {_NOTE}"))
    if not points:
        print("nobody published a mean IoU on ADE20K for these models, so there is no plot")
    print(printable(f"written: {', '.join(map(str, written))}"))


_NOTE = (
    "Milliseconds of a batch: median, and between which half of the times lie. ×: median over that of the first "
    "model in the same mode. Memory: the most that PyTorch held at once beyond the parameters. Parameters and "
    "multiply-adds (of one image) are those of the model as trained"
)


def _plotted(modes: Sequence[str]) -> str:
    """Return the mode whose throughput is drawn: the fastest inference, if there is one."""
    return next((mode for mode in ("compiled", "packed", "folded", "plain") if mode in modes), "training")


def _cells(rows: Sequence[Speed]) -> list[list[str]]:
    first = {row.mode: row.median_ms for row in reversed(rows)}
    head = ["model", "mode", "parameters", "MACs", "ms", "half within", "×", "images/s", "memory, MB", "mean IoU"]
    body = [
        [
            row.model,
            row.mode,
            f"{row.parameters / 1e6:.1f} M",
            "–" if row.macs is None else f"{row.macs / 1e9:.2f} G",
            f"{row.median_ms:.1f}",
            f"{row.quartiles_ms[0]:.1f}–{row.quartiles_ms[1]:.1f}",
            f"{row.median_ms / first[row.mode]:.2f}",
            f"{row.images_per_second:.1f}",
            f"{row.peak_memory / 1e6:.0f}",
            "–" if row.mean_iou is None else f"{row.mean_iou:.1f}",
        ]
        for row in rows
    ]
    return [head, *body]


def _as_csv(rows: Sequence[Speed]) -> str:
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(
        [
            *("model", "mode", "parameters", "macs", "median_ms", "quartile_1_ms", "quartile_3_ms", "fastest_ms"),
            *("calls", "images_per_second", "peak_memory_bytes", "published_mean_iou"),
        ]
    )
    for row in rows:
        times = [row.median_ms, *row.quartiles_ms, row.fastest_ms]
        writer.writerow(
            [
                *(row.model, row.mode, row.parameters, row.macs, *(f"{time:.4f}" for time in times)),
                *(row.calls, f"{row.images_per_second:.4f}", row.peak_memory, row.mean_iou),
            ]
        )
    return sheet.getvalue()


def _as_markdown(table: Sequence[Sequence[str]], caption: str) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table]
    return "\n".join([f"{printable(caption)}.", "", lines[0], f"|{'---|' * len(table[0])}", *lines[1:], ""])


def _table(cells: Sequence[Sequence[str]], title: str, caption: str) -> Table:
    columns = [Column(name, justify="left" if i < 1 else "right", no_wrap=i > 0) for i, name in enumerate(cells[0])]
    table = Table(*columns, title=title, box=box.SIMPLE, caption=Text(printable(f"{caption}.")))
    for row in cells[1:]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _operators(arguments: argparse.Namespace, folder: Path, device: object, dtype: object) -> None:
    from lk_backbones.analysis.speed import benchmark_operator

    rows: list[OperatorSpeed] = list(
        benchmark_operator(
            arguments.channels,
            arguments.batch_size,
            device=device,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            seconds=arguments.seconds or 0.5,
        )
    )
    kernels = list(dict.fromkeys(row.kernel_size for row in rows))
    cells = [["maps", "", *(f"{kernel}×{kernel}" for kernel in kernels)]]
    for size in dict.fromkeys(row.map_size for row in rows):
        of_size = [row for row in rows if row.map_size == size]
        cells.append([f"{size}×{size}", "ours", *(f"{row.ours_ms:.2f}" for row in of_size)])
        cells.append(["", "PyTorch", *(f"{row.torch_ms:.2f}" for row in of_size)])
    caption = (
        f"{_setting(arguments, device)}, batch {arguments.batch_size}, {arguments.channels} channels. Milliseconds of "
        "a depthwise convolution, forward, median of turns"
    )
    sheet = ["map_size,kernel_size,ours_ms,torch_ms"]
    sheet += [f"{row.map_size},{row.kernel_size},{row.ours_ms:.4f},{row.torch_ms:.4f}" for row in rows]
    write_text(folder / "operators.csv", "\n".join([*sheet, ""]))
    write_text(folder / "operators.md", _as_markdown(cells, caption))
    console().print(_table(cells, "depthwise convolution", caption))
    print(printable(f"written: {folder / 'operators.csv'}, {folder / 'operators.md'}"))
