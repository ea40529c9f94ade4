"""Names of recipes that are none: paths that lead elsewhere, markup, control characters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.conftest import Refused

NAMES = {
    "../recipes/quickstart/unet_replknet_31n_scenes": "quickstart/unet_replknet_31n_scenes",
    "quickstart/../quickstart/unet_replknet_31n_scenes": "quickstart/unet_replknet_31n_scenes",
    "recipes/recipes/own/unet_replknet_31n_256": "own/unet_replknet_31n_256",
    "/quickstart/unet_replknet_31n_scenes": "quickstart/unet_replknet_31n_scenes",
    "/nowhere/unet.yaml": "/nowhere/unet.yaml",
    "C:\\own\\unet_replknet_31n_256.yaml": "own/unet_replknet_31n_256",
    "own/unet_replknet_31n_256.yaml.yaml": "own/unet_replknet_31n_256",
    "own/unet_replknet_31n_256\0": "\\x00",
    "own/*": "own/*",
    "[bold red]own[/bold red]": "[bold red]own[/bold red]",
    "own/\x1b[31munet": "\\x1b[31munet",
    "own/\u202eunet": "\\u202eunet",
    "~": "~",
    ".": ".",
    "": "''",
    "x" * 5000: "xxx",
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
@pytest.mark.parametrize("command", ["copy", "--config", "--config=", "-c"])
def test_names_that_are_none(name: str, command: str, refused: Refused) -> None:
    if command == "copy":
        args = ["recipes", "copy", name]
    else:
        args = ["fit", command + name] if command.endswith("=") else ["fit", command, name]
    message = refused(args, NAMES[name])
    assert len(message) < 600


@pytest.mark.parametrize(
    ("to", "named"),
    [
        ("file", "file is there already"),
        ("file/below", "file is there already"),
        ("file/deeper/below", "file"),
        ("link", "link is there already"),
        ("nul\0byte", "nul\\x00byte"),
        ("x" * 5000, "xxx"),
    ],
)
def test_copies_go_nowhere_that_something_is(to: str, named: str, refused: Refused, workspace: Path) -> None:
    Path("file").write_text("mine")
    Path("link").symlink_to(workspace / "nothing")
    refused(["recipes", "copy", "own/unet_replknet_31n_256", to], named)
    assert sorted(path.name for path in workspace.iterdir()) == ["file", "link"]


def test_patterns_that_match_nothing(refused: Refused) -> None:
    for pattern in ("nothing", "[bold]zzz", "../*", "\x1b[31m"):
        refused(["recipes", pattern], "no recipe matches")
