"""An import is quiet: it asks nobody, starts nothing and prints nothing. And it goes one way, down."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lk_backbones

PACKAGE = Path(lk_backbones.__file__).parent
# From the ground up; rooms of one floor stand side by side. What is underscored belongs to all.
FLOORS = (
    {"ops"},
    {"layers", "weights"},
    {"encoders"},
    {"heads"},
    {"metrics", "drawing", "data", "callbacks", "tasks"},
    {"repository", "hub"},
    {"analysis", "export"},
    {"cli", "run"},
)
ROOMS = sorted(set().union(*FLOORS))
# On one floor, and yet the first does not know the second.
APART = {
    *(("data", other) for other in ("tasks", "callbacks")),
    *(("tasks", "data"), ("callbacks", "data"), ("callbacks", "tasks")),
    *((room, other) for room in ("metrics", "drawing") for other in ("tasks", "callbacks", "data")),
}

# The hook sees every connection, also of threads and of libraries that catch the error.
SCRIPT = """
import importlib, os, pkgutil, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        os.write(1, f"{event}{arguments}\\n".encode())
        raise OSError("the network is not to be used")

sys.addaudithook(watch)
package = importlib.import_module("lk_backbones")
for module in pkgutil.walk_packages(package.__path__, "lk_backbones."):
    importlib.import_module(module.name)
assert {"lk_backbones.cli.training", "lk_backbones.data.coco", "albumentations"} <= sys.modules.keys()
"""


def test_no_module_uses_the_network_or_prints() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "NO_ALBUMENTATIONS_UPDATE"}
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout + run.stderr == ""


def imported_rooms(file: Path) -> Iterator[str]:
    """Rooms that a module imports from, within functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "lk_backbones" and rest.split(".")[0] in ROOMS:
                yield rest.split(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down(room: str) -> None:
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    files = sorted(PACKAGE.glob(f"{room}/**/*.py")) or [PACKAGE / f"{room}.py"]
    assert files[0].is_file()
    below = set().union(*FLOORS[: floor + 1])
    for file in files:
        for other in imported_rooms(file):
            assert other in below, f"{file.relative_to(PACKAGE)} imports from {other}, which stands above it"
            assert (room, other) not in APART, f"{file.relative_to(PACKAGE)} knows {other}"


def test_every_room_has_a_floor() -> None:
    inside = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {name for name in inside if not name.startswith("_")} == set(ROOMS)


def test_tasks_do_without_the_data_room() -> None:
    """Its libraries take seconds to import, and whoever brings data of their own needs none of them."""
    script = "import sys, lk_backbones.tasks; print({'lk_backbones.data', 'albumentations'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "set()", run.stdout + run.stderr
