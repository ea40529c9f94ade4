"""What the commands that look at models have in common: how they read options, and where and how they write."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.text import Text

from lk_backbones._files import write_atomically
from lk_backbones._printing import printable

__all__ = [
    "add_common",
    "choose_device",
    "console",
    "level_of",
    "positive",
    "require_new",
    "seconds",
    "size_of",
    "step_printer",
    "tracked",
    "write_text",
]


def add_common(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add the options that all commands have which look at models."""
    parser.add_argument("--pretrained", action="store_true", help="default weights for bare names (else random ones)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights, scenes and noise (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    parser.add_argument("--to", metavar="DIR", default=folder, help=f"folder to write into (default: {folder})")
    parser.add_argument("--overwrite", action="store_true", help="write over what an earlier run has left there")


def positive(text: str) -> int:
    """Read a number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be positive")
    return number


def seconds(text: str) -> float:
    """Read a time above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return number


def size_of(text: str) -> tuple[int, int]:
    """Read a height and width, such as 512x1024, or one number for both."""
    height, cross, width = text.lower().replace("×", "x").partition("x")
    try:
        return positive(height), positive(width if cross else height)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a height and width such as 512x1024, or one number"
        ) from None


def level_of(text: str) -> int | str:
    """Read a level: a number, or the path of a module."""
    return int(text) if text.lstrip("-").isdigit() else text


def choose_device(name: str | None) -> Any:
    """Return the device of a name, by default CUDA's where there is one."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def require_new(paths: Iterable[Path], overwrite: bool) -> None:
    """Refuse to write over files that are there."""
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise FileExistsError(f"{there[0]}{more} exists: choose another folder with --to, or add --overwrite")


def write_text(path: Path, text: str) -> None:
    """Write a file of text that is whole or not there."""
    with write_atomically(path) as file:
        file.write(text.encode())


def tracked(items: Iterable[Any], name: str, total: int | None = None) -> Iterable[Any]:
    """Show in a terminal how far a series is."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        return items
    return track(items, description=printable(name).replace("[", "\\["), total=total, console=errors, transient=True)


def step_printer() -> Callable[[str], None]:
    """Return what tells each step of a long work in a terminal, and nothing elsewhere."""
    errors = Console(stderr=True)
    return lambda step: errors.print(Text(printable(f"{step} …"))) if errors.is_terminal else None


def console() -> Console:
    """Return a console for tables, which are not squeezed where the output is no terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)
