"""``lk-backbones erf`` and ``lk-backbones shape-bias``: what a model sees, and what it goes by."""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.table import Column, Table
from rich.text import Text

from lk_backbones._files import OutputNames, write_atomically
from lk_backbones._printing import printable
from lk_backbones.cli.arguments import (
    add_common,
    choose_device,
    console,
    level_of,
    positive,
    require_new,
    size_of,
    tracked,
    write_text,
)

if TYPE_CHECKING:
    from lk_backbones.analysis import EffectiveReceptiveField, ShapeBias
    from lk_backbones.analysis.models import NamedModel
    from lk_backbones.analysis.pictures import Pictures

__all__ = ["erf", "shape_bias"]


def erf(args: Sequence[str]) -> None:
    """Run ``erf``: measure effective receptive fields, draw them side by side, print the areas.

    Args:
        args: What follows the command.

    Raises:
        ValueError: If a model, level or size is impossible.
        OSError: If something cannot be read, or would be written over.
    """
    from lk_backbones.analysis.models import MODELS  # torch and timm take their time

    parser = argparse.ArgumentParser(
        prog="lk-backbones erf",
        description="Measure the effective receptive field as RepLKNet's authors do: how much every pixel of the input "
        "matters for the centre of a map. Prints the high-contribution area ratios, and writes one picture of all "
        "models, and of each the matrix that the authors' script saves (.npy).",
        epilog=f"MODEL is {MODELS}.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pictures", metavar="FOLDER", help="measure on its first pictures, in natural order")
    source.add_argument("--scenes", action="store_true", help="measure on drawn street scenes (the default)")
    source.add_argument("--noise", action="store_true", help="measure on noise")
    parser.add_argument("--num", type=positive, default=50, help="number of pictures (default: 50, as published)")
    parser.add_argument(
        "--size", type=size_of, default=(1024, 1024), metavar="PIXELS", help="1024, or 512x1024 (high, wide)"
    )
    parser.add_argument(
        "--level",
        default="-1",
        help="which map: a feature level (-1, the last), the path of a module (stages.3), or 'output'",
    )
    parser.add_argument("--no-relu", action="store_true", help="magnitudes instead of positive gradients only")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, slower by a third to a half (timm models)"
    )
    parser.add_argument(
        "--power", type=_share, default=1.0, help="colours of the values to this power; 0.25 shows what is faint"
    )
    add_common(parser, "erf")
    _run_erf(parser.parse_args(args))


