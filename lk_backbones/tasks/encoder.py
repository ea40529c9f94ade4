"""From the plain arguments `encoder`, `encoder_weights` and `encoder_kwargs` to an encoder that smp builds.

timm's models (ours are among them) go through smp's ``tu-`` route, which passes keyword arguments on and lets timm find
the weights; smp's own encoders go by their own name and know smp's weights only.
"""

import argparse
import difflib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lk_backbones.encoders import list_encoders

__all__ = [
    "EncoderSpec",
    "build_encoder",
    "nearest",
    "refuse_foreign_weights",
    "resolve_encoder",
    "timm_model",
    "timm_names",
]

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_REMOTE = ("hf-hub:", "local-dir:")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The end of an error message: names that resemble a wrong one."""
    close = difflib.get_close_matches(name.lower(), list(candidates), n=4, cutoff=0.5)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder in smp's terms.

    Attributes:
        name: ``encoder_name`` for smp; starts with ``tu-`` if timm builds it.
        weights: ``encoder_weights`` for smp: ``True`` or ``None`` with timm, a name of smp's otherwise.
        kwargs: Keyword arguments that smp passes on to timm.
        file: The local weight file among them, if there is one.
    """

    name: str
    weights: str | bool | None
    kwargs: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None

    @property
    def is_timm(self) -> bool:
        """Whether timm builds it."""
        return self.name.startswith("tu-")


def resolve_encoder(
    encoder: str, weights: str | bool | None, kwargs: dict[str, Any] | None = None, load: bool = True
) -> EncoderSpec:
    """Check an encoder's name, weights and keyword arguments before anything is built.

    Args:
        encoder: One of ours (``replknet_31b``), one of smp's (``resnet18``), or any timm model, with or without smp's
            ``tu-`` prefix; a name that smp and timm both know is smp's unless it has the prefix.
        weights: ``None``, ``True`` or ``"pretrained"`` (the default weights), a timm tag or a name of smp's, or the
            path of a local ``.safetensors`` or ``.pth`` file in a naming that the encoder's family can read.
        kwargs: Keyword arguments of the timm model, such as ``drop_path_rate``.
        load: ``False`` for the same encoder without its weights, whose file may be gone.

    Returns:
        What to give to smp.

    Raises:
        ValueError: If the encoder or its weights are unknown, or keyword arguments or a file are given for an encoder
            of smp's own, or the file is a pickle of more than weights.
        FileNotFoundError: If a weight file does not exist.
    """
    kwargs = dict(kwargs or {})
    base = encoder.removeprefix("tu-")
    architecture, _, tag = base.partition(".")
    remote = base.startswith(_REMOTE)
    by_smp = not encoder.startswith("tu-") and architecture not in list_encoders() and base in smp.encoders.encoders
    if not (by_smp or remote or timm.is_model(architecture)):
        known = {*list_encoders(), *smp.encoders.encoders, *timm.list_models()}
        raise ValueError(f"unknown encoder '{encoder}'{nearest(architecture, known)}")

    is_file = isinstance(weights, str | os.PathLike) and (
        str(weights).endswith(WEIGHT_SUFFIXES) or os.sep in str(weights) or Path(weights).is_file()
    )
    if by_smp:
        if kwargs:
            raise ValueError(
                f"encoder_kwargs {sorted(kwargs)} would be dropped: '{encoder}' is an encoder of smp's own, which "
                f"takes none; choose a timm model ('tu-…'), which does{_timm_twin(base)}"
            )
        if is_file:
            raise ValueError(
                f"encoder_weights='{weights}': weight files are read by timm, and '{encoder}' is an encoder of smp's "
                f"own{_timm_twin(base)}"
            )
        name = _smp_weights(base, weights)
        return EncoderSpec(base, name if load else None)

    if weights is None or weights is False:
        return EncoderSpec(f"tu-{base}", None, kwargs)
    if is_file and not load:
        return EncoderSpec(f"tu-{base}", None, kwargs)
    if is_file:
        file = Path(str(weights)).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"encoder_weights: there is no file '{weights}'")
        _refuse_code(file)
        kwargs["pretrained_cfg_overlay"] = {**kwargs.get("pretrained_cfg_overlay", {}), "file": str(file)}
        return EncoderSpec(f"tu-{base}", True, kwargs, file)
    wanted = True if load else None
    if remote:
        return EncoderSpec(f"tu-{base}", wanted, kwargs)
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if weights is True or weights == "pretrained":
        if not tags:
            raise ValueError(
                f"nobody published weights for '{encoder}' (encoder_weights={weights!r}); use None, or the path of a "
                f"local weight file"
            )
        return EncoderSpec(f"tu-{base}", wanted, kwargs)
    if weights not in tags or tag not in ("", weights):
        raise ValueError(
            f"encoder_weights='{weights}' is neither a local file nor weights of '{encoder}' "
            f"(those are {tags or 'none'}){nearest(str(weights), tags)}"
        )
    # the tag stays in the name, because it can decide on the architecture (a transformer's image size)
    return EncoderSpec(f"tu-{architecture}.{weights}", wanted, kwargs)


def _refuse_code(file: Path) -> None:
    """Make sure that a pickle holds tensors and plain containers only: older timm would run whatever is in it."""
    if file.suffix == ".safetensors":
        return
    try:
        # training scripts keep their command line beside the weights; as a mere bag of values it is harmless
        with torch.serialization.safe_globals([argparse.Namespace]):
            torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"encoder_weights: '{file}' is not a file of weights alone, so it is not read (it could run any code): "
            f"{str(error).splitlines()[0]} Keep only its state dict, best as .safetensors"
        ) from error


