"""Fetch files: from the Hugging Face Hub with its own client, from HTTP mirrors with torch's downloader.

The clients do the caching, resuming and retrying, and know tokens, mirrors and offline mode (``HF_TOKEN``,
``HF_ENDPOINT``, ``HF_HUB_OFFLINE``). Added here is what they leave open: every file is compared with its checksum
before it is used, a wrong one is removed from the cache, and each failure becomes one message that says what to do.
"""

import errno
import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import huggingface_hub
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lk_backbones.weights.errors import DownloadError
from lk_backbones.weights.files import sha256_of

__all__ = ["HubFile", "explain", "fetch_from_hub", "fetch_url", "is_missing", "url_cache"]

_ATTEMPTS = 3
_SERVER_BUSY = (429, 500, 502, 503, 504)
_NETWORK_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_CACHE_TROUBLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOKEN = "log in with `hf auth login`, or set HF_TOKEN to a token with {right} access to it"


@dataclass(frozen=True)
class HubFile:
    """A verified file of the cache.

    Attributes:
        path: Where it lies.
        commit: The full commit hash it belongs to.
    """

    path: Path
    commit: str


def fetch_from_hub(repo: str, filename: str, revision: str | None = None) -> HubFile:
    """Fetch one file of a model repository, or take it from the cache, and verify it.

    Args:
        repo: ``owner/name``.
        filename: Path in the repository.
        revision: Branch, tag or commit; ``None`` for the main branch.

    Returns:
        The file and its commit.

    Raises:
        DownloadError: If it cannot be had whole. A damaged file is not left in the cache.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            path = Path(hf_hub_download(repo, filename, revision=revision))
        except Exception as error:
            # The client repeats most requests by itself, but not the one for the content when the server is busy.
            if attempt < _ATTEMPTS and _is_passing(error):
                time.sleep(2 ** (attempt - 1))
                continue
            raise explain(error, repo, filename, revision) from error
        problem = _damage(path)
        if problem is None:
            folder = path.parts.index("models--" + repo.replace("/", "--"))  # …/models--owner--name/snapshots/COMMIT/…
            return HubFile(path, path.parts[folder + 2])
        _remove_from_cache(path)
        if attempt == _ATTEMPTS or constants.HF_HUB_OFFLINE:
            raise DownloadError(
                f"'{filename}' of '{repo}' arrived damaged ({problem}) and was removed from the cache. Try again "
                f"later; if it happens again, the file on {constants.ENDPOINT} itself is damaged"
            )
    raise AssertionError("unreachable")


def is_missing(error: DownloadError) -> bool:
    """Whether the server said that the repository or file does not exist, as opposed to anything going wrong."""
    cause = error.__cause__
    return isinstance(cause, EntryNotFoundError | RepositoryNotFoundError) and not isinstance(
        cause, LocalEntryNotFoundError | GatedRepoError
    )


def _damage(path: Path) -> str | None:
    """Compare a cached file with its ETag, after which its blob is named: a SHA-256, or git's SHA-1 for small files."""
    blob = path.resolve()
    expected = blob.name
    if re.fullmatch("[0-9a-f]{64}", expected):
        actual = sha256_of(blob)
    elif re.fullmatch("[0-9a-f]{40}", expected):
        content = blob.read_bytes()
        actual = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    else:  # a cache without symbolic links, where the checksum is not kept
        return None
    return None if actual == expected else f"its checksum is {actual[:12]}…, expected {expected[:12]}…"


