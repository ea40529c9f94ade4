"""Shape bias: does a classifier go by shape or by texture, where the two contradict each other?

The protocol of Geirhos et al. (arXiv 1811.12231) as in bethgelab/model-vs-human (arXiv 2106.07411). The stimuli are
pictures of the shape of one thing in the texture of another, 1280 of 16 classes: github.com/rgeirhos/texture-vs-shape,
folder ``stimuli/style-transfer-preprocessed-512``, licence CC-BY-4.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from lk_backbones.analysis.levels import normalizes, trunk_of
from lk_backbones.data.checks import require_files, require_folders
from lk_backbones.data.reading import IMAGE_EXTENSIONS, find_files, read_image
from lk_backbones.drawing.palette import plot_palette
from lk_backbones.drawing.shares import ShareSeries, draw_shares
from lk_backbones.weights.errors import nearest, shorten

__all__ = [
    "STIMULI",
    "Decision",
    "ShapeBias",
    "Stimulus",
    "draw_shape_bias",
    "find_stimuli",
    "shape_bias",
    "sixteen_classes",
    "to_sixteen",
]

#: Where the stimuli of the protocol come from.
STIMULI = "github.com/rgeirhos/texture-vs-shape (stimuli/style-transfer-preprocessed-512, CC-BY-4.0)"

_LAYOUT = "<shape><number>-<texture><number>.png is expected, such as cat7-elephant1.png"
_NAME = re.compile(r"(.+?)\d+-(.+?)\d+")
_IMAGENET_CLASSES = 1000

Interval = tuple[float, float, float]


@cache
def sixteen_classes() -> dict[str, tuple[int, ...]]:
    """Return the 16 classes of the protocol, and which of ImageNet's 1000 classes (from 0) belong to each.

    The mapping is model-vs-human's.
    """
    text = (files("lk_backbones.data") / "tables" / "imagenet_16_classes.json").read_text(encoding="utf-8")
    classes = {}
    for name, parts in json.loads(text).items():
        runs = (range(part[0], part[1] + 1) if isinstance(part, list) else (part,) for part in parts)
        classes[name] = tuple(index for run in runs for index in run)
    return classes


def to_sixteen(probabilities: torch.Tensor) -> torch.Tensor:
    """Map probabilities of ImageNet's 1000 classes to the 16 of the protocol, by the mean over those of each.

    The mean, unlike the sum, favours no class for having more of ImageNet's classes (arXiv 1808.08750, appendix).

    Args:
        probabilities: ``(N, 1000)``.

    Returns:
        ``(N, 16)``, in the order of `sixteen_classes`; the rows do not sum to 1.
    """
    return torch.stack([probabilities[:, list(indices)].mean(1) for indices in sixteen_classes().values()], dim=1)


@dataclass(frozen=True)
class Stimulus:
    """A picture of the protocol.

    Attributes:
        path: The file.
        shape: Class of the shape.
        texture: Class of the texture.
    """

    path: Path
    shape: str
    texture: str


@dataclass(frozen=True)
class Decision:
    """What a model took a stimulus for.

    Attributes:
        stimulus: The stimulus.
        answer: The class that the model chose.
    """

    stimulus: Stimulus
    answer: str


def find_stimuli(folder: str | Path, class_names: Iterable[str] | None = None) -> list[Stimulus]:
    """Find all stimuli below a folder, in natural order.

    Args:
        folder: A folder of pictures called ``<shape><number>-<texture><number>.png``, in sub-folders or not. A prefix
            that ends with an underscore is passed over, as model-vs-human writes it.
        class_names: The classes that there are; by default the 16 of the protocol.

    Raises:
        FileNotFoundError: If there is no such folder, or no picture in it.
        ValueError: If a file is called differently, or after another class; the message names it.
    """
    names = tuple(sixteen_classes() if class_names is None else class_names)
    folder = Path(folder)
    require_folders(folder, [], f"pictures: {_LAYOUT}")
    found = find_files(folder, IMAGE_EXTENSIONS)
    try:
        require_files(found, folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} {_LAYOUT}. The stimuli of the protocol are those of {STIMULI}.") from None
    return [_stimulus(path, names) for path in found]


def _stimulus(path: Path, names: Sequence[str]) -> Stimulus:
    matched = _NAME.fullmatch(path.stem)
    if matched is None:
        raise ValueError(f"{path}: the name does not say what the picture shows: {_LAYOUT}")
    shape, texture = matched.groups()
    while shape not in names and "_" in shape:
        shape = shape.partition("_")[2]
    for kind, name, given in (("shape", shape, matched[1]), ("texture", texture, texture)):
        if name not in names:
            listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            raise ValueError(
                f"{path}: the {kind} {given!r} is none of the classes {listed}{nearest(name, names)} ({_LAYOUT})"
            )
    return Stimulus(path, shape, texture)


@dataclass(frozen=True, eq=False)
class ShapeBias:
    """Decisions on stimuli whose shape and texture contradict each other.

    Attributes:
        classes: Names, in alphabetical order.
        counts: int64 ``(classes, 3)``: for the stimuli of each shape how many were taken for the shape, for the
            texture, and for something else.
        decisions: Every decision, those on stimuli without a conflict included; empty if only counts are known.
    """

    classes: tuple[str, ...]
    counts: np.ndarray
    decisions: tuple[Decision, ...] = ()

    @classmethod
    def of_decisions(cls, decisions: Iterable[Decision]) -> ShapeBias:
        """Count decisions; stimuli whose shape and texture are of one class do not count.

        Args:
            decisions: The decisions.
        """
        decisions = tuple(decisions)
        conflicts = [one for one in decisions if one.stimulus.shape != one.stimulus.texture]
        classes = tuple(sorted({one.stimulus.shape for one in conflicts}))
        counts = np.zeros((len(classes), 3), np.int64)
        for one in conflicts:
            shape, texture = one.stimulus.shape, one.stimulus.texture
            column = 0 if one.answer == shape else 1 if one.answer == texture else 2
            counts[classes.index(shape), column] += 1
        return cls(classes, counts, decisions)

    @property
    def shape_bias(self) -> float:
        """Share of decisions for the shape among those for shape or texture; NaN if there are none."""
        return float(_share(self.counts.sum(0)))

    @property
    def per_class(self) -> dict[str, float]:
        """The same for the stimuli of each shape."""
        return dict(zip(self.classes, _share(self.counts).tolist(), strict=True))

    def interval(self, level: float = 0.95, samples: int = 10_000, seed: int = 0) -> Interval:
        """Return the shape bias and the ends of its bootstrap interval.

        Stimuli are drawn again, with replacement, within each shape, and the quantiles of the shape bias are taken. It
        tells how much depends on the choice of the stimuli, as if they were independent of each other.

        Args:
            level: Probability of the interval.
            samples: How often they are drawn.
            seed: Of the drawing.
        """
        drawn = self._drawn(samples, seed).sum(1)
        return (self.shape_bias, *_quantiles(_share(drawn), level))

    def class_intervals(self, level: float = 0.95, samples: int = 10_000, seed: int = 0) -> dict[str, Interval]:
        """Return the same as `interval` for the stimuli of each shape.

        Args:
            level: Probability of the intervals.
            samples: How often stimuli are drawn.
            seed: Of the drawing.
        """
        shares = _share(self._drawn(samples, seed))
        return {
            name: (value, *_quantiles(shares[:, i], level)) for i, (name, value) in enumerate(self.per_class.items())
        }

    def _drawn(self, samples: int, seed: int) -> np.ndarray:
        """Draw counts ``(samples, classes, 3)``; drawing stimuli again is drawing from their decisions' shares."""
        rng = np.random.default_rng(seed)
        drawn = np.zeros((samples, *self.counts.shape), np.int64)
        for i, row in enumerate(self.counts):
            if row.sum():
                drawn[:, i] = rng.multinomial(row.sum(), row / row.sum(), samples)
        return drawn


