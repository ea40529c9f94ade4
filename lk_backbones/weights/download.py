"""Fetch files: from the Hugging Face Hub with its own client, from HTTP mirrors with torch's downloader.

The clients do the caching, resuming and retrying, and know tokens, mirrors and offline mode (``HF_TOKEN``,
``HF_ENDPOINT``, ``HF_HUB_OFFLINE``). Added here is what they leave open. The Hub's client names files of its cache
after headers of the answer, whatever they say: their form is checked before it sees them. Every file is compared with
its checksum before it is used, a new one also with the repository's own listing; a wrong one is removed from the cache.
What was compared is kept in `HubFile.verified`. Each failure becomes one message that says what to do.
"""

import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

import huggingface_hub
import torch
from huggingface_hub import HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lk_backbones._printing import printable, without_credentials
from lk_backbones._private.huggingface_hub import replace_get_session
from lk_backbones.weights.errors import DownloadError
from lk_backbones.weights.files import sha256_of

__all__ = ["NOT_VERIFIED", "HubFile", "fetch_from_hub", "fetch_url", "hub_error", "is_missing", "url_cache"]

# How a statement begins that nothing vouches for a file.
NOT_VERIFIED = "not verified"

_ATTEMPTS = 3
_LISTING_TIMEOUT = 30
_SERVER_BUSY = (429, 500, 502, 503, 504)
_REDIRECTIONS = (301, 302, 303, 307, 308)
_NETWORK_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_CACHE_TROUBLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOKEN = "log in with `hf auth login`, or set HF_TOKEN to a token with {right} access to it"

_COMMIT = re.compile("[0-9a-f]{40}")
_CHECKSUM = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # git's SHA-1 of a small file, SHA-256 of one in large file storage
_SHA256 = re.compile("[0-9a-f]{64}")
_FORBIDDEN_IN_REVISIONS = re.compile(r"\.\.|//|[\\~^:?*\[@{\s]|^[/.-]|[/.]$|/\.|\.lock(/|$)")


@dataclass(frozen=True)
class HubFile:
    """A verified file of the cache.

    Attributes:
        path: Where it lies.
        commit: The full commit hash it belongs to.
        verified: What it was compared with, in words.
    """

    path: Path
    commit: str
    verified: str


def fetch_from_hub(repo: str, filename: str, revision: str | None = None) -> HubFile:
    """Fetch one file of a model repository, or take it from the cache, and verify it.

    A new file costs one more request, for the listing of its commit; one for all files of a commit. What is in the
    cache already is compared with its checksum alone.

    Args:
        repo: ``owner/name``.
        filename: Path in the repository.
        revision: Branch, tag or commit; ``None`` for the main branch.

    Returns:
        The file and its commit.

    Raises:
        DownloadError: If it cannot be had whole. A damaged file is not left in the cache.
    """
    _check_names(repo, filename, revision)
    for attempt in range(1, _ATTEMPTS + 1):
        cached = _cached(repo, filename)
        try:
            with _checked_answers(repo, filename, revision) as answers:
                path = Path(hf_hub_download(repo, filename, revision=revision))
        except DownloadError:
            raise
        except Exception as error:
            _hide_credentials(error)
            # The client repeats most requests by itself, but not the one for the content when the server is busy.
            if attempt < _ATTEMPTS and _is_passing(error):
                time.sleep(2 ** (attempt - 1))
                continue
            raise hub_error(error, repo, filename, revision) from error
        commit = _commit_of(path, repo)
        if commit is None:
            raise DownloadError(f"{_what(repo, filename)} does not lie in the cache under a commit, but at '{path}'")
        if commit not in cached and commit not in answers.commits:
            _remove_from_cache(path)
            raise DownloadError(
                f"{_what(repo, filename)} is refused: the answers about it were not seen. This version of "
                f"huggingface_hub, {huggingface_hub.__version__}, goes ways unknown to lk_backbones; try another one"
            )
        compared, problem = _compare_with_announced(path, answers.checksum)
        if problem is None and commit not in cached:
            listed, contradiction = _compare_with_listing(path, repo, filename, commit)
            if contradiction is None and compared is None and listed.startswith(NOT_VERIFIED):
                contradiction = "nothing tells its checksum"
            if contradiction is not None:
                _remove_from_cache(path)
                raise DownloadError(
                    f"{_what(repo, filename)} is not what the repository's own listing says ({contradiction}), and was "
                    f"removed from the cache. Do not use it: {_endpoint()} contradicts itself"
                )
            compared = f"{compared}; {listed.removeprefix(NOT_VERIFIED + ': ')}" if compared else listed
        if problem is None:
            return HubFile(path, commit, compared or f"{NOT_VERIFIED}: the cache keeps no checksum of it")
        _remove_from_cache(path)
        if attempt == _ATTEMPTS or constants.HF_HUB_OFFLINE:
            raise DownloadError(
                f"{_what(repo, filename)} arrived damaged ({problem}) and was removed from the cache. Try again "
                f"later; if it happens again, the file on {_endpoint()} itself is damaged"
            )
    raise AssertionError("unreachable")


