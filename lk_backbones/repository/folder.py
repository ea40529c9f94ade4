"""Folders that appear whole under their name, or not at all, and never in place of what somebody else made.

A folder that was written here says so: its ``config.json`` holds the checksum of every file. What was changed since, or
put beside it, is the user's.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lk_backbones.weights.files import sha256_of

__all__ = ["check_target", "new_folder", "record_files"]

_CONFIG, _OURS, _RECORD = "config.json", "_lk_backbones", "files"


def record_files(folder: Path) -> None:
    """Note in a finished folder's ``config.json`` what was written, so that it can be told from what a user changes.

    Args:
        folder: Holds a ``config.json`` with our part in it.
    """
    file = folder / _CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    record = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != _CONFIG}
    config[_OURS][_RECORD] = record | {_CONFIG: _digest_without_record(config)}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _digest_without_record(config: dict[str, Any]) -> str:
    ours = {key: value for key, value in config[_OURS].items() if key != _RECORD}
    return hashlib.sha256(json.dumps(config | {_OURS: ours}, sort_keys=True).encode()).hexdigest()


def check_target(target: Path, source: str | os.PathLike[str] | None = None) -> None:
    """Refuse a place for a folder where something would be lost.

    Args:
        target: Where a folder is to appear.
        source: What is to be written there, if it is a file or folder of this machine.

    Raises:
        FileExistsError: If something else is there than an empty folder, or one that was written here and not changed
            since; or if it is the folder that the source lies in, or the one that the command runs in.
    """
    place = Path(os.path.abspath(target))
    if place.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise FileExistsError(f"'{target}' is the current folder or one that it lies in: name a folder of its own")
    origin = None if source is None else Path(source).expanduser()
    if origin is not None and origin.exists() and place.resolve() in (origin.resolve(), *origin.resolve().parents):
        whose = "is the source itself" if place.resolve() == origin.resolve() else "is the folder of the source"
        raise FileExistsError(f"'{target}' {whose}, which would be lost: name another folder")
    if place.is_symlink():
        raise FileExistsError(f"'{target}' is a symbolic link: name the folder itself, or another one")
    if not place.exists():
        return
    if not place.is_dir():
        raise FileExistsError(f"'{target}' exists and is a file: name another folder")
    foreign, changed = _of_others(place)
    if foreign:
        raise FileExistsError(f"'{target}' exists and holds other files ({foreign[:5]}): name another folder")
    if changed:
        raise FileExistsError(
            f"'{target}' exists, and {changed[:5]} were not written by this command or were changed since: name "
            f"another folder, or remove it if nothing in it is wanted"
        )


def _of_others(folder: Path) -> tuple[list[str], list[str]]:
    """Names in a folder that this package never writes, and those that it did not write as they are."""
    record = _read_record(folder)
    foreign, changed = [], []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file() or path.name not in (*record, *_WRITTEN):
            foreign.append(path.name)
        elif not record or (path.name != _CONFIG and sha256_of(path) != record.get(path.name)):
            changed.append(path.name)
    return foreign, changed


_WRITTEN = (_CONFIG, "README.md", "model.safetensors", "task.safetensors")


def _read_record(folder: Path) -> dict[str, Any]:
    """Return the checksums that a folder's ``config.json`` holds; empty if it is not as it was written."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        record = config[_OURS][_RECORD]
        return dict(record) if record[_CONFIG] == _digest_without_record(config) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # none, or anybody's
        return {}


@contextmanager
def new_folder(target: Path, source: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Write a folder beside its place; it gets there when the block ends without an error.

    An earlier folder of ours gives way at that moment, and comes back if its successor cannot take its place. Whatever
    goes wrong, what was there is there.

    Args:
        target: Its place; folders above are made as needed.
        source: As for `check_target`.

    Yields:
        A new, empty folder to write into.

    Raises:
        FileExistsError: As `check_target`.
    """
    check_target(target, source)
    place = Path(os.path.abspath(target))
    above = next(parent for parent in place.parents if parent.exists())
    mark = secrets.token_hex(4)
    begun, earlier = (above / f".{place.name[:100]}.{mark}.{word}" for word in ("partial", "earlier"))
    begun.mkdir()
    try:
        yield begun
        check_target(target, source)  # what came meanwhile stays, too
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            place.rename(earlier)
        try:
            begun.rename(place)
        except OSError:
            if earlier.exists():
                earlier.rename(place)
            raise
    except BaseException:
        shutil.rmtree(begun, ignore_errors=True)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
