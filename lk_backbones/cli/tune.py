"""``lk-backbones tune``: measure ahead which path of the convolution is fastest on a GPU, and show what is known."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Column, Table
from rich.text import Text

from lk_backbones._printing import printable
from lk_backbones.cli.arguments import choose_device, console, positive, size_of, step_printer
from lk_backbones.ops import Choice

__all__ = ["run"]

_MEMORY_FORMATS = {"contiguous": "contiguous_format", "channels-last": "channels_last"}


def run(args: Sequence[str]) -> None:
    """Run ``tune``: measure the layers of models, or print what was measured.

    Args:
        args: What follows the command.

    Raises:
        ValueError: If a model or setting is impossible, there is no GPU, or its memory is too small.
    """
    parser = argparse.ArgumentParser(
        prog="lk-backbones tune",
        description="Measure on a GPU which path of the depthwise convolution is fastest for the layers of a model, "
        "ahead of the training that would do it in its first steps. What is measured is kept in the user's cache "
        "folder, or in that which LK_BACKBONES_CACHE names, for every process.",
        epilog="MODEL is named as for `lk-backbones benchmark`. Give the size, batch and precision that you train "
        "with: sizes are told apart in steps of a fifth, batches in steps of two.",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--show", action="store_true", help="print what was measured so far, on any device")
    parser.add_argument("--input-size", type=size_of, default=(224, 224), metavar="PIXELS", help="224, or 512x1024")
    parser.add_argument("--batch-size", type=positive, default=64, help="of one GPU (default: 64)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="training: of autocast"
    )
    parser.add_argument("--memory-format", choices=tuple(_MEMORY_FORMATS), default="contiguous")
    parser.add_argument("--again", action="store_true", help="measure what is known once more")
    parser.add_argument("--no-training", action="store_true", help="measure inference only")
    parser.add_argument("--device", help="cuda, cuda:1 (default: cuda)")
    arguments = parser.parse_args(args)
    if arguments.show == bool(arguments.models):
        parser.error("either models are named, or --show is given")
    if arguments.show:
        _show()
    else:
        _tune(arguments)


def _show() -> None:
    from lk_backbones.ops import choices_file, measured_choices

    choices = measured_choices()
    if choices:
        console().print(_table(choices, "measured paths"))
    print(printable(f"{len(choices)} classes of problems in {choices_file()}"))


def _tune(arguments: argparse.Namespace) -> None:
    import torch

    from lk_backbones.analysis.models import load_named_model
    from lk_backbones.analysis.tuning import tune
    from lk_backbones.ops import choices_file

    device, progress = choose_device(arguments.device), step_printer()
    for name in dict.fromkeys(arguments.models):
        named = load_named_model(name)
        progress(f"{name}: measuring")
        try:
            tuned = tune(
                named.model,
                arguments.input_size,
                arguments.batch_size,
                channels=named.in_channels,
                device=device,
                dtype=getattr(torch, arguments.dtype),
                memory_format=getattr(torch, _MEMORY_FORMATS[arguments.memory_format]),
                training=not arguments.no_training,
                again=arguments.again,
            )
        except torch.OutOfMemoryError as error:
            size = "x".join(map(str, arguments.input_size))
            raise ValueError(
                f"{name} does not fit into the memory of {device} with {arguments.batch_size} images of {size}: give a "
                "smaller --batch-size. What was measured until then is kept"
            ) from error
        if tuned.choices:
            console().print(_table(tuned.choices, name))
        print(
            printable(
                f"{name}: {len(tuned.choices)} classes of problems, {tuned.measured} of them measured now, in "
                f"{tuned.seconds:.1f} s; kept in {choices_file()}"
            )
        )


def _table(choices: Mapping[str, Choice], title: str) -> Table:
    columns = [
        Column("problems"),
        Column("path", no_wrap=True),
        Column("ms", justify="right", no_wrap=True),
        Column("others, ms"),
    ]
    table = Table(*columns, title=title, box=box.SIMPLE)
    table.caption = "~: sizes and batches near it are of the same class."
    heading = ""
    for key, choice in sorted(choices.items()):
        device, _, rest = key.partition("; ")
        release, _, problem = rest.partition("; ")
        if heading != f"{device}, {release}":
            heading = f"{device}, {release}"
            table.add_row(Text(printable(heading), style="bold"))
        times = dict(choice.milliseconds)
        own = times.pop(choice.path, None)
        others = [f"{path} {time:.3f}" for path, time in sorted(times.items(), key=lambda item: item[1])]
        others += [f"{path}: {reason}" for path, reason in choice.rejected.items()]
        cells = (problem, choice.path, "–" if own is None else f"{own:.3f}", ", ".join(others))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
