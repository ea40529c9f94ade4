"""``lk-backbones models``: the encoders in a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import lk_backbones
from lk_backbones._printing import printable

__all__ = ["run"]


def run(args: Sequence[str]) -> None:
    """Print the table.

    Args:
        args: What follows the command: a pattern of names.

    Raises:
        ValueError: If no encoder matches.
    """
    parser = argparse.ArgumentParser(prog="lk-backbones models", description="List the encoders.")
    parser.add_argument("pattern", nargs="?", default="*", help="names to list, such as 'replknet_31*'")
    names = lk_backbones.list_encoders(parser.parse_args(args).pattern)
    if not names:
        raise ValueError(f"no encoder matches; there are {', '.join(lk_backbones.list_encoders())}")
    table = Table("name", Column("parameters", justify="right"), "kernel sizes", "published weights", title="encoders")
    for name in names:
        table.add_row(*(Text(printable(cell)) for cell in (name, *_describe(name))))
    table.caption = "Parameters without classifier. *: only on the authors' page, see README."
    Console().print(table)


def _describe(name: str) -> tuple[str, str, str]:
    """Parameters without the classifier, kernel size of each stage, and weights (starred: timm cannot fetch them)."""
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kernels = [
        max(module.kernel_size for module in stage.modules() if isinstance(module, torch.nn.Conv2d))
        for stage in model.stages
    ]
    sizes = "-".join(str(k[0]) if k[0] == k[1] else f"{k[0]}x{k[1]}" for k in kernels)
    fetchable = set(timm.list_pretrained(f"{name}.*"))
    weights = [
        full_name.partition(".")[2] + ("" if full_name in fetchable else "*")
        for full_name in timm.list_models(f"{name}.*", include_tags=True)
        if not full_name.endswith(".untrained")
    ]
    return f"{parameters / 1e6:.1f} M", sizes, ", ".join(weights) or "none"
