"""Every published weight of every large-kernel family, whether or not its family is built in yet.

The data is `catalogue.json`, from the authors' READMEs and OpenMMLab's metafile; accuracies are the authors' own. What
is not known (a checksum, the name of a file on a drive) is left out rather than guessed. timm's configurations of the
weights (``default_cfgs``) are made of it: a weight is written once.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from lk_backbones.weights.download import url_cache
from lk_backbones.weights.files import sha256_of

__all__ = [
    "PublishedWeights",
    "find_published",
    "identify_published",
    "list_published",
    "published_by_checksum",
    "published_mean_iou",
    "timm_configurations",
]


@dataclass(frozen=True)
class PublishedWeights:
    """One published weight file.

    Attributes:
        name: ``architecture.tag``, such as ``replknet_31b.in1k`` or ``upernet_replknet_31b.in1k_ade20k_512``.
        family: Name of the model family, such as ``RepLKNet``.
        task: ``"classification"``, ``"segmentation"`` or ``"detection"``.
        data: What it was trained on.
        input_size: Height and width of the pictures it was trained and measured at, in pixels; ``None`` if they vary.
        mean: Mean of the three colour channels that it expects, in [0, 1].
        std: Standard deviation, likewise.
        license: SPDX identifier.
        metrics: What its authors report, in percent: ``top1``, ``mean_iou`` (single-scale), ``box_ap`` and so on.
        page: The authors' page.
        paper: Title.
        arxiv: Identifier of the paper.
        authors: Authors of the paper.
        year: Year of the paper.
        link: Page of the file on a file-sharing drive, for a browser.
        file: Its name as published, if known.
        hub: Hub repository of the authors that holds it, if any.
        revision: Commit of that repository, if known.
        url: HTTP mirror, if any.
        sha256: Checksum of the mirror's or Hub's file, or its first digits, if known.
        num_classes: Classes of its classifier; ``None`` if it has none or their number is not known.
        crop_pct: Share of a picture's shorter side that its authors measured on.
        crop_mode: How they brought a picture to ``input_size``: ``"center"`` cuts the middle out, ``"squash"`` warps.
    """

    name: str
    family: str
    task: str
    data: str
    input_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str
    page: str
    paper: str
    arxiv: str
    authors: str
    year: int
    metrics: dict[str, float] = field(default_factory=dict)
    link: str | None = None
    file: str | None = None
    hub: str | None = None
    revision: str | None = None
    url: str | None = None
    sha256: str | None = None
    num_classes: int | None = None
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @property
    def architecture(self) -> str:
        """The name without its tag."""
        return self.name.partition(".")[0]

    @property
    def place(self) -> str:
        """Where it can be fetched from: ``"hub"``, ``"mirror"``, or ``"drive"`` for a browser only."""
        return "hub" if self.hub and self.file else "mirror" if self.url else "drive"

    def cached_file(self, namespace: str | None = None) -> Path | None:
        """Return the file in the local cache, from the namespace's repository or from where it was published."""
        candidates: list[Any] = []
        if namespace:
            candidates.append(try_to_load_from_cache(f"{namespace}/{self.name}", "model.safetensors"))
        if self.hub and self.file:
            candidates.append(try_to_load_from_cache(self.hub, self.file, revision=self.revision))
        if self.url and url_cache(self.url).is_file():
            candidates.append(url_cache(self.url))
        return next((Path(file) for file in candidates if isinstance(file, str | Path)), None)


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))
    return content


@cache
def _catalogue() -> dict[str, PublishedWeights]:
    return {row["name"]: _entry(row) for row in _content()["weights"]}


def _entry(row: dict[str, Any]) -> PublishedWeights:
    values = _content()["families"][row["family"]] | row
    return PublishedWeights(**values | {key: tuple(values[key]) for key in ("mean", "std")})


def list_published(pattern: str = "*", task: str | None = None) -> list[PublishedWeights]:
    """Return published weights, in the order of the families.

    Args:
        pattern: Shell-style pattern of names, such as ``"*replknet_31b*"``.
        task: ``"classification"``, ``"segmentation"``, ``"detection"``, or ``None`` for all.

    Returns:
        Those that match.
    """
    return [w for w in _catalogue().values() if fnmatch(w.name, pattern) and task in (None, w.task)]


def find_published(name: str) -> PublishedWeights | None:
    """Return published weights by name; an architecture alone means its first weights."""
    published = _catalogue().get(name)
    return published or next((w for w in _catalogue().values() if w.architecture == name), None)


def identify_published(file: Path) -> PublishedWeights | None:
    """Return published weights that a file is, by its name as published or by its checksum."""
    names = {name: w for w in _catalogue().values() for name in (w.file, w.url and w.url.rpartition("/")[2]) if name}
    if file.name in names:
        return names[file.name]
    return published_by_checksum(sha256_of(file))


def published_by_checksum(sha256: str) -> PublishedWeights | None:
    """Return published weights whose file has this checksum, as far as the catalogue knows it."""
    return next((w for w in _catalogue().values() if w.sha256 and sha256.startswith(w.sha256)), None)


def published_mean_iou(architecture: str) -> float | None:
    """Return what the authors report for an encoder on ADE20K: mean IoU of UPerNet, single-scale, in percent.

    Of several figures it is that of the least data and the smallest pictures, which compares best.

    Args:
        architecture: Name of the encoder; a tag behind it does not matter.

    Returns:
        The figure, also where nobody published weights; ``None`` if there is none.
    """
    architecture = architecture.partition(".")[0]
    for weights in list_published(f"upernet_{architecture}.*_ade20k_*", task="segmentation"):
        return weights.metrics["mean_iou"]
    figure: float | None = _content()["without_weights"]["mean_iou"].get(architecture)
    return figure


def timm_configurations(family: str, untrained: Iterable[str] = (), **common: Any) -> dict[str, Any]:
    """Make timm's configurations of a family's classifiers, for `timm.models.generate_default_cfgs`.

    Args:
        family: Name of the model family, such as ``RepLKNet``.
        untrained: Architectures of which nobody published weights; they are tagged so.
        **common: What all of them share and the network decides, such as ``first_conv`` and ``classifier``.

    Returns:
        Name to configuration, in the catalogue's order.
    """
    nobodys = {"family": family, "task": "classification", "data": "", "input_size": 224, "num_classes": 1000}
    entries = [_entry(nobodys | {"name": f"{architecture}.untrained"}) for architecture in untrained]
    return {weights.name: _timm_configuration(weights) | common for weights in [*_classifiers(family), *entries]}


def _classifiers(family: str) -> list[PublishedWeights]:
    return [weights for weights in list_published(task="classification") if weights.family == family]


def _timm_configuration(weights: PublishedWeights) -> dict[str, Any]:
    size = weights.input_size or 224
    hub = {"hf_hub_id": weights.hub, "hf_hub_filename": weights.file} if weights.place == "hub" else {}
    return {
        "url": weights.url or "",
        **hub,
        "num_classes": weights.num_classes or 0,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": weights.crop_pct,
        "crop_mode": weights.crop_mode,
        "interpolation": "bicubic",
        "mean": weights.mean,
        "std": weights.std,
        "license": weights.license,
        "origin_url": weights.page,
        "paper_name": weights.paper,
        "paper_ids": f"arXiv:{weights.arxiv}",
    }
