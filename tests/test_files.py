"""Names of what is written about pictures, and files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lk_backbones._files import OutputNames, write_atomically


@pytest.mark.parametrize(
    "expected",
    [
        {"set/frame1.jpg": "frame1", "set/frame2.jpg": "frame2"},
        {"set/day/a.jpg": "a", "set/night/a.jpg": "night_a", "set/night/a.png": "night_a_png"},
        {"a.jpg": "a", "a.png": "a_png", "a.jpeg": "a_jpeg", "b.png": "b"},
        {"a.jpg": "a", "A.jpg": "A_jpg", "A.JPG": "A_JPG_2", "a.png": "a_png"},
        {"stra\u00dfe.png": "stra\u00dfe", "STRASSE.jpg": "STRASSE_jpg"},
        {"caf\u00e9.jpg": "caf\u00e9", "cafe\u0301.png": "cafe\u0301_png"},
        {"s1/image/0.png": "0", "s2/image/0.png": "image_0", "s3/image/0.png": "s3_image_0"},
        {"x/a_b.png": "a_b", "x/a/b.png": "b", "y/a/b.png": "y_a_b"},
        {"/one/a.png": "a", "other/a.png": "other_a"},
        {"/a.png": "a", "/a.jpg": "a_jpg"},
        {"batch_0_0": "batch_0_0", "batch_0_1": "batch_0_1"},
    ],
    ids=lambda expected: next(iter(expected)),
)
def test_names_are_unique_and_depend_on_the_whole_set(expected: dict[str, str]) -> None:
    names = OutputNames(list(expected), alone=False)
    # asked for in another order, and twice: that of the processes and of repeated pictures does not matter
    assert {path: names[path] for path in reversed(expected)} == expected
    assert {path: names[path] for path in expected} == expected


def test_names_of_files_that_nobody_told_of() -> None:
    names = OutputNames([], alone=True)
    assert [names[path] for path in ("folder/a.jpg", "other/a.jpg", "third/b.jpg")] == ["a", "other_a", "b"]
    one, two = OutputNames([], alone=False), OutputNames([], alone=False)
    assert one["day/a.jpg"] != two["night/a.jpg"]
    assert one["day/a.jpg"] == two["day/a.jpg"]
    assert one["day/a.jpg"].startswith("a_")
    assert one["process_0_batch_0_0"] == "process_0_batch_0_0"


def test_names_fit_into_file_systems(tmp_path: Path) -> None:
    paths = [f"{folder}/{'ö' * 120}{end}.png" for folder in ("x" * 200, "y" * 200) for end in "12"]
    names = OutputNames(paths, alone=True)
    for path in paths:
        (tmp_path / f"{names[path]}.png").touch()
    assert len(list(tmp_path.iterdir())) == 4


def test_names_that_windows_does_not_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["http:a?b=1", "nul", "c*d", "c|d", "12:30\n"]
    assert OutputNames(paths, alone=True)["c*d"] == ("c_d" if os.name == "nt" else "c*d")
    monkeypatch.setattr("lk_backbones._files.WINDOWS", True)
    names = OutputNames(paths, alone=True)
    assert [names[path] for path in paths] == ["http_a_b=1", "_nul", "c_d", "c_d_2", "12_30_"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with write_atomically(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    for durable in (False, True):
        with pytest.raises(KeyboardInterrupt):
            _interrupted(path, durable)
        assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [("file", b"one")]
    with write_atomically(path, durable=True) as file:
        file.write(b"three")
    assert path.read_bytes() == b"three"


def _interrupted(path: Path, durable: bool) -> None:
    with write_atomically(path, durable) as file:
        file.write(b"two")
        raise KeyboardInterrupt


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_a_file_that_came_up_meanwhile_stays(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(source: Path, target: Path) -> None:
            raise PermissionError(1, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    with write_atomically(path, replace=False) as file:
        file.write(b"one")
    assert path.read_bytes() == b"one"
    path.unlink()
    with pytest.raises(FileExistsError):
        _overtaken(path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"somebody else's")]


def _overtaken(path: Path) -> None:
    with write_atomically(path, replace=False) as file:
        file.write(b"two")
        path.write_bytes(b"somebody else's")