def _share(counts: np.ndarray) -> np.ndarray:
    shape, both = counts[..., 0], counts[..., 0] + counts[..., 1]
    return np.where(both > 0, shape / np.maximum(both, 1), np.nan)


def _quantiles(shares: np.ndarray, level: float) -> tuple[float, float]:
    shares = shares[np.isfinite(shares)]
    if not shares.size:
        return float("nan"), float("nan")
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def shape_bias(
    model: nn.Module,
    stimuli: str | Path | Sequence[Stimulus],
    class_names: Sequence[str] | None = None,
    *,
    transform: Callable[[Image.Image], torch.Tensor] | None = None,
    batch_size: int = 32,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> ShapeBias:
    """Measure the shape bias of a classifier.

    Args:
        model: Gives logits ``(N, classes)`` for images ``(N, 3, H, W)``. It is run in evaluation mode, and left in the
            mode that it was in.
        stimuli: A folder, see `find_stimuli`, or what that returned.
        class_names: Names of the model's classes, in order, among which are those that the stimuli are called after.
            ``None`` for ImageNet's 1000 classes, whose probabilities are mapped to the 16 by `to_sixteen`, or for the
            16 themselves in alphabetical order.
        transform: From an RGB picture to what the model takes, ``(3, H, W)``. ``None`` for that of the model's
            configuration, as timm evaluates it (`timm.data.resolve_model_data_config`).
        batch_size: Pictures at a time.
        progress: Wraps the batches, to show how far it is.

    Returns:
        The decisions, counted.

    Raises:
        FileNotFoundError: If there is no such folder, or no picture in it.
        ValueError: If a file is called differently, or the model gives other classes than those named.
    """
    if class_names is not None and len(set(class_names)) != len(class_names):
        raise ValueError(f"class_names: a name occurs twice in {shorten(list(class_names))}")
    if isinstance(stimuli, str | Path):
        stimuli = find_stimuli(stimuli, class_names)
    if transform is None:
        transform = _evaluation_transform(model)
    names = tuple(sixteen_classes()) if class_names is None else tuple(class_names)
    parameter = next(iter(model.parameters()), torch.empty(0))
    modes = [(module, module.training) for module in model.modules()]
    decisions: list[Decision] = []
    model.eval()
    try:
        for batch in progress(list(_batches(stimuli, batch_size))):
            images = torch.stack([transform(Image.fromarray(read_image(one.path))) for one in batch])
            with torch.inference_mode():
                logits = _logits(model(images.to(parameter.device, parameter.dtype)), model)
            scores = _scores(logits, class_names, model)
            decisions += [Decision(one, names[i]) for one, i in zip(batch, scores.argmax(1).tolist(), strict=True)]
    finally:
        for module, mode in modes:
            module.training = mode
    return ShapeBias.of_decisions(decisions)


def draw_shape_bias(results: Sequence[tuple[str, ShapeBias]], caption: str = "") -> Image.Image:
    """Draw the shape bias of several models, of all stimuli and of those of each shape, with bootstrap intervals.

    Args:
        results: Name and decisions of each model.
        caption: A line at the bottom.

    Returns:
        The figure.
    """
    classes = sorted({name for _, bias in results for name in bias.classes})
    nothing = (float("nan"), float("nan"), float("nan"))
    series = []
    for (name, bias), color in zip(results, plot_palette(len(results)), strict=True):
        intervals = bias.class_intervals()
        rows = [intervals.get(one, nothing) for one in classes]
        series.append(ShareSeries(name, color, bias.interval(), rows))
    return draw_shares(classes, series, "share of shape decisions", "share of texture decisions", caption)


def _evaluation_transform(model: nn.Module) -> Callable[[Image.Image], torch.Tensor]:
    """Return what timm's evaluation does with a picture; tasks normalise by themselves."""
    settings = resolve_model_data_config(trunk_of(model))
    if normalizes(model):
        settings |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    transform: Callable[[Image.Image], torch.Tensor] = create_transform(**settings, is_training=False)
    return transform


def _batches(stimuli: Sequence[Stimulus], size: int) -> Iterator[Sequence[Stimulus]]:
    for start in range(0, len(stimuli), size):
        yield stimuli[start : start + size]


def _logits(output: Any, model: nn.Module) -> torch.Tensor:
    """Take the logits out of what a classifier returned; transformers' models return them by name."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        got = f"a tensor {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"{type(model).__name__} returns {got}: a classifier's logits (N, classes) are expected")
    return logits


def _scores(logits: torch.Tensor, class_names: Sequence[str] | None, model: nn.Module) -> torch.Tensor:
    probabilities, number = logits.double().softmax(1), logits.shape[1]
    if not torch.isfinite(probabilities).all():
        raise ValueError(f"{type(model).__name__} returns logits that are infinite or not a number")
    if class_names is None and number == _IMAGENET_CLASSES:
        return to_sixteen(probabilities)
    expected = len(sixteen_classes()) if class_names is None else len(class_names)
    if number != expected:
        wanted = (
            f"without names of its classes it must have ImageNet's {_IMAGENET_CLASSES}, or the {expected} of the "
            f"protocol in alphabetical order"
            if class_names is None
            else f"{expected} names were given"
        )
        raise ValueError(f"{type(model).__name__} has {number} classes: {wanted}")
    return probabilities