def is_missing(error: DownloadError) -> bool:
    """Return whether the server said that the repository or file does not exist, as opposed to anything going wrong."""
    cause = error.__cause__
    return isinstance(cause, EntryNotFoundError | RepositoryNotFoundError) and not isinstance(
        cause, LocalEntryNotFoundError | GatedRepoError
    )


# ---- before the client acts: names that become paths ----


def _check_names(repo: str, filename: str, revision: str | None) -> None:
    """Refuse names that would lead out of the cache: the client makes paths of them."""
    parts = filename.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in filename or ":" in parts[0] or not filename.isprintable():
        raise DownloadError(f"{filename!r} is no path of a file in the repository '{printable(repo)}'")
    if revision is not None and (_FORBIDDEN_IN_REVISIONS.search(revision) or not revision.isprintable()):
        raise DownloadError(f"{revision!r} is no revision: a branch, a tag or a full commit hash is expected")


class _Answers:
    """The answers about one file, looked at before the client names files of its cache after their headers."""

    def __init__(self, repo: str, filename: str, revision: str | None) -> None:
        self.repo, self.filename, self.revision = repo, filename, revision
        self.commits: set[str] = set()
        self.checksum: str | None = None

    def look_at(self, response: Any) -> None:
        """Refuse an answer by raising; redirections are answers too."""
        if response.request.method != "HEAD":
            return
        headers = response.headers
        commit = headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT)
        if commit is None:  # no answer of a Hub; the client goes no further
            return
        if not _COMMIT.fullmatch(commit):
            self._refuse(f"the commit {commit!r}, which is no commit hash")
        if self.revision is not None and _COMMIT.fullmatch(self.revision) and commit != self.revision:
            self._refuse(f"the commit {commit}, but {self.revision} was asked for")
        self.commits.add(commit)
        location = headers.get("Location") or ""
        if not re.match(r"https?://|/(?!/)|(?![a-zA-Z][\w+.-]*:|/)", location, re.IGNORECASE):
            self._refuse(f"the address {location!r}")
        followed = response.status_code in _REDIRECTIONS and location and not urlsplit(location).netloc
        if response.status_code >= 400 or followed:
            return  # of a refusal, or of a redirection within the Hub, the client takes nothing more
        xet = headers.get("X-Xet-Hash")
        if xet is not None and not _SHA256.fullmatch(xet):
            self._refuse(f"the X-Xet-Hash {xet!r}, which is no checksum")
        given = headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG) or headers.get("ETag")
        if given is None:
            return
        self.checksum = re.sub(r'^(W/)?"(.*)"$', r"\2", given)
        if not _CHECKSUM.fullmatch(self.checksum):
            self._refuse(f"the ETag {given!r}, which is no checksum, so the file could not be verified")

    def _refuse(self, said: str) -> None:
        raise DownloadError(
            f"{_what(self.repo, self.filename)} is refused: {_endpoint()} gave it {printable(said)}. HF_ENDPOINT names "
            f"another server, or, if this is a mirror, ask those who run it"
        )


# Sessions are shared by threads; each looks at the answers of its own download.
_looking: ContextVar[_Answers | None] = ContextVar("_looking", default=None)


def _show(response: Any, *args: Any, **kwargs: Any) -> None:
    """Look at an answer; called by every session of the client for each answer."""
    answers = _looking.get()
    if answers is not None:
        answers.look_at(response)