def _run_erf(arguments: argparse.Namespace) -> None:
    from lk_backbones.analysis import effective_receptive_field
    from lk_backbones.analysis.memory import require_memory
    from lk_backbones.analysis.models import load_named_model
    from lk_backbones.drawing.canvas import save_png
    from lk_backbones.drawing.heat_maps import draw_heat_maps, ratio_lines

    folder, names = Path(arguments.to), _file_names(arguments.models)
    matrices = [folder / f"{name}.npy" for name in names]
    require_new([folder / "erf.png", folder / "erf.json", *matrices], arguments.overwrite)
    size = arguments.size
    series = _pictures(arguments, size)
    level = level_of(arguments.level)
    measured: list[tuple[NamedModel, EffectiveReceptiveField]] = []
    for name in arguments.models:
        named = load_named_model(name, arguments.pretrained, arguments.seed)
        named.model.to(choose_device(arguments.device))
        options = {"level": level, "gradient_checkpointing": arguments.gradient_checkpointing}
        try:
            require_memory(named.model, size, named.in_channels, **options)
            images = (named.normalize(image) for image in series.make(named.in_channels))
            shown = tracked(images, name, arguments.num)
            field = effective_receptive_field(
                named.model, shown, relu=not arguments.no_relu, num_images=arguments.num, **options
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        named.model = None  # type: ignore[assignment]  # several large models need not fit at once
        gc.collect()
        measured.append((named, field))
    caption = f"{series.description}, {size[0]} x {size[1]}" + (", magnitudes (no ReLU)" if arguments.no_relu else "")
    panels = [(named.name, field.matrix, [_weights(named), *ratio_lines(field.ratios)]) for named, field in measured]
    figure = draw_heat_maps(panels, caption, "log10(1 + contribution) / its maximum", power=arguments.power)
    save_png(figure, folder / "erf.png")
    for path, (_, field) in zip(matrices, measured, strict=True):
        with write_atomically(path) as file:
            np.save(file, field.contribution)
    write_text(folder / "erf.json", json.dumps(_as_json(measured, series, size), indent=2) + "\n")
    console().print(_erf_table(measured, caption))
    print(printable(f"written: {folder / 'erf.png'}, {folder / 'erf.json'} and the matrices ({folder / '*.npy'})"))


def _weights(named: NamedModel) -> str:
    return "random weights" if named.weights == "random" else f"weights {named.weights}"


def _pictures(arguments: argparse.Namespace, size: tuple[int, int]) -> Pictures:
    from lk_backbones.analysis.pictures import folder_pictures, noise_pictures, scene_pictures

    if arguments.pictures is not None:
        return folder_pictures(arguments.pictures, size, arguments.num)
    make = noise_pictures if arguments.noise else scene_pictures
    return make(size, arguments.num, arguments.seed)


def _erf_table(measured: Sequence[tuple[NamedModel, EffectiveReceptiveField]], caption: str) -> Table:
    shares = list(measured[0][1].ratios)
    columns = [Column(f"{100 * share:g} %", justify="right", no_wrap=True) for share in shares]
    table = Table(
        "model",
        "weights",
        "map",
        Column("size", no_wrap=True),
        *columns,
        title="high-contribution area",
        box=box.SIMPLE,
    )
    for named, field in measured:
        areas = [f"{100 * area:.1f}" for area in field.ratios.values()]
        cells = [named.name, named.weights, field.level, f"{field.map_size[0]}×{field.map_size[1]}", *areas]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    notes = ["Area, in percent of the picture, of the smallest centred square that holds more than this share."]
    skipped = sum(field.num_skipped for _, field in measured)
    if skipped:
        notes.append(f"{skipped} pictures were skipped: their gradients were infinite or not a number.")
    if any(not field.contribution.any() for _, field in measured):
        notes.append("nan: nothing of the picture contributes to the centre.")
    table.caption = Text(printable(f"{caption}. {' '.join(notes)}"))
    return table


def _as_json(
    measured: Sequence[tuple[NamedModel, EffectiveReceptiveField]], series: Pictures, size: tuple[int, int]
) -> list[dict[str, Any]]:
    return [
        {
            "model": named.name,
            "weights": named.weights,
            "level": field.level,
            "map_size": list(field.map_size),
            "pictures": series.description,
            "size": list(size),
            "num_images": field.num_images,
            "num_skipped": field.num_skipped,
            "relu": field.relu,
            "ratios": {f"{share:g}": None if area != area else area for share, area in field.ratios.items()},
        }
        for named, field in measured
    ]


def shape_bias(args: Sequence[str]) -> None:
    """Run ``shape-bias``: let classifiers decide between shape and texture, print and draw the shares.

    Args:
        args: What follows the command.

    Raises:
        ValueError: If a model is no classifier, or a picture's name does not say what it shows.
        OSError: If something cannot be read, or would be written over.
    """
    from lk_backbones.analysis.models import MODELS
    from lk_backbones.analysis.shape_bias import STIMULI

    parser = argparse.ArgumentParser(
        prog="lk-backbones shape-bias",
        description="Show classifiers pictures whose shape and texture contradict each other, and count what they go "
        "by: the cue-conflict protocol of model-vs-human. Prints a table, and writes a plot and every decision "
        "(.csv, in model-vs-human's columns).",
        epilog=f"MODEL is {MODELS}. The pictures of the protocol are those of {STIMULI}.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--pictures", required=True, metavar="FOLDER", help="pictures called <shape><number>-<texture><number>.png"
    )
    parser.add_argument(
        "--classes",
        help="names of the models' classes in order, separated by commas, or one a line in a file; by default "
        "ImageNet's 1000, mapped to 16",
    )
    parser.add_argument("--batch-size", type=positive, default=32)
    add_common(parser, "shape_bias")
    _run_shape_bias(parser.parse_args(args))


def _run_shape_bias(arguments: argparse.Namespace) -> None:
    from lk_backbones import analysis
    from lk_backbones.analysis.models import load_named_model
    from lk_backbones.drawing.canvas import save_png

    folder, names = Path(arguments.to), _file_names(arguments.models)
    tables = [folder / f"{name}.csv" for name in names]
    require_new([folder / "shape_bias.png", *tables], arguments.overwrite)
    classes = _class_names(arguments.classes)
    stimuli = analysis.find_stimuli(arguments.pictures, classes)
    measured: list[tuple[NamedModel, ShapeBias]] = []
    for name in arguments.models:
        named = load_named_model(name, arguments.pretrained, arguments.seed)
        named.model.to(choose_device(arguments.device))
        try:
            bias = analysis.shape_bias(
                named.model,
                stimuli,
                classes,
                batch_size=arguments.batch_size,
                progress=partial(tracked, name=name),
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        named.model = None  # type: ignore[assignment]
        gc.collect()
        measured.append((named, bias))
    for path, (named, bias) in zip(tables, measured, strict=True):
        write_text(path, _decisions_as_csv(named.name, bias))
    results = [(named.name, bias) for named, bias in measured]
    caption = f"{int(results[0][1].counts.sum())} pictures of {arguments.pictures}"
    save_png(analysis.draw_shape_bias(results, caption), folder / "shape_bias.png")
    console().print(_shape_bias_table(measured, caption))
    print(printable(f"written: {folder / 'shape_bias.png'} and the decisions ({folder / '*.csv'})"))


def _class_names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    if Path(text).is_file():
        names = Path(text).read_text(encoding="utf-8").splitlines()
    else:
        names = text.split(",")
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2:
        raise ValueError(f"--classes {text}: a file of names, or names behind commas, are expected, at least two")
    return names


def _shape_bias_table(measured: Sequence[tuple[NamedModel, ShapeBias]], caption: str) -> Table:
    numbers = [
        Column(name, justify="right", no_wrap=True) for name in ("shape bias", "95 %", "shape", "texture", "other")
    ]
    table = Table("model", "weights", *numbers, title="shape bias", box=box.SIMPLE)
    for named, bias in measured:
        share, low, high = (100 * value for value in bias.interval())
        counts = [str(number) for number in bias.counts.sum(0)]
        cells = [named.name, named.weights, f"{share:.1f} %", f"{low:.1f}–{high:.1f}", *counts]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    table.caption = Text(
        printable(
            f"{caption}. Decisions for the shape among those for shape or texture; the interval is a bootstrap's over "
            f"the pictures."
        )
    )
    return table


def _decisions_as_csv(name: str, bias: ShapeBias) -> str:
    """Write decisions in the columns of model-vs-human's raw data, which its plots read."""
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["subj", "session", "trial", "rt", "object_response", "category", "condition", "imagename"])
    for i, one in enumerate(bias.decisions, start=1):
        writer.writerow([name, 1, i, "NaN", one.answer, one.stimulus.shape, "NaN", one.stimulus.path.name])
    return sheet.getvalue()


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return number


def _file_names(models: Sequence[str]) -> list[str]:
    """Return a file name for each model, without suffix; two of one name are no comparison."""
    if len(set(models)) != len(models):
        raise ValueError(f"a model is named twice: {', '.join(models)}")
    # of a checkpoint its name without suffix; the dots in other names are no suffixes
    keys = [model if Path(model).is_file() else model.rstrip("/\\").replace(":", "_") + ".npy" for model in models]
    names = OutputNames(keys, alone=True)
    return [names[key] for key in keys]