def _remove_from_cache(path: Path) -> None:
    for part in (path.resolve(), path):
        try:
            part.unlink(missing_ok=True)
        except OSError:  # a read-only cache; the file is refused all the same
            return


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _status(error: BaseException) -> int | None:
    for link in _chain(error):
        response = getattr(link, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def _is_network_error(error: BaseException) -> bool:
    return any(type(link).__module__.partition(".")[0] in _NETWORK_LIBRARIES for link in _chain(error))


def _is_passing(error: BaseException) -> bool:
    """Whether another attempt may help: the connection broke in the middle, or the server was busy."""
    if isinstance(error, LocalEntryNotFoundError):
        # The client has already tried repeatedly; clients before 1.0 not where the server said "too many requests".
        return _status(error) == 429 and int(huggingface_hub.__version__.partition(".")[0]) < 1
    return _status(error) in _SERVER_BUSY or _is_network_error(error) or "Consistency check" in str(error)


def explain(
    error: BaseException, repo: str, filename: str | None = None, revision: str | None = None, right: str = "read"
) -> DownloadError:
    """Turn what the Hub's client raised into one message that says what would be right.

    Args:
        error: What it raised.
        repo: ``owner/name``.
        filename: The file that was asked for.
        revision: The revision that was asked for.
        right: What the token must allow, ``"read"`` or ``"write"``.

    Returns:
        The error to raise.
    """
    endpoint, status = constants.ENDPOINT, _status(error)
    what = f"'{filename}' of '{repo}'" if filename else f"'{repo}'"
    token = _TOKEN.format(right=right)
    offline = constants.HF_HUB_OFFLINE or any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error))
    problem = next((link for link in _chain(error) if isinstance(link, OSError) and link.errno in _CACHE_TROUBLE), None)
    if isinstance(error, HFValidationError):
        message = f"'{repo}' is no repository name: 'owner/name' is expected"
    elif offline:
        message = (
            f"{what} is not in the cache {constants.HF_HUB_CACHE}, and the offline mode (HF_HUB_OFFLINE) is on. Fetch "
            f"it once while online: lk-backbones hub pull hf-hub:{repo}{'@' + revision if revision else ''}"
        )
    elif problem is not None:
        folder = problem.filename or constants.HF_HUB_CACHE
        message = (
            f"{what} cannot be written into the cache, {folder}: {problem.strerror}. HF_HUB_CACHE names another "
            f"folder; `hf cache` shows what takes space"
        )
    elif isinstance(error, GatedRepoError):
        message = f"{what} is gated: accept its conditions on {endpoint}/{repo}, then {token}"
    elif isinstance(error, RevisionNotFoundError):
        message = f"'{repo}' has no revision '{revision}': a branch, a tag or a full commit hash is expected"
    elif isinstance(error, RepositoryNotFoundError) and status != 403:
        message = f"there is no model repository '{repo}' on {endpoint}, or it is private; in that case {token}"
    elif status in (401, 403):
        message = f"access to {what} was refused (HTTP {status}): {token}"
    elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        message = f"'{repo}' has no file '{filename}'{f' at revision {revision!r}' if revision else ''}"
    elif status == 429:
        message = f"{endpoint} allows no more requests for the moment (HTTP 429): wait some minutes, or {token}"
    elif status is not None:
        message = f"{endpoint} answered HTTP {status} for {what}: try again later"
    elif _is_network_error(error) or isinstance(error, LocalEntryNotFoundError):
        message = (
            f"{what} is not in the cache, and {endpoint} cannot be reached: check the connection; HF_ENDPOINT names a "
            f"mirror"
        )
    else:
        message = f"{what} could not be fetched: {error}"
    return DownloadError(message)


def url_cache(url: str) -> Path:
    """Where a file of an HTTP mirror is kept: torch's own folder, which timm shares."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def fetch_url(url: str, sha256_prefix: str | None = None) -> Path:
    """Fetch a file over HTTP, or take it from torch's cache, and verify it.

    Args:
        url: The file.
        sha256_prefix: The first digits of its checksum, if known.

    Returns:
        The file.

    Raises:
        DownloadError: If it cannot be had whole. A damaged file is not left in the cache.
    """
    file = url_cache(url)
    if file.is_file():
        if sha256_of(file).startswith(sha256_prefix or ""):
            return file
        file.unlink()
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(f"{url} is not in the cache {file.parent}, and the offline mode (HF_HUB_OFFLINE) is on")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        progress = not huggingface_hub.utils.are_progress_bars_disabled() and os.environ.get("RANK", "0") == "0"
        torch.hub.download_url_to_file(url, str(file), sha256_prefix, progress)  # into place only when it is right
    except URLError as error:
        raise DownloadError(f"{url} cannot be fetched ({error}): check the connection, or try again later") from error
    except RuntimeError as error:
        raise DownloadError(
            f"{url} arrived damaged ({error}) and was not kept. Try again later; if it happens again, the mirror's "
            f"file itself is damaged"
        ) from error
    except OSError as error:
        raise DownloadError(
            f"{url} cannot be fetched or not be written into the cache {file.parent}: {error}. TORCH_HOME names "
            f"another folder"
        ) from error
    return file
