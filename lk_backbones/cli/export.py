"""``lk-backbones export``: a model as a file that runs without this package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from lk_backbones._imagenet import imagenet_names
from lk_backbones._printing import printable
from lk_backbones.cli.arguments import console, positive, seconds, size_of, step_printer

if TYPE_CHECKING:
    from lk_backbones.export import Export

__all__ = ["run"]

_DEFAULT_SIZE = (512, 512)


def run(args: Sequence[str]) -> None:
    """Run ``export``: write the files, and print how each compares with the model.

    Args:
        args: What follows the command.

    Raises:
        ValueError: If the model cannot be exported, something is not installed, or a file gives something else.
        OSError: If something cannot be read, or would be written over.
    """
    from lk_backbones.analysis.models import MODELS  # torch and timm take their time
    from lk_backbones.export import FORMATS

    parser = argparse.ArgumentParser(
        prog="lk-backbones export",
        description="Fold a model and write it in formats that run without this package. Each file is loaded by its "
        "own runtime and compared with the model on pictures before it is handed over. Beside it are metadata.json "
        "and a program of ten lines that runs it.",
        epilog=f"MODEL is {MODELS}. FORMAT is one of {', '.join(FORMATS)}.",
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--format", action="append", metavar="FORMAT", help="may be given several times (default: onnx)"
    )
    parser.add_argument(
        "--input-size", type=size_of, metavar="PIXELS", help="512, or 512x1024 (high, wide); by default the model's own"
    )
    parser.add_argument(
        "--fixed-size", action="store_true", help="files that take this size only; else sizes may change"
    )
    parser.add_argument("--features", action="store_true", help="the encoder, whose outputs are its feature maps")
    parser.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="8-bit RGB pictures of any size go in, a label map of that size or probabilities come out",
    )
    parser.add_argument(
        "--int8", action="store_true", help="also an ONNX file quantised to 8 bits, with what that loses"
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="pictures to compare on and calibrate with; else scenes are drawn"
    )
    parser.add_argument("--num", type=positive, default=4, help="how many of them (default: 4)")
    parser.add_argument("--seconds", type=seconds, default=5.0, help="for the timing (default: 5)")
    parser.add_argument("--pretrained", action="store_true", help="default weights for a bare name (else random ones)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and scenes (default: 0)")
    parser.add_argument("--to", metavar="DIR", default="exported", help="folder to write into (default: exported)")
    parser.add_argument("--overwrite", action="store_true", help="write over what an earlier export has left there")
    _run(parser.parse_args(args))


def _run(arguments: argparse.Namespace) -> None:
    from lk_backbones.analysis.models import load_named_model
    from lk_backbones.analysis.pictures import folder_pictures, noise_pictures, scene_pictures
    from lk_backbones.export import export_model
    from lk_backbones.export.build import require_possible

    formats = arguments.format or ["onnx"]
    require_possible(arguments.to, formats, arguments.int8, arguments.overwrite)  # before anything is fetched
    named = load_named_model(arguments.model, arguments.pretrained, arguments.seed)
    size = arguments.input_size or _own_size(named.model)
    if arguments.images is not None:
        series = folder_pictures(arguments.images, size, arguments.num)
    elif named.in_channels == 3 and min(size) >= 64:
        series = scene_pictures(size, arguments.num, arguments.seed)
    else:
        series = noise_pictures(size, arguments.num, arguments.seed)
    described: dict[str, Any] = {"source": named.name, "weights": named.weights, "compared_on": series.description}
    if getattr(named.model, "num_classes", None) == 1000 and named.weights != "random" and not arguments.features:
        described["class_names"] = imagenet_names()
    try:
        export = export_model(
            named.model,
            arguments.to,
            list(islice(series.make(named.in_channels), arguments.num)),
            formats,
            size,
            features=arguments.features,
            preprocessing=arguments.with_preprocessing,
            fixed_size=arguments.fixed_size,
            int8=arguments.int8,
            mean=named.mean,
            std=named.std,
            description=described,
            seconds=arguments.seconds,
            overwrite=arguments.overwrite,
            progress=step_printer(),
        )
    except ValueError as error:
        raise ValueError(f"{arguments.model}: {error}") from error
    console().print(_table(export, named.name, series.description, size))
    for note in export.notes:
        print(printable(f"note: {note}"))
    print(printable(f"written: {export.folder}, each file with a program that runs it, and metadata.json"))


def _own_size(model: Any) -> tuple[int, int]:
    """Return the size that a model is used at: of a classifier that of its pictures, else 512 × 512."""
    size = getattr(model, "hparams", {}).get("input_size")
    if size:
        return tuple(size)
    config = getattr(model, "pretrained_cfg", None)
    return tuple(config["input_size"][1:]) if config else _DEFAULT_SIZE


def _table(export: Export, name: str, pictures: str, size: tuple[int, int]) -> Table:
    numbers = [
        Column(title, justify="right", no_wrap=True)
        for title in ("MB", "difference", "same labels", "ms", "best", "speed")
    ]
    table = Table("format", Column("file", no_wrap=True), *numbers, title="exported", box=box.SIMPLE)
    for file in export.files:
        cells = [
            file.format,
            file.file,
            f"{file.megabytes:.1f}",
            "–" if file.difference is None else f"{file.difference:.1e}",
            "–" if file.agreement is None else f"{file.agreement:.2%}",
            f"{file.median_ms:.1f}",
            f"{file.fastest_ms:.1f}",
            f"{file.speed:.2f}×",
        ]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    inputs = f"any {', '.join(export.metadata['changing'])}" if export.metadata["changing"] else "one shape"
    table.caption = Text(
        printable(
            f"{name}, {pictures}, {size[0]} × {size[1]}, {inputs}. Difference: the largest, as a share of the model's "
            f"largest value. Time of one picture: median; speed: times as fast as the folded model in PyTorch, "
            f"{export.eager_ms:.1f} ms, in turn with it."
        )
    )
    return table