def _timm_twin(name: str) -> str:
    return f", for instance 'tu-{name}'" if timm.is_model(name) else ""


def _smp_weights(name: str, weights: str | bool | None) -> str | None:
    if weights is None or weights is False:
        return None
    known = list(smp.encoders.encoders[name]["pretrained_settings"])
    if weights is True or weights == "pretrained":
        weights = "imagenet" if "imagenet" in known else next(iter(known), "")
    if weights not in known:
        raise ValueError(f"smp has no weights {weights!r} for '{name}'; it has {known}{nearest(str(weights), known)}")
    return str(weights)


def timm_model(encoder: nn.Module, kwargs: dict[str, Any]) -> nn.Module:
    """The whole timm model of an smp ``tu-`` encoder, for its names and hooks only (on the meta device if possible).

    smp keeps timm's feature extractor, which has lost ``group_matcher`` and ``no_weight_decay``.

    Args:
        encoder: An smp encoder built by timm.
        kwargs: The keyword arguments it was built with, since they can change the parameters' names.

    Returns:
        The model with its classifier.

    Raises:
        ValueError: If the encoder is not a timm model.
    """
    name = getattr(encoder, "name", None)
    if not isinstance(encoder, smp.encoders.TimmUniversalEncoder) or name is None:
        raise ValueError(f"{type(encoder).__name__} is not a timm model")
    kwargs = {k: v for k, v in kwargs.items() if k != "pretrained_cfg_overlay"}
    try:
        with torch.device("meta"):
            return timm.create_model(name, **kwargs)
    except (NotImplementedError, RuntimeError):  # a constructor that computes with its tensors
        return timm.create_model(name, **kwargs)


def timm_names(encoder: nn.Module, full: nn.Module) -> dict[str, str]:
    """The names that an smp ``tu-`` encoder's tensors have in the whole timm model.

    timm's feature extractors hold a model's children either flattened (``stem.0`` becomes ``stem_0``) or whole, under
    one more name.

    Args:
        encoder: An smp encoder built by timm.
        full: What `timm_model` returns for it.

    Returns:
        Name in ``encoder.state_dict()`` to name in ``full.state_dict()``; tensors that only the extractor has, such as
        norms of the returned maps, are left out.
    """
    flattened = {
        f"{parent}_{child}": f"{parent}.{child}"
        for parent, module in full.named_children()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        for child, _ in module.named_children()
    }
    known = full.state_dict().keys()
    names = {}
    for name in encoder.state_dict():
        inner = name.removeprefix("model.")
        first, _, rest = inner.partition(".")
        candidates = (inner, f"{flattened.get(first, first)}.{rest}", rest)
        match = next((candidate for candidate in candidates if candidate in known), None)
        if match is not None:
            names[name] = match
    return names


@contextmanager
def refuse_foreign_weights(spec: EncoderSpec) -> Iterator[list[nn.Module]]:
    """While an encoder is built, watch what timm could not find in the weight file.

    timm loads a feature extractor's weights leniently and only logs the missing keys, so a file of another model would
    leave the encoder random without a word. The caller appends the encoder that it built to the yielded list.

    Args:
        spec: The encoder that is built; without a weight file nothing is done.

    Raises:
        RuntimeError: If the file cannot be read, shapes differ, or more than half of the encoder's tensors are not in
            it, with the first of them. A smaller part gives a warning: classification weights lack, for instance, the
            norms of the returned maps.
    """
    built: list[nn.Module] = []
    if spec.file is None:
        yield built
        return
    logger = logging.getLogger("timm.models._builder")
    watcher = _MissingKeys()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(watcher)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield built
    except (TypeError, ValueError):  # wrong keyword arguments, not weights
        raise
    except Exception as error:
        raise RuntimeError(
            f"cannot load '{spec.file}' into '{spec.name}'; does it hold another model's weights? {error}"
        ) from error
    finally:
        logger.removeHandler(watcher)
        logger.setLevel(level)
        logger.propagate = propagate
    encoder = built[0]
    names = timm_names(encoder, timm_model(encoder, spec.kwargs))
    wanted = [name for name in names.values() if not name.endswith("num_batches_tracked")]
    missing = [name for name in wanted if name in watcher.keys]
    if 2 * len(missing) > len(wanted):
        raise RuntimeError(
            f"'{spec.file}' does not hold weights of '{spec.name}': {len(missing)} of its {len(wanted)} tensors are "
            f"not in the file, first {missing[:5]}"
        )
    if missing:
        rank_zero_warn(f"'{spec.file}' lacks {len(missing)} tensors of '{spec.name}', left random: {missing[:5]} …")


def build_encoder(spec: EncoderSpec, in_channels: int) -> nn.Module:
    """Build an encoder on its own, of full depth.

    Args:
        spec: The encoder.
        in_channels: Channels of the images.

    Returns:
        The smp encoder.

    Raises:
        ValueError: If the encoder refuses its arguments.
        RuntimeError: If its weight file does not fit.
    """
    try:
        with refuse_foreign_weights(spec) as built:
            encoder: nn.Module = smp.encoders.get_encoder(
                spec.name, in_channels=in_channels, depth=5, weights=spec.weights, **spec.kwargs
            )
            built.append(encoder)
    except TypeError as error:
        raise ValueError(f"'{spec.name}' refuses its arguments (encoder_kwargs={spec.kwargs}): {error}") from error
    return encoder


class _MissingKeys(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.keys: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Missing keys ("):
            self.keys.update(message.removeprefix("Missing keys (").partition(")")[0].split(", "))
