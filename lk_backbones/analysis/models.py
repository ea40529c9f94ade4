"""From what a user calls a model to the model: names of timm, torchvision and smp, checkpoints, Hub repositories."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
import yaml
from timm.data import resolve_model_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

import lk_backbones  # noqa: F401, registers the encoders
from lk_backbones import hub
from lk_backbones.analysis.levels import normalizes, trunk_of
from lk_backbones.weights.arguments import weight_arguments
from lk_backbones.weights.catalogue import find_published
from lk_backbones.weights.errors import nearest, shorten

__all__ = ["MODELS", "NamedModel", "load_named_model"]

#: How models are called, for the help of commands.
MODELS = (
    "a timm model (replknet_31b; replknet_31b.in1k with its weights), a torchvision model (fcn_resnet50), an smp "
    "encoder (mit_b0) or network (smp:unet/resnet34), a checkpoint, a folder or hf-hub:owner/name; keyword arguments "
    "follow after commas (replknet_31t,kernel_sizes=3)"
)

_LIBRARIES = ("timm", "torchvision", "smp")


@dataclass
class NamedModel:
    """A model that was asked for by a name.

    Attributes:
        name: What the user wrote.
        model: The model, in evaluation mode.
        weights: Whose weights it has, in words.
        mean: Of the images that it takes, per channel; 0 if it normalises by itself.
        std: Likewise; 1 if it normalises by itself.
    """

    name: str
    model: nn.Module
    weights: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def in_channels(self) -> int:
        """Channels of the images that it takes: those of its first convolution, else 3."""
        hparams = getattr(self.model, "hparams", {})
        if "in_channels" in hparams:
            return int(hparams["in_channels"])
        first = next((module for module in self.model.modules() if isinstance(module, nn.Conv2d)), None)
        return 3 if first is None else first.in_channels

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """Turn an image ``(C, H, W)`` in [0, 1] into what the model takes."""
        channels = image.shape[0]
        mean, std = (
            torch.tensor([values[i % len(values)] for i in range(channels)])[:, None, None]
            for values in (self.mean, self.std)
        )
        return (image - mean) / std


def load_named_model(name: str, pretrained: bool = False, seed: int = 0) -> NamedModel:
    """Build a model from its name, or load it; what is downloaded or read is never unpickled.

    Args:
        name: See `MODELS`.
        pretrained: Whether a bare name stands for the default weights that its library has; a name with a tag always
            stands for those.
        seed: Of random weights.

    Raises:
        ValueError: If no model has this name, arguments are wrong, or weights cannot be had.
        FileNotFoundError: If a file or folder does not exist.
    """
    source, _, text = name.partition(",")
    arguments = _arguments(name, text)
    library, colon, rest = source.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if colon and library in _LIBRARIES:
            builder: dict[str, Callable[..., NamedModel]] = {"timm": _timm, "torchvision": _torchvision, "smp": _smp}
            found = builder[library](rest, arguments, pretrained)
        else:
            found = _find(source, arguments, pretrained)
    found.name = name
    found.model.eval()
    if normalizes(found.model):
        found.mean, found.std = (0.0,), (1.0,)
    return found


def _arguments(name: str, text: str) -> dict[str, Any]:
    """Read keyword arguments, ``a=1,b=[2,3]``."""
    if not text:
        return {}
    try:
        arguments = yaml.safe_load("{" + text.replace("=", ": ") + "}")
    except yaml.YAMLError:
        arguments = None
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments) or "=" not in text:
        raise ValueError(f"{shorten(name)}: arguments are written as NAME,argument=value,other=[1,2]")
    if loading := weight_arguments(arguments):
        raise ValueError(
            f"{shorten(name)}: {', '.join(loading)} would read weights unchecked; name the file as a model"
        )
    return arguments


def _find(source: str, arguments: dict[str, Any], pretrained: bool) -> NamedModel:
    """Find out what a name without a library in front means."""
    published = find_published(source)
    elsewhere = source.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or os.path.exists(source)
    if elsewhere or os.path.sep in source or (published is not None and published.task != "classification"):
        if arguments:
            raise ValueError(f"{shorten(source)} says itself what model it is: arguments {arguments} cannot be given")
        model = hub.load_model(source)
        return _described(model, f"of {source}")
    if timm.is_model(source.partition(".")[0]):
        return _timm(source, arguments, pretrained)
    if source in torchvision.models.list_models():
        return _torchvision(source, arguments, pretrained)
    if source.removeprefix("tu-") in smp.encoders.encoders or source.startswith("tu-"):
        return _smp(source, arguments, pretrained)
    known = [*timm.list_models(), *torchvision.models.list_models(), *smp.encoders.encoders]
    raise ValueError(
        f"there is no file, folder or model {shorten(source)}{nearest(source, known)}. Models are {MODELS}"
    )


def _timm(name: str, arguments: dict[str, Any], pretrained: bool) -> NamedModel:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {shorten(name)}{nearest(architecture, timm.list_models())}")
    pretrained = pretrained or bool(tag)
    model = _built(name, lambda: timm.create_model(name, pretrained=pretrained, **arguments))
    return _described(model, f"{name}" if pretrained else "random")


def _torchvision(name: str, arguments: dict[str, Any], pretrained: bool) -> NamedModel:
    if name not in torchvision.models.list_models():
        raise ValueError(f"torchvision has no model {shorten(name)}{nearest(name, torchvision.models.list_models())}")
    builder = torchvision.models.get_model_builder(name)
    without = {"weights": None, "weights_backbone": None}
    arguments = {
        key: value for key, value in without.items() if key in inspect.signature(builder).parameters
    } | arguments
    if name in ("googlenet", "inception_v3"):
        arguments.setdefault("init_weights", True)  # they warn if nobody chooses
    model = _built(name, lambda: builder(**arguments))
    if not pretrained:
        return _described(model, "random")
    weights: Any = torchvision.models.get_model_weights(name)
    weights = weights.DEFAULT
    model.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
    return _described(model, str(weights))


def _smp(name: str, arguments: dict[str, Any], pretrained: bool) -> NamedModel:
    architecture, slash, encoder = name.rpartition("/")
    weights = ("imagenet" if not encoder.startswith("tu-") else True) if pretrained else None
    if not encoder.startswith("tu-") and encoder not in smp.encoders.encoders:
        raise ValueError(f"smp has no encoder {shorten(encoder)}{nearest(encoder, smp.encoders.encoders)}")
    architectures = list(smp.MODEL_ARCHITECTURES_MAPPING)
    if slash and architecture not in architectures:
        close = nearest(architecture, architectures)
        raise ValueError(
            f"smp has no architecture {shorten(architecture)}{close}; there are {', '.join(architectures)}"
        )
    model = _built(
        name,
        lambda: (
            smp.create_model(architecture, encoder_name=encoder, encoder_weights=weights, **arguments)
            if slash
            else smp.encoders.get_encoder(encoder, weights=weights, **arguments)
        ),
    )
    found = _described(model, f"ImageNet, by {encoder}" if pretrained else "random")
    if pretrained and not encoder.startswith("tu-"):
        settings = smp.encoders.get_preprocessing_params(encoder, "imagenet")
        top = max(settings["input_range"])
        found.mean, found.std = (tuple(value / top for value in settings[key]) for key in ("mean", "std"))
    return found


def _built(name: str, build: Callable[[], Any]) -> nn.Module:
    try:
        model: nn.Module = build()
    except (TypeError, RuntimeError, AssertionError, KeyError, AttributeError) as error:
        raise ValueError(f"{shorten(name)} could not be built: {error}") from error
    return model


def _described(model: nn.Module, weights: str) -> NamedModel:
    transform = getattr(model, "transform", None)  # of torchvision's detectors
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    if hasattr(transform, "image_mean"):
        mean, std = transform.image_mean, transform.image_std  # type: ignore[union-attr]
    elif hasattr(trunk_of(model), "pretrained_cfg"):
        settings = resolve_model_data_config(trunk_of(model))
        mean, std = settings["mean"], settings["std"]
    return NamedModel("", model, weights, tuple(mean), tuple(std))
