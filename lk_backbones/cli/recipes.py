"""``lk-backbones recipes``, and the names by which ``--config`` takes them, in a clone as in an installed wheel."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import lk_backbones
from lk_backbones._files import write_atomically
from lk_backbones._printing import printable
from lk_backbones.weights.errors import nearest, shorten

__all__ = ["Recipe", "find_configuration", "find_recipe", "list_recipes", "list_sweeps", "run"]

_PUBLISHED = "# Published: "
# The folder of the files of `lk-backbones sweep`, each of which names recipes.
_SWEEPS = "guidelines"


@dataclass(frozen=True)
class Recipe:
    """A recipe that comes with the package.

    Attributes:
        name: Folder and file without suffix, such as ``"camvid/unet_replknet_31n_360"``.
        path: The file.
    """

    name: str
    path: Path

    def head(self) -> tuple[str, str]:
        """Return what it trains, in a sentence, and the number that was published for it, or ``"none"``."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        published = next((line.removeprefix(_PUBLISHED) for line in lines if line.startswith(_PUBLISHED)), "none")
        return lines[0].removeprefix("# "), published


def list_recipes(pattern: str = "*") -> list[Recipe]:
    """List the recipes that come with the package, sorted by name.

    A wheel has a copy of them inside the package; in a clone they are beside it.

    Args:
        pattern: A part of their names, with ``*`` for anything in between.

    Returns:
        The recipes; none if the pattern matches none.
    """
    return [recipe for recipe in _files() if recipe.path.parent.name != _SWEEPS and _matches(recipe, pattern)]


def list_sweeps() -> list[Recipe]:
    """List the files of `lk-backbones sweep` that come with the package, sorted by name."""
    return [recipe for recipe in _files() if recipe.path.parent.name == _SWEEPS]


def _files() -> list[Recipe]:
    package = Path(lk_backbones.__file__).parent
    folder = next((path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()), package)
    return [
        Recipe(path.relative_to(folder).with_suffix("").as_posix(), path) for path in sorted(folder.glob("*/*.yaml"))
    ]


def _matches(recipe: Recipe, pattern: str) -> bool:
    return fnmatchcase(recipe.name, f"*{pattern}*")


def find_recipe(name: str, among: Sequence[Recipe] | None = None) -> Recipe | None:
    """Find a recipe by its name, with or without ``recipes/`` before and ``.yaml`` after it.

    Args:
        name: The name. It is compared with those there are, and never a path.
        among: The recipes; by default all of `list_recipes`.

    Returns:
        The recipe; ``None`` if there is none of this name.
    """
    wanted = name.replace("\\", "/").removeprefix("recipes/").removesuffix(".yaml")
    among = list_recipes() if among is None else among
    return next((recipe for recipe in among if recipe.name == wanted), None)


def find_configuration(value: str) -> str:
    """Find what ``--config`` means: a file, else the recipe of that name.

    Args:
        value: What was given; an address (``s3://…``) or the text of a configuration stays as it is.

    Returns:
        The file, the address or the text.

    Raises:
        FileNotFoundError: If there is neither, with the recipes whose names resemble it.
    """
    if os.path.exists(value) and not os.path.isdir(value):
        return value
    if recipe := find_recipe(value):
        return str(recipe.path)
    if "://" in value or _is_configuration(value):
        return value
    what = "is a folder" if os.path.isdir(value) else "is not there"
    raise FileNotFoundError(f"--config: the file {shorten(value)} {what}, and {_no_recipe(value)}")


def _is_configuration(text: str) -> bool:
    if text.lstrip().startswith("{") or "\n" in text:
        return True  # whose mistakes the parser explains
    try:
        return isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return False


def _no_recipe(name: str) -> str:
    close = nearest(name[:100].removeprefix("recipes/"), [recipe.name for recipe in list_recipes()])
    return f"no recipe has this name{close or '; `lk-backbones recipes` lists them'}"


def run(args: Sequence[str]) -> None:
    """List the recipes, or copy one.

    Args:
        args: What follows the command: a pattern of names, or ``copy NAME [TO]``.

    Raises:
        ValueError: If no recipe matches.
        FileExistsError: If the copy would replace a file.
    """
    if list(args[:1]) == ["copy"]:
        parser = argparse.ArgumentParser(
            prog="lk-backbones recipes copy", description="Write a recipe into a file of your own, to edit it."
        )
        parser.add_argument("name", help="such as own/unet_replknet_31n_256")
        parser.add_argument("to", nargs="?", default=".", help="file, or folder for it; by default the current folder")
        arguments = parser.parse_args(args[1:])
        _copy(arguments.name, arguments.to)
        return
    parser = argparse.ArgumentParser(
        prog="lk-backbones recipes",
        description="List the recipes, which `lk-backbones fit --config NAME` trains, and the numbers published for "
        "them. `lk-backbones recipes copy NAME [TO]` writes one into a file of your own.",
    )
    parser.add_argument("pattern", nargs="?", default="*", help="a part of their names, such as coco or 'unet*31n'")
    _print(parser.parse_args(args).pattern)


def _print(pattern: str) -> None:
    recipes = list_recipes(pattern)
    if not recipes:
        raise ValueError(f"no recipe matches {shorten(pattern)}; `lk-backbones recipes` lists them all")
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=200)
    table = Table(title="recipes", title_justify="left", box=box.SIMPLE, padding=(0, 1))
    table.add_column("name", no_wrap=True)
    table.add_column("published result")
    wide = console.width >= 110  # in a narrow terminal the name has to say it
    if wide:
        table.add_column("what it trains")
    for recipe in recipes:
        title, published = recipe.head()
        table.add_row(*(Text(printable(cell)) for cell in (recipe.name, published, *([title] if wide else []))))
    console.print(table)
    console.print(
        Text(
            "Results in percent, as the authors of the encoder report them. `lk-backbones fit --config NAME` trains "
            "one, `lk-backbones recipes copy NAME` writes it into a file of your own."
        )
    )


def _copy(name: str, to: str) -> None:
    recipe = find_recipe(name)
    if recipe is None:
        raise ValueError(f"{shorten(name)}: {_no_recipe(name)}")
    if "\0" in to:
        raise ValueError(f"{shorten(to)} cannot be the name of a file")
    is_folder = os.path.isdir(to) or to.endswith(("/", os.sep))
    path = Path(to) / recipe.path.name if is_folder else Path(to)
    try:
        with write_atomically(path, replace=False) as file:
            file.write(recipe.path.read_bytes())
    except FileExistsError as error:
        # the file itself, or one where a folder would have to be
        there = next(part for part in (path, *path.parents) if os.path.lexists(part))
        raise FileExistsError(f"{there} is there already and stays as it is: name another file to write") from error
    print(printable(f"written: {path}"))
    print(printable(f"train:   lk-backbones fit --config {path}"))