def _session() -> Any:
    """Return the client's session, which shows its answers.

    It takes the place of the client's own `get_session`: a server can make the client drop its session in the middle of
    a download, by failing a connection, and the client then asks again with a new one.
    """
    session = get_session()
    hooks: Any = getattr(session, "event_hooks", None) or getattr(session, "hooks", None)  # httpx; requests before 1.0
    if _show not in hooks["response"]:
        hooks["response"].append(_show)
    return session


@contextmanager
def _checked_answers(repo: str, filename: str, revision: str | None) -> Iterator[_Answers]:
    replace_get_session(_session)
    answers = _Answers(repo, filename, revision)
    before = _looking.set(answers)
    try:
        yield answers
    finally:
        _looking.reset(before)


# ---- afterwards: is it the file? ----


def _snapshots(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"


def _cached(repo: str, filename: str) -> set[str]:
    """Return the commits of which the cache has the file."""
    folder = _snapshots(repo)
    return {commit.name for commit in (folder.iterdir() if folder.is_dir() else ()) if (commit / filename).exists()}


def _commit_of(path: Path, repo: str) -> str | None:
    """Return the commit that a file of the cache belongs to; ``None`` if it lies elsewhere."""
    parent = _snapshots(repo).parent.name  # …/models--owner--name/snapshots/COMMIT/…
    places = [i for i, part in enumerate(path.parts[:-2]) if part == parent and path.parts[i + 1] == "snapshots"]
    commit = path.parts[places[-1] + 2] if places else ""
    return commit if _COMMIT.fullmatch(commit) else None


def _blob_of(path: Path) -> Path | None:
    """Return what a file of the cache is a link to; ``None`` where the cache has no links."""
    return Path(os.path.abspath(path.parent / os.readlink(path))) if path.is_symlink() else None


def _is_in_cache(path: Path, blob: Path) -> bool:
    return blob.parent.name == "blobs" and blob.parent.parent in Path(os.path.abspath(path)).parents


def _compare_with_announced(path: Path, announced: str | None) -> tuple[str | None, str | None]:
    """Compare a file with the checksum that the Hub announced.

    The cache keeps it as the name of the blob. Where symbolic links are not supported it keeps none, and only an answer
    that was just given knows it.

    Returns:
        What was compared, ``None`` if nothing could be, and what is wrong with the file.
    """
    blob = _blob_of(path)
    if blob is not None and not _is_in_cache(path, blob):
        return None, f"it is a link that leads out of the cache, to '{blob}'"
    expected = blob.name if blob is not None and _CHECKSUM.fullmatch(blob.name) else announced
    if expected is None:
        return None, None
    kind, actual = ("SHA-256", sha256_of(path)) if len(expected) == 64 else ("git's SHA-1", _git_sha1_of(path))
    problem = None if actual == expected else f"its checksum is {actual[:12]}…, expected {expected[:12]}…"
    return f"{kind} is the one that the Hub announced", problem


def _git_sha1_of(file: Path) -> str:
    """Return what git calls a file."""
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _compare_with_listing(path: Path, repo: str, filename: str, commit: str) -> tuple[str, str | None]:
    """Compare a file with the repository's listing; returns what was compared, and what is wrong with the file."""
    listing = _listing(constants.ENDPOINT, repo, commit)
    if isinstance(listing, str):
        return f"{NOT_VERIFIED}: the repository's listing could not be had ({listing})", None
    if filename not in listing:
        return "", "it is not in it"
    size, sha256, git_sha1 = listing[filename]
    if size is not None and size != path.stat().st_size:
        return "", f"it has {path.stat().st_size} bytes, not {size}"
    if sha256 is not None:
        actual = sha256_of(path)
        problem = None if actual == sha256 else f"its SHA-256 is {actual}, not {printable(sha256)}"
        return "size and SHA-256 are those of the repository's listing", problem
    if git_sha1 is not None:
        actual = _git_sha1_of(path)
        problem = None if actual == git_sha1 else f"git's SHA-1 of it is {actual}, not {printable(git_sha1)}"
        return "size and git's SHA-1 are those of the repository's listing", problem
    return f"{NOT_VERIFIED}: the repository's listing holds no checksum", None


@lru_cache(maxsize=16)
def _listing(endpoint: str, repo: str, commit: str) -> dict[str, tuple[int | None, str | None, str | None]] | str:
    """Every file of a commit: size, SHA-256 if it is in large file storage, else git's SHA-1; ``None`` if not given.

    If the server gives no listing that can be understood, what it said instead.
    """
    try:
        info = HfApi().model_info(repo, revision=commit, files_metadata=True, timeout=_LISTING_TIMEOUT)
        files = {}
        for file in info.siblings or ():
            lfs: Any = file.lfs
            sha256 = None if lfs is None else str(lfs["sha256"])
            files[str(file.rfilename)] = file.size, sha256, None if lfs is not None else file.blob_id
    except Exception as error:  # also of a listing in another form than the client expects
        status = _status(error)
        return f"HTTP {status}" if status is not None else type(error).__name__
    return files or "it is empty"


def _remove_from_cache(path: Path) -> None:
    """Remove the file and its blob.

    A link that leads out of the cache is removed, what it leads to is not; nor what the blob itself may be a link to,
    which is shared with other repositories.
    """
    blob = _blob_of(path)
    for part in (blob, path):
        if part is None or (part is blob and not _is_in_cache(path, part)):
            continue
        try:
            part.unlink(missing_ok=True)
        except OSError:  # a read-only cache; the file is refused all the same
            return


# ---- errors ----


def _what(repo: str, filename: str | None) -> str:
    return f"'{printable(filename)}' of '{printable(repo)}'" if filename else f"'{printable(repo)}'"


def _endpoint() -> str:
    return without_credentials(constants.ENDPOINT)


def _hide_credentials(error: BaseException) -> None:
    """Hide the causes: the client's errors hold addresses, and a traceback shows them."""
    for link in _chain(error):
        link.args = tuple(without_credentials(text) if isinstance(text, str) else text for text in link.args)


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
    """Return whether another attempt may help: the connection broke in the middle, or the server was busy."""
    if isinstance(error, LocalEntryNotFoundError):
        # The client has already tried repeatedly; clients before 1.0 not where the server said "too many requests".
        return _status(error) == 429 and int(huggingface_hub.__version__.partition(".")[0]) < 1
    return _status(error) in _SERVER_BUSY or _is_network_error(error) or "Consistency check" in str(error)


def hub_error(
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
    _hide_credentials(error)
    endpoint, status = _endpoint(), _status(error)
    what, repo = _what(repo, filename), printable(repo)
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
        message = f"'{repo}' has no file {filename!r}{f' at revision {revision!r}' if revision else ''}"
    elif status == 429:
        message = f"{endpoint} allows no more requests for the moment (HTTP 429): wait some minutes, or {token}"
    elif status is not None:
        message = f"{endpoint} answered HTTP {status} for {what}: try again later"
    elif any(isinstance(link, FileMetadataError) for link in _chain(error)):
        message = (
            f"{what} is not in the cache, and {endpoint} did not answer as a Hub does: it named no commit or no ETag. "
            f"Check the connection for a proxy or a page to log in; HF_ENDPOINT names a mirror"
        )
    elif _is_network_error(error) or isinstance(error, LocalEntryNotFoundError):
        message = (
            f"{what} is not in the cache, and {endpoint} cannot be reached: check the connection; HF_ENDPOINT names a "
            f"mirror"
        )
    else:
        message = f"{what} could not be fetched: {printable(error)}"
    return DownloadError(message)


def url_cache(url: str) -> Path:
    """Where a file of an HTTP mirror is kept: torch's own folder, which timm shares."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def fetch_url(url: str, sha256_prefix: str | None = None, folder: str | os.PathLike[str] | None = None) -> Path:
    """Fetch a file over HTTP, or take it from torch's cache, and verify it.

    Args:
        url: The file.
        sha256_prefix: The first digits of its checksum, if known.
        folder: Where to keep it, instead of torch's cache.

    Returns:
        The file.

    Raises:
        DownloadError: If it cannot be had whole. A damaged file is not left in the cache.
    """
    file = url_cache(url) if folder is None else Path(folder) / url_cache(url).name
    if file.is_file():
        if sha256_of(file).startswith(sha256_prefix or ""):
            return file
        file.unlink()
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(
            f"{url} is not in the cache {file.parent}, and the offline mode (HF_HUB_OFFLINE) is on. Fetch it once "
            f"while online"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        progress = not huggingface_hub.utils.are_progress_bars_disabled() and os.environ.get("RANK", "0") == "0"
        torch.hub.download_url_to_file(url, str(file), sha256_prefix, progress)  # into place only when it is right
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
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
