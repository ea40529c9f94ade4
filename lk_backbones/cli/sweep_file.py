"""The files of ``lk-backbones sweep``: the cells of a published table, each a recipe and what is changed in it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lk_backbones.cli.recipes import find_recipe, list_recipes, list_sweeps
from lk_backbones.weights.errors import nearest, shorten

__all__ = ["Cell", "Sweep", "read_sweep"]

_FLAG = re.compile(r"(trainer|model|data)(\.\w+)+")


@dataclass(frozen=True)
class Cell:
    """A cell of the table.

    Attributes:
        name: What the table calls it.
        overrides: Values by flag, without its dashes (``model.encoder_kwargs``), those of all cells among them.
        published: Published numbers in percent, by metric.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name for its folder."""
        return re.sub(r"[^\w.+-]+", "_", self.name.replace("×", "x")).strip("_")


@dataclass(frozen=True)
class Sweep:
    """A table whose cells are to be trained.

    Attributes:
        path: The file.
        title: What it is about, in a line.
        source: Where the published numbers stand.
        recipe: Name or file of the recipe that all cells share.
        metrics: Titles of the columns, by the name that is logged.
        seeds: Seeds that every cell is trained with.
        cells: The cells.
    """

    path: Path
    title: str
    source: str
    recipe: str
    metrics: dict[str, str]
    seeds: list[int]
    cells: list[Cell]


def read_sweep(name: str, small: bool = False) -> Sweep:
    """Read a file and check all of it.

    ::

        title: Shortcuts, with small and large kernels
        source: arXiv 2203.06717, Table 2
        recipe: mobilenetv2/imagenet              # or a file, as --config takes it
        metrics: {val/top1: top-1}                # column by logged name; logged are shares, shown are percent
        seeds: [0]
        small:                                    # --small: the same cells by another recipe
          recipe: quickstart/classify_replknet_31n_shapes
          seeds: [0, 1, 2]
          overrides: {model.encoder: mobilenetv2_lk_050}
        cells:
          - name: 13×13
            overrides: {model.encoder_kwargs: {kernel_sizes: 13}}
            published: {val/top1: 72.53}

    Overrides are flags of ``lk-backbones fit``; those of ``small`` win over a cell's. ``small`` may have ``metrics``
    too.

    Args:
        name: File, or name of one that comes with the package.
        small: Whether the small experiment is meant.

    Returns:
        The sweep.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: With the file and the key.
    """
    path = _find(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    where = str(path)
    content = _mapping(content, where)
    _check_keys(content, where, ("title", "source", "recipe", "metrics", "seeds", "cells"), ("small",))
    if small and "small" not in content:
        raise ValueError(f"{where} has no 'small': there is no small experiment for it, leave out --small")
    common = dict(content)
    overrides: dict[str, Any] = {}
    if "small" in content:
        changed = _mapping(content["small"], f"{where}: small")
        _check_keys(changed, f"{where}: small", (), ("recipe", "seeds", "metrics", "overrides"))
        checked = _overrides(changed.get("overrides", {}), f"{where}: small.overrides")
        for key in changed.keys() & _CHECKS.keys():
            _CHECKS[key](changed[key], f"{where}: small.{key}")
        if small:
            common |= {key: value for key, value in changed.items() if key != "overrides"}
            overrides = checked
    metrics = _metrics(common["metrics"], f"{where}: metrics")
    known = {*_metrics(content["metrics"], f"{where}: metrics"), *metrics}
    return Sweep(
        path=path,
        title=_text(content["title"], f"{where}: title"),
        source=_text(content["source"], f"{where}: source"),
        recipe=_recipe(common["recipe"], f"{where}: recipe"),
        metrics=metrics,
        seeds=_seeds(common["seeds"], f"{where}: seeds"),
        cells=_cells(content["cells"], f"{where}: cells", overrides, known),
    )


def _find(name: str) -> Path:
    if os.path.isfile(name):
        return Path(name)
    sweeps = list_sweeps()
    if found := find_recipe(name, sweeps):
        return found.path
    close = nearest(name[:100].removeprefix("recipes/"), [sweep.name for sweep in sweeps])
    there = close or f"; there are {', '.join(sweep.name for sweep in sweeps)}"
    raise FileNotFoundError(f"the file {shorten(name)} is not there, and no sweep has this name{there}")


def _cells(value: Any, where: str, common: dict[str, Any], metrics: set[str]) -> list[Cell]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list of cells, got {shorten(value)}")
    cells: list[Cell] = []
    for i, entry in enumerate(value):
        place = f"{where}[{i}]"
        entry = _mapping(entry, place)
        _check_keys(entry, place, ("name",), ("overrides", "published"))
        published = _mapping(entry.get("published", {}), f"{place}.published")
        for key, number in published.items():
            if key not in metrics:
                raise ValueError(f"{place}.published: {shorten(key)} is none of the metrics, {sorted(metrics)}")
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(f"{place}.published: {key} must be a number in percent, got {shorten(number)}")
        overrides = _overrides(entry.get("overrides", {}), f"{place}.overrides")
        cell = Cell(_text(entry["name"], f"{place}.name"), overrides | common, published)
        if not cell.folder:
            raise ValueError(f"{place}.name: no folder can have the name of {shorten(cell.name)}")
        twin = next((other.name for other in cells if other.folder.lower() == cell.folder.lower()), None)
        if twin is not None:
            raise ValueError(f"{place}.name: {shorten(cell.name)} and {shorten(twin)} would share a folder")
        cells.append(cell)
    return cells


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where} must be values by name, got {shorten(value)}")
    return dict(value)


def _check_keys(value: dict[str, Any], where: str, needed: tuple[str, ...], others: tuple[str, ...]) -> None:
    for key in value:
        if key not in (*needed, *others):
            close = nearest(key, [*needed, *others]) or f", only {', '.join((*needed, *others))}"
            raise ValueError(f"{where} has no key {shorten(key)}{close}")
    for key in needed:
        if key not in value:
            raise ValueError(f"{where} lacks '{key}'")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError(f"{where} must be a line of text, got {shorten(value)}")
    return value


def _recipe(value: Any, where: str) -> str:
    name = _text(value, where)
    if os.path.isfile(name):
        return name
    if (recipe := find_recipe(name)) is None:
        close = nearest(name[:100], [recipe.name for recipe in list_recipes()])
        raise ValueError(f"{where}: there is no recipe and no file {shorten(name)}{close}")
    return recipe.name


def _seeds(value: Any, where: str) -> list[int]:
    fine = isinstance(value, list) and value and all(type(seed) is int and 0 <= seed < 2**32 for seed in value)
    if not fine or len(set(value)) < len(value):
        raise ValueError(f"{where} must be a list of different numbers, none of them negative, got {shorten(value)}")
    return list(value)


def _metrics(value: Any, where: str) -> dict[str, str]:
    metrics = _mapping(value, where)
    if not metrics:
        raise ValueError(f"{where} must name one metric at least")
    return {key: _text(title, f"{where}.{key}") for key, title in metrics.items()}


def _overrides(value: Any, where: str) -> dict[str, Any]:
    overrides = _mapping(value, where)
    for key in overrides:
        if not _FLAG.fullmatch(key):
            raise ValueError(
                f"{where}: {shorten(key)} is no flag of `lk-backbones fit`: they begin with 'trainer.', 'model.' or "
                "'data.'"
            )
    return overrides


_CHECKS: dict[str, Any] = {"recipe": _recipe, "seeds": _seeds, "metrics": _metrics}
