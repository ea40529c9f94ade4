"""Files that appear at once, whole, under their name, or not at all."""

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["UNFINISHED", "write_atomically"]

#: Names of files that are being written, or that a killed process has left behind. Tools that look for files by their
#: name, as Lightning for ``*.ckpt`` and ``*ckpt_*``, must not find these.
UNFINISHED = ".unfinished-*.tmp"


@contextmanager
def write_atomically(path: Path, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a binary file that gets its name when the block ends without an error; folders are made as needed.

    Args:
        path: The file's name; an existing file is replaced.
        durable: Whether to wait until the content is on the disk before an existing file is replaced, so that one of
            the two is there even after a power cut.
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
            temporary.replace(path)
        except BaseException:
            _discard(file, temporary)
            raise
    if durable and sys.platform != "win32":  # a rename is on the disk with the folder that it happened in
        _sync_folder(path.parent)


def _discard(file: IO[bytes], path: Path) -> None:
    try:
        file.close()  # which writes what is still buffered, and may fail as the writing did
    except OSError:
        pass
    finally:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems know no such thing; the file itself is written
    finally:
        os.close(handle)
