"""From a source in any spelling to tensors: Hub repository, folder, file, or the name of published weights."""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from lk_backbones._printing import printable
from lk_backbones._private.huggingface_hub import CACHED_NO_EXIST
from lk_backbones.weights.catalogue import PublishedWeights, find_published, list_published
from lk_backbones.weights.config import check_picture_settings, read_config
from lk_backbones.weights.download import NOT_VERIFIED, HubFile, fetch_from_hub, fetch_url, hub_error, is_missing
from lk_backbones.weights.errors import DownloadError, WeightsError, nearest, shorten
from lk_backbones.weights.files import WEIGHT_SUFFIXES, read_checkpoint, sha256_of

__all__ = [
    "NAMESPACE_VARIABLE",
    "Weights",
    "default_namespace",
    "is_source",
    "pull",
    "pull_config",
    "pull_url",
    "split_hub_id",
]

NAMESPACE_VARIABLE = "LK_BACKBONES_NAMESPACE"
_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
# File names of weights in a folder or Hub repository, best first.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_SOURCES = "'hf-hub:owner/name', a folder, a weight file, or the name of published weights is expected"
# Of a task: what its network has beside the smp model, see lk_backbones.hub.
EXTRA_FILE = "task.safetensors"


@dataclass
class Weights:
    """Weights that were pulled, not yet in a model.

    Attributes:
        state_dict: Tensors by key, as in the file.
        config: Content of ``config.json``, or what the catalogue knows; empty for a bare file.
        source: Where they came from; a Hub repository is pinned to the commit (``hf-hub:owner/name@commit``).
        file: The local file.
        skipped: What the file holds beside weights: reason to keys.
        extra: Tensors of a task outside of its smp model.
        hyper_parameters: Of a checkpoint that one of our tasks wrote.
        checkpoint: Other plain values of a training checkpoint, such as the states of its callbacks.
        published: The entry of the catalogue, if they were asked for by its name.
        verified: What each fetched file was compared with, in words; empty for what lay on this machine.
    """

    state_dict: dict[str, torch.Tensor]
    config: dict[str, Any]
    source: str
    file: Path
    skipped: dict[str, list[str]] = field(default_factory=dict)
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    published: PublishedWeights | None = None
    verified: dict[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Checksum of the file, to prove that it is the right one."""
        return sha256_of(self.file)

    @property
    def preprocessing(self) -> dict[str, list[float]]:
        """Mean and standard deviation that the weights expect, if ``config`` or a task's checkpoint says so."""
        own = self.config.get("_lk_backbones", {})
        places = (own, self.config, self.config.get("pretrained_cfg", {}))
        place = next((p for p in places if p.get("mean") and p.get("std")), None)
        hparams = self.hyper_parameters
        if place is None and all(_are_numbers(hparams.get(key)) for key in ("mean", "std")) and all(hparams["std"]):
            place = hparams
        return {} if place is None else {key: [float(v) for v in place[key]] for key in ("mean", "std")}

    @property
    def picture_settings(self) -> dict[str, Any]:
        """What ``config``, a classifier's checkpoint or timm says of the pictures that the weights were evaluated on.

        Entries of a timm configuration: ``input_size``, ``crop_pct``, ``interpolation``, ``crop_mode`` and, where the
        test differs, ``test_input_size`` and ``test_crop_pct``.

        Raises:
            WeightsError: If one has an impossible value.
        """
        values, where = self.config.get("pretrained_cfg") or {}, f"'{self.source}'"
        hparams = self.hyper_parameters
        if not values and hparams.get("crop_pct") is not None:
            values = {key: hparams[key] for key in ("crop_pct", "crop_mode", "interpolation") if key in hparams}
            for key, name in (("train_size", "input_size"), ("input_size", "test_input_size")):
                size = hparams.get(key)
                if size is not None:
                    values[name] = [3, *size] if isinstance(size, list | tuple) else [3, size, size]
            where += ", hyper_parameters"
        elif not values and self.published is not None:
            known = timm.is_model(self.published.name) and timm.get_pretrained_cfg(self.published.name)
            values = known.to_dict() if known else {}
        return check_picture_settings(values, where)


def _are_numbers(value: Any) -> bool:
    """Return whether a value of a checkpoint, which may be any program's, is a list of numbers from 0."""
    return isinstance(value, list | tuple) and bool(value) and all(type(v) is float and 0 <= v < 1e6 for v in value)


def default_namespace() -> str | None:
    """Return the Hub namespace that mirrors published weights, from ``LK_BACKBONES_NAMESPACE``."""
    return os.environ.get(NAMESPACE_VARIABLE) or None


def is_source(text: str | os.PathLike[str]) -> bool:
    """Return whether a text is a source by its form: a Hub repository, or a file or folder on this machine."""
    text = os.fspath(text)
    return (
        text.startswith(_PREFIXES)
        or text.endswith(WEIGHT_SUFFIXES)
        or os.sep in text
        or (text != "" and os.path.exists(os.path.expanduser(text)))  # unlike Path, at ease with any text
    )


def split_hub_id(text: str) -> tuple[str, str | None, str | None]:
    """Split ``owner/name[/file][@revision]``.

    Args:
        text: With or without ``hf-hub:`` in front.

    Returns:
        Repository, file and revision.

    Raises:
        WeightsError: If the owner or the name is missing.
    """
    location, _, revision = text.removeprefix("hf-hub:").removeprefix("hf_hub:").partition("@")
    owner, _, rest = location.partition("/")
    name, _, filename = rest.partition("/")
    if not owner or not name or {".", ".."} & set(location.split("/")):
        raise WeightsError(f"{shorten(text)} is no Hub repository: 'hf-hub:owner/name' or 'hf-hub:owner/name@revision'")
    return f"{owner}/{name}", filename or None, revision or None


def pull(source: str | os.PathLike[str], revision: str | None = None, *, namespace: str | None = None) -> Weights:
    """Get weights from wherever they are, verified, without running anything that is in them.

    Args:
        source: A Hub repository, ``hf-hub:owner/name``, with ``@revision`` or ``/file`` behind it if wanted; a folder
            of the same layout; a ``.safetensors``, ``.pth`` or ``.ckpt`` file; or the name of published weights, such
            as ``replknet_31b.in1k`` (see `list_published`) or those of any timm model.
        revision: Branch, tag or commit of a Hub repository.
        namespace: Hub user or organisation whose repositories, called like the published weights, come first when a
            name is given; by default the environment variable ``LK_BACKBONES_NAMESPACE``.

    Returns:
        State dict and configuration.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        DownloadError: If the weights cannot be fetched; for those that lie on a file-sharing drive with what to do
            instead.
        WeightsError: If what was found is damaged, dangerous or no weights.
    """
    text = os.fspath(source)
    if text.removeprefix("local-dir:") == "":
        raise WeightsError(f"the source of the weights is empty ('{text}'): {_SOURCES}")
    if text.startswith(("hf-hub:", "hf_hub:")):
        repo, filename, pinned = split_hub_id(text)
        if revision and pinned and revision != pinned:
            raise WeightsError(f"'{text}' names the revision '{pinned}', but revision='{revision}' was given too")
        return _from_hub(repo, filename, revision or pinned)
    path = Path(os.path.expanduser(text.removeprefix("local-dir:")))
    if is_source(text):
        if revision:
            raise WeightsError(f"revision='{revision}' is for Hub repositories; '{text}' is on this machine")
        if os.path.isdir(path):
            return _from_folder(path)
        if not os.path.isfile(path):
            repository = f", or 'hf-hub:{text}' if a Hub repository is meant" if text.count("/") == 1 else ""
            raise FileNotFoundError(f"there is no file or folder {shorten(text, 300)}{repository[:300]}")
        return _from_file(path)
    return _from_name(text, revision, namespace or default_namespace())


def pull_config(source: str) -> tuple[dict[str, Any], str]:
    """Get only the configuration of a Hub repository or folder.

    Args:
        source: ``hf-hub:owner/name[@revision]``, or a folder.

    Returns:
        Content of ``config.json``, and the source, pinned to the commit if it is a Hub repository.

    Raises:
        FileNotFoundError: If the folder has no ``config.json``.
        DownloadError: If the repository or file cannot be fetched.
        WeightsError: If it is not JSON, or names an unknown architecture.
    """
    if source.startswith(("hf-hub:", "hf_hub:")):
        repo, _, revision = split_hub_id(source)
        file = fetch_from_hub(repo, "config.json", revision)
        return read_config(file.path), f"hf-hub:{repo}@{file.commit}"
    folder = source.removeprefix("local-dir:")
    if not folder:
        raise WeightsError(f"'{source}' names no folder: 'local-dir:FOLDER' is expected")
    file_on_disk = Path(os.path.expanduser(folder)) / "config.json"
    if not os.path.exists(file_on_disk):
        raise FileNotFoundError(f"there is no {shorten(str(file_on_disk), 300)}")
    return read_config(file_on_disk), source


def _from_file(path: Path, config: dict[str, Any] | None = None, source: str | None = None) -> Weights:
    content = read_checkpoint(path)
    hyper_parameters = content.content.get("hyper_parameters")
    return Weights(
        content.state_dict,
        config or {},
        source or str(path),
        path,
        content.skipped,
        hyper_parameters=hyper_parameters if isinstance(hyper_parameters, dict) else {},
        checkpoint=content.content,
    )


def _from_folder(folder: Path) -> Weights:
    candidates = [folder / name for name in _WEIGHT_FILES if (folder / name).is_file()]
    if not candidates:
        try:
            found_files = sorted(folder.iterdir())
        except OSError as error:
            raise WeightsError(f"'{folder}' cannot be read: {error.strerror}") from error
        candidates = [p for p in found_files if p.suffix in WEIGHT_SUFFIXES and p.name != EXTRA_FILE]
        if len(candidates) != 1:
            found = f": name one of {[p.name for p in candidates]}" if candidates else ""
            raise FileNotFoundError(f"'{folder}' holds no {_WEIGHT_FILES[0]}{found}")
    config = folder / "config.json"
    weights = _from_file(candidates[0], read_config(config) if config.exists() else {}, str(folder))
    if (folder / EXTRA_FILE).is_file():
        weights.extra = read_checkpoint(folder / EXTRA_FILE).state_dict
    return weights


def _from_hub(repo: str, filename: str | None, revision: str | None) -> Weights:
    file = fetch_from_hub(repo, filename, revision) if filename else _best_file(repo, revision)
    verified = {file.path.name: file.verified}
    config: dict[str, Any] = {}
    config_file = _fetch_config(repo, file.commit)  # the same commit, and no second look-up
    if config_file is not None:
        config = read_config(config_file.path)
        verified["config.json"] = config_file.verified
    where = f"hf-hub:{repo}{'/' + filename if filename else ''}@{file.commit}"
    weights = _from_file(file.path, config, where)
    if config.get("_lk_backbones", {}).get("extra"):
        extra = fetch_from_hub(repo, EXTRA_FILE, file.commit)
        weights.extra = read_checkpoint(extra.path).state_dict
        verified[EXTRA_FILE] = extra.verified
    weights.verified = verified
    return weights


def _best_file(repo: str, revision: str | None) -> HubFile:
    unknown: DownloadError | None = None
    for name in _WEIGHT_FILES:
        try:
            found = _fetch_if_there(repo, name, revision)
        except DownloadError as error:
            if not _is_offline(error):
                raise
            unknown = unknown or error  # a worse one may be in the cache
            continue
        if found is not None:
            return found
    if unknown is not None:
        raise unknown
    try:
        names = HfApi().list_repo_files(repo, revision=revision)
    except Exception as error:
        raise hub_error(error, repo, revision=revision) from error
    weights = [printable(name) for name in names if name.endswith(WEIGHT_SUFFIXES)]
    raise DownloadError(
        f"'{repo}' has no {' or '.join(_WEIGHT_FILES)}"
        + (f": name one of its files, such as 'hf-hub:{repo}/{weights[0]}', of {', '.join(weights)}" if weights else "")
    )


def _fetch_config(repo: str, commit: str) -> HubFile | None:
    """Return the ``config.json`` beside weights that are here already; a repository need not have one."""
    try:
        return _fetch_if_there(repo, "config.json", commit)
    except DownloadError as error:
        if not _is_offline(error):
            raise
        warnings.warn(
            f"offline, it cannot be told whether '{repo}' has a config.json: none is in the cache. Its weights are "
            f"used without one; if it has one, its mean and standard deviation are not known",
            stacklevel=2,
        )
        return None


def _fetch_if_there(repo: str, filename: str, revision: str | None) -> HubFile | None:
    try:
        return fetch_from_hub(repo, filename, revision)
    except DownloadError as error:
        if type(error.__cause__).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
            return None
        # the client notes in its cache what a repository lacks, but does not look there when it is offline
        uncached = isinstance(error.__cause__, LocalEntryNotFoundError)
        if uncached and try_to_load_from_cache(repo, filename, revision=revision) is CACHED_NO_EXIST:
            return None
        raise


def _is_offline(error: DownloadError) -> bool:
    """Return whether a file is not in the cache and nobody may be asked whether there is one."""
    return bool(constants.HF_HUB_OFFLINE) and isinstance(error.__cause__, LocalEntryNotFoundError)


def _from_name(name: str, revision: str | None, namespace: str | None) -> Weights:
    published = find_published(name)
    if published is None:
        return _from_timm(name, revision)
    config = {"mean": list(published.mean), "std": list(published.std)}
    if namespace:
        try:
            weights = _from_hub(f"{namespace}/{published.name}", None, revision)
        except DownloadError as error:
            if not is_missing(error) or published.place == "drive":
                raise DownloadError(f"{error}\n{how_to_get(published)}" if is_missing(error) else str(error)) from error
        else:
            weights.published = published
            return weights
    if published.place == "drive":
        raise DownloadError(how_to_get(published))
    if published.hub and published.file:
        weights = _from_hub(published.hub, published.file, revision or published.revision)
        weights.config = weights.config or config
        if not weights.sha256.startswith(published.sha256 or ""):
            raise DownloadError(
                f"'{published.file}' of '{published.hub}' is not the file that the catalogue knows as "
                f"'{published.name}': its SHA-256 is {weights.sha256}, expected {published.sha256}"
            )
    else:
        assert published.url is not None  # what `place` says
        try:
            weights = pull_url(published.url, published.sha256, config)
        except DownloadError as error:
            raise DownloadError(f"'{published.name}': {error}") from error
    weights.published = published
    return weights


def _from_timm(name: str, revision: str | None) -> Weights:
    """Weights of a timm model, by name: those that timm itself would fetch."""
    architecture = name.partition(".")[0]
    known = name in (architecture, *timm.list_models(f"{architecture}.*", include_tags=True))
    config = timm.get_pretrained_cfg(name) if known and timm.is_model(architecture) else None
    settings = {} if config is None else config.to_dict()
    if settings.get("hf_hub_id"):
        repo, _, pinned = split_hub_id(settings["hf_hub_id"])
        return _from_hub(repo, settings.get("hf_hub_filename"), revision or pinned)
    if settings.get("url"):
        return pull_url(settings["url"], None, settings)
    names = [published.name for published in list_published()]
    what = "has no published weights" if config is not None else "is neither a file, a folder nor published weights"
    similar = nearest(name[:80], [*names, *timm.list_pretrained(architecture + "*")])
    raise WeightsError(
        f"{shorten(name)} {what}{similar}; a Hub repository is "
        f"written 'hf-hub:owner/name', and `lk-backbones hub list` shows what is published"
    )


def pull_url(
    url: str,
    sha256_prefix: str | None = None,
    config: dict[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Weights:
    """Get weights from an HTTP server.

    Args:
        url: The file.
        sha256_prefix: The first digits of its checksum, if known.
        config: What is known of them, as in a ``config.json``.
        folder: Where to keep the file, instead of torch's cache.

    Returns:
        State dict and configuration.

    Raises:
        DownloadError: If the file cannot be had whole.
        WeightsError: If it is damaged, dangerous or no weights.
    """
    file = fetch_url(url, sha256_prefix, folder)
    weights = _from_file(file, config, url)
    weights.verified[file.name] = (
        f"SHA-256 begins with {sha256_prefix}, as the catalogue knows it"
        if sha256_prefix
        else f"{NOT_VERIFIED}: no checksum of it is known"
    )
    return weights


def how_to_get(published: PublishedWeights) -> str:
    """Return what a user does about weights that no program can fetch."""
    on_hub = ""
    if published.hub:
        on_hub = (
            f"They are in https://huggingface.co/{published.hub} too, under a name that the catalogue does not know: "
            f"look there, and use 'hf-hub:{published.hub}/FILE'.\n"
        )
    return (
        f"'{published.name}' ({published.data}) lies on a file-sharing drive, where no program can fetch it.\n{on_hub}"
        f"1. Download it with a browser: {published.link} (from {published.page})\n"
        f"2. Use the file as it is, wherever weights are asked for, or make it a Hub repository of your own:\n"
        f"   lk-backbones hub publish FILE --model {published.name} --repo you/{published.name}\n"
        f"3. From then on {NAMESPACE_VARIABLE}=you lets '{published.name}' come from there."
    )
