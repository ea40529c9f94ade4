"""Names that files can have anywhere, and files that appear at once, whole, under their name, or not at all."""

import errno
import hashlib
import os
import re
import secrets
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

__all__ = ["UNFINISHED", "OutputNames", "write_atomically"]

#: Names of files that are being written, or that a killed process has left behind. Tools that look for files by their
#: name, as Lightning for ``*.ckpt`` and ``*ckpt_*``, must not find these.
UNFINISHED = ".unfinished-*.tmp"


@contextmanager
def write_atomically(path: Path, durable: bool = False, replace: bool = True) -> Iterator[IO[bytes]]:
    """Open a binary file that gets its name when the block ends without an error; folders are made as needed.

    Args:
        path: The file's name.
        durable: Whether to wait until the content is on the disk before an existing file is replaced, so that one of
            the two is there even after a power cut.
        replace: Whether an existing file is replaced.

    Raises:
        FileExistsError: If there is a file of the name, even one that came up meanwhile, and it may not be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(UNFINISHED.replace("*", secrets.token_hex(8)))
    with open(temporary, "xb") as file:
        try:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            file.close()  # Windows replaces and removes no open file
            if replace:
                temporary.replace(path)
            else:
                _name_once(temporary, path)
        except BaseException:
            _discard(file, temporary)
            raise
    if durable and not WINDOWS:  # a rename is on the disk with the folder that it happened in
        _sync_folder(path.parent)


def _name_once(temporary: Path, path: Path) -> None:
    """Give a file its name unless something has it."""
    if WINDOWS:
        temporary.rename(path)  # which fails there if something has the name
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.replace(path)
    else:
        temporary.unlink()


def _discard(file: IO[bytes], path: Path) -> None:
    with suppress(OSError):
        file.close()  # which writes what is still buffered, and may fail as the writing did
    path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Folders that may not be listed, and some network file systems, refuse; the file itself is in place.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class OutputNames:
    """Names, without suffix, of what is written about files: the file's own name, and never the same one twice.

    A name that another file has already gets those of the file's folders in front, as far as needed, then its suffix,
    then a number. Names that differ in upper and lower case only are taken for the same, as some file systems do.

    Args:
        paths: All files, where they are known beforehand. Names then depend on nothing else, so that several processes
            that each see some of the files agree.
        alone: Whether this process sees all files, so that those not known beforehand may be named as they come. If
            not, their paths' checksum makes the names unlike.
    """

    def __init__(self, paths: Sequence[str], alone: bool) -> None:
        self._root = _common_folder(paths)
        self._alone = alone
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()
        for path in dict.fromkeys(paths):
            self._add(path)

    def __getitem__(self, path: str) -> str:
        """Return the name for a file."""
        if path not in self._names:
            if self._alone or Path(path).stem == path:
                self._add(path)
            else:
                self._names[path] = _possible(f"{Path(path).stem}_{_checksum(path)}")
        return self._names[path]

    def _add(self, path: str) -> None:
        for name in map(_possible, self._candidates(Path(path))):
            key = unicodedata.normalize("NFC", name).casefold()
            if key not in self._taken:
                self._taken.add(key)
                self._names[path] = name
                return

    def _candidates(self, path: Path) -> Iterator[str]:
        name = path.stem
        yield name
        folder, root = path.parent, self._root
        inside = folder.relative_to(root).parts if root and folder.is_relative_to(root) else [folder.name]
        for part in reversed(inside):
            name = f"{part}_{name}" if part else name
            yield name
        name += path.suffix.replace(".", "_")
        yield name
        for number in count(2):
            yield f"{name}_{number}"


def _common_folder(paths: Sequence[str]) -> Path | None:
    try:
        return Path(os.path.commonpath([os.path.dirname(path) for path in paths])) if paths else None
    except ValueError:  # relative and absolute ones, or several drives
        return None


WINDOWS = sys.platform == "win32"

#: A suffix and the like fit into the 255 bytes that file systems allow.
_LONGEST = 200

_RESERVED_ON_WINDOWS = {"CON", "PRN", "AUX", "NUL"} | {f"{port}{i}" for port in ("COM", "LPT") for i in range(10)}


def _possible(name: str) -> str:
    """Return a name as near to this one as the operating system allows."""
    encoded = os.fsencode(name)
    if len(encoded) > _LONGEST:
        name = f"{encoded[: _LONGEST - 9].decode(errors='ignore')}_{_checksum(name)}"
    if WINDOWS:
        name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name)
        if name.split(".")[0].rstrip().upper() in _RESERVED_ON_WINDOWS:
            name = f"_{name}"
    return name or "_"


def _checksum(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]
