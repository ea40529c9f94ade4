"""``lk-backbones hub list | pull | publish`` and ``lk-backbones convert``: weights from and to the Hub."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lk_backbones._printing import printable
from lk_backbones.encoders import list_encoders
from lk_backbones.weights import PublishedWeights, list_published, pull
from lk_backbones.weights.catalogue import find_published
from lk_backbones.weights.sources import NAMESPACE_VARIABLE, default_namespace

__all__ = ["convert", "run"]

_METRICS = {"classification": ("top1", "top-1"), "segmentation": ("mean_iou", "mIoU"), "detection": ("box_ap", "AP")}


def run(args: Sequence[str]) -> None:
    """Run ``hub list``, ``hub pull`` or ``hub publish``.

    Args:
        args: What follows ``hub``.

    Raises:
        ValueError: If the weights cannot be had or published.
    """
    parser = argparse.ArgumentParser(prog="lk-backbones hub", description="Weights from and to the Hugging Face Hub.")
    commands = parser.add_subparsers(dest="command", required=True)

    lister = commands.add_parser("list", help="every published weight, where it lies, and what is in the local cache")
    lister.add_argument("pattern", nargs="?", default="*", help="names to list, such as '*replknet_31b*'")
    lister.add_argument("--task", choices=["classification", "segmentation", "detection"])
    lister.add_argument("--namespace", help=f"Hub user or organisation that mirrors them (or {NAMESPACE_VARIABLE})")

    puller = commands.add_parser("pull", help="fetch and verify weights; prints the file and its checksum")
    puller.add_argument("source", help="hf-hub:owner/name[@revision], or the name of published weights")
    puller.add_argument("--revision", help="branch, tag or commit")
    puller.add_argument("--namespace", help=f"Hub user or organisation that mirrors them (or {NAMESPACE_VARIABLE})")

    publisher = commands.add_parser(
        "publish",
        help="make a checkpoint, or a published file, a Hub repository that timm, smp and lk_backbones load",
        epilog="Example: lk-backbones hub publish best.ckpt --repo you/street-scenes --license mit --dry-run",
    )
    publisher.add_argument(
        "source", help="checkpoint of `lk-backbones fit`, published file, folder or any other source"
    )
    publisher.add_argument("--repo", required=True, help="owner/name; created if it does not exist")
    _add_card_arguments(publisher)
    publisher.add_argument("--private", action="store_true", help="make a new repository private")
    publisher.add_argument("--revision", help="branch to commit to, instead of main")
    publisher.add_argument("--dry-run", action="store_true", help="only write the folder, to look at it first")
    publisher.add_argument("--folder", help="where to keep the files; with --dry-run by default ./NAME")

    arguments = parser.parse_args(args)
    {"list": _list, "pull": _pull, "publish": _publish}[arguments.command](arguments)


def convert(args: Sequence[str]) -> None:
    """Run ``convert``: a published checkpoint to a folder in our layout.

    Args:
        args: What follows ``convert``.

    Raises:
        ValueError: If the file is damaged, dangerous, or of no model that is known.
    """
    parser = argparse.ArgumentParser(
        prog="lk-backbones convert",
        description="Turn a published checkpoint (the authors', OpenMMLab's, or one of `lk-backbones fit`) into a "
        "folder with model.safetensors, config.json and a model card, and say what became of every tensor.",
    )
    parser.add_argument("file")
    parser.add_argument("--to", metavar="DIR", help="the folder; by default one called like the file, beside it")
    _add_card_arguments(parser)
    arguments = parser.parse_args(args)
    file = Path(arguments.file)
    if not arguments.to and (not file.suffix or arguments.file.startswith(("hf-hub:", "hf_hub:"))):
        raise ValueError(f"'{file}' has no name that a folder could be called after: name the folder with --to")
    folder = Path(arguments.to) if arguments.to else file.with_suffix("")
    _write(arguments, arguments.file, f"you/{_repository_name(folder.name)}", folder)


def _repository_name(text: str) -> str:
    """Return the nearest name that a repository of the Hub may have."""
    letters = re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
    return re.sub(r"([-.])[-.]+", r"\1", letters)[:90].strip("-.") or "model"


def _add_card_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="what a bare file holds: a published name (replknet_31b.in1k) or a timm model")
    parser.add_argument(
        "--model-kwargs", default="{}", metavar="JSON", help="""its keyword arguments, such as '{"kernel_sizes": 7}'"""
    )
    parser.add_argument("--license", help="SPDX identifier of the weights' licence, such as mit")
    parser.add_argument("--data", help="what it was trained on")
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME=VALUE", help="a result, such as test/mean_iou=0.712"
    )
    parser.add_argument("--measured-with", metavar="COMMAND", help="the command that gave the results")
    parser.add_argument("--description", help="a sentence for the model card")


def _list(arguments: argparse.Namespace) -> None:
    published = list_published(arguments.pattern, arguments.task)
    if not published:
        raise ValueError(f"no published weights match '{arguments.pattern}'; `lk-backbones hub list` shows them all")
    namespace = arguments.namespace or default_namespace()
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=140)
    tables: dict[tuple[str, bool], list[PublishedWeights]] = {}
    for weights in sorted(published, key=lambda weights: not _is_built_in(weights)):
        tables.setdefault((weights.task, _is_built_in(weights)), []).append(weights)
    for (task, built_in), rows in tables.items():
        title = task if built_in else f"{task}, not yet: lk_backbones has no such encoder so far"
        console.print(_table(title, task, rows, namespace, console.width))
    first = f"{namespace} on the Hub comes first. " if namespace else ""
    notes = (
        f"{first}Results in percent, as the authors report them. 1K, 22K: ImageNet. drive*: a file-sharing drive; "
        f"`lk-backbones hub pull NAME` says how to get it. {NAMESPACE_VARIABLE} names a Hub user or organisation that "
        f"mirrors these."
    )
    console.print(Text(printable(notes)))


def _is_built_in(weights: PublishedWeights) -> bool:
    """Return whether there is an encoder that the weights fit into."""
    return any(f"_{weights.architecture}".endswith(f"_{encoder}") for encoder in list_encoders())


def _table(title: str, task: str, published: list[PublishedWeights], namespace: str | None, width: int) -> Table:
    wide = width >= 110
    columns = ["name", "data", _METRICS[task][1], *(["size", "licence"] if wide else []), "from", "cached"]
    longest = max(len(weights.name) for weights in published)
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0 if width < 90 else (0, 1))
    for name in columns:  # in a narrow terminal the data give way
        table.add_column(name, no_wrap=True, min_width={"name": longest, "data": 1}.get(name, 6))
    for weights in published:
        value = weights.metrics.get(_METRICS[task][0])
        place = {"hub": weights.hub if wide else "Hub", "mirror": "mirror", "drive": "drive*"}[weights.place]
        details = [str(weights.input_size or ""), weights.license] if wide else []
        row = [
            weights.name,
            re.sub(", .*kernels", "", weights.data).replace("ImageNet-", "").replace(", then ", " → "),
            "" if value is None else f"{value:.1f}",
            *details,
            place,
            "yes" if weights.cached_file(namespace) else "",
        ]
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _pull(arguments: argparse.Namespace) -> None:
    published = find_published(arguments.source)
    if published is not None and not _is_built_in(published):
        print(f"not yet: lk_backbones has no encoder for '{published.name}' so far; the file alone is fetched")
    weights = pull(arguments.source, arguments.revision, namespace=arguments.namespace)
    parameters = sum(tensor.numel() for tensor in weights.state_dict.values())
    lines = {
        "source": weights.source,
        "file": weights.file,
        "sha256": weights.sha256,
        "tensors": f"{len(weights.state_dict)}, {parameters / 1e6:.1f} M numbers",
    }
    verified = weights.verified or {weights.file.name: "not verified: it lay on this machine"}
    lines |= {f"verified {name}": how for name, how in verified.items()}
    lines |= {f"also in it ({reason})": ", ".join(keys[:5]) for reason, keys in weights.skipped.items()}
    for name, value in lines.items():
        print(printable(f"{name}: {value}"))


def _publish(arguments: argparse.Namespace) -> None:
    from lk_backbones import hub  # Lightning takes its time

    if arguments.dry_run:
        _write(arguments, arguments.source, arguments.repo, Path(arguments.folder or arguments.repo.rpartition("/")[2]))
        return
    source = hub.push(
        arguments.source,
        arguments.repo,
        _info(arguments),
        folder=arguments.folder,
        private=arguments.private or None,
        revision=arguments.revision,
    )
    print(printable(f"published: {source}"))


def _write(arguments: argparse.Namespace, source: str, repo: str, folder: Path) -> None:
    from lk_backbones import hub  # Lightning takes its time

    report: list[hub.LoadReport] = []
    written = hub.push(source, repo, _info(arguments), folder=folder, dry_run=True, report=report)
    for line in report:
        print(printable(line, newlines=True))
    print(printable(f"written: {', '.join(sorted(str(path) for path in Path(written).iterdir()))}"))


def _info(arguments: argparse.Namespace) -> Any:
    from lk_backbones.hub import RepositoryInfo

    metrics = {}
    for text in arguments.metric:
        name, _, value = text.rpartition("=")
        try:
            metrics[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"--metric {text}: NAME=VALUE with a number is expected, such as test/mean_iou=0.712")
    try:
        model_kwargs = json.loads(arguments.model_kwargs)
    except ValueError as error:
        raise ValueError(
            f"--model-kwargs {arguments.model_kwargs}: JSON is expected, such as '{{\"kernel_sizes\": 7}}'"
        ) from error
    return RepositoryInfo(
        model=arguments.model,
        model_kwargs=model_kwargs,
        license=arguments.license,
        data=arguments.data,
        metrics=metrics,
        command=arguments.measured_with,
        description=arguments.description,
    )
