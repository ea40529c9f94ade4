"""What every hostile input must meet: one error that names it, an exit code other than 0, nothing run, nothing left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from lk_backbones.cli import main


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile input tries to make; the test fails if it succeeds."""
    file = tmp_path / "executed"
    yield file
    assert not file.exists(), "the input ran something"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a command runs."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, workspace: Path, canary: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Run a command on hostile input; returns its one error, on one line, in lower and upper case as printed.

    ``names`` are what the error must mention: the file, the key, the value. ``leaves`` are files that the command may
    write below the test's folder, as patterns for `Path.match`, such as ``"cache/*"``.
    """
    monkeypatch.setenv("COLUMNS", "400")

    def run(args: list[str], *names: str, leaves: Iterable[str] = ()) -> str:
        before = _content(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(args)
        out, err = capsys.readouterr()
        assert stopped.value.code not in (0, None), out
        assert "Traceback" not in err
        assert err.count("error:") == 1, err
        message = " ".join(err.split())
        for name in names:
            assert name in message, f"{name!r} is not named in: {message}"
        assert not any(ord(letter) < 32 and letter != "\n" for letter in out + err), "control characters were printed"
        after = _content(tmp_path)
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        kept = {path for path in changed if not any(path.match(pattern) for pattern in leaves)}
        assert not kept, f"the command left or changed {sorted(map(str, kept))}"
        return message

    return run


def _content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
