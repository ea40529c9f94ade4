"""The names that a timm model's tensors have, whatever it is wrapped in: timm's feature extractors, smp's encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, TypeVar

import timm
import torch
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder
from torch import nn

__all__ = ["build_empty", "family_filter", "full_names", "is_timm_model", "timm_arguments", "timm_model", "timm_names"]

T = TypeVar("T", bound=nn.Module)

# Arguments of timm.create_model that choose what is returned of a model, not what the model is.
_VIEW = ("features_only", "out_indices", "feature_cls", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")


def is_timm_model(module: nn.Module) -> bool:
    """Whether a module is a timm model, or timm's feature extractor around one."""
    config = getattr(module, "pretrained_cfg", None)
    return isinstance(config, dict) and timm.is_model(str(config.get("architecture", "")))


def timm_arguments(module: nn.Module) -> dict[str, Any]:
    """The keyword arguments that a timm model or an smp ``tu-`` encoder was built with, as far as they are recorded."""
    network = module.model if isinstance(module, TimmUniversalEncoder) else module
    recorded = getattr(network, "_model_args", None) or {}
    return {key: value for key, value in recorded.items() if key not in _VIEW}


def build_empty(make: Callable[[], T]) -> T:
    """Build a model for its names and shapes only, on the meta device if possible.

    Args:
        make: Builds it.

    Returns:
        The model; with memory for its values if its constructor computes with its tensors.
    """
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):
        return make()


def timm_model(encoder: nn.Module, kwargs: dict[str, Any] | None = None) -> nn.Module:
    """The whole timm model of an encoder, for its names and hooks only (on the meta device if possible).

    smp keeps timm's feature extractor, which has lost ``group_matcher`` and ``no_weight_decay``.

    Args:
        encoder: An smp encoder built by timm, or timm's own model or feature extractor.
        kwargs: The keyword arguments it was built with, since they can change the parameters' names; by default those
            that are recorded on it.

    Returns:
        The model with its classifier.

    Raises:
        ValueError: If the encoder is not a timm model.
    """
    if isinstance(encoder, TimmUniversalEncoder):
        name = encoder.name
    elif is_timm_model(encoder):
        name = encoder.pretrained_cfg["architecture"]  # type: ignore[index]
    else:
        raise ValueError(f"{type(encoder).__name__} is not a timm model")
    kwargs = {k: v for k, v in (timm_arguments(encoder) if kwargs is None else kwargs).items() if k not in _VIEW}
    return build_empty(lambda: timm.create_model(name, **kwargs))


def full_names(names: Iterable[str], full: nn.Module) -> dict[str, str]:
    """Translate names in a feature extractor of timm's, or in an smp encoder around one, to those of the whole model.

    timm's feature extractors hold a model's children either flattened (``stem.0`` becomes ``stem_0``) or whole, under
    one more name; smp puts ``model.`` in front.

    Args:
        names: Names in the extractor or smp encoder.
        full: The whole model.

    Returns:
        Name there to name in ``full.state_dict()``; those that have none, such as norms of the returned maps that only
        the extractor has, are left out.
    """
    flattened = {
        f"{parent}_{child}": f"{parent}.{child}"
        for parent, module in full.named_children()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        for child, _ in module.named_children()
    }
    known = full.state_dict().keys()
    out = {}
    for name in names:
        inner = name.removeprefix("model.")
        first, _, rest = inner.partition(".")
        candidates = (inner, f"{flattened.get(first, first)}.{rest}", rest)
        match = next((candidate for candidate in candidates if candidate in known), None)
        if match is not None:
            out[name] = match
    return out


def timm_names(encoder: nn.Module, full: nn.Module) -> dict[str, str]:
    """The names that an encoder's tensors have in the whole timm model.

    Args:
        encoder: An smp encoder built by timm, or timm's own model or feature extractor.
        full: What `timm_model` returns for it.

    Returns:
        Name in ``encoder.state_dict()`` to name in ``full.state_dict()``; tensors that only the extractor has are left
        out.
    """
    return full_names(encoder.state_dict(), full)


def family_filter(model: nn.Module) -> Callable[[dict[str, Any], nn.Module], dict[str, torch.Tensor]]:
    """The ``checkpoint_filter_fn`` of a timm model's family, which renames published keys.

    Args:
        model: The whole timm model.

    Returns:
        That function; one that changes nothing if the family has none.
    """
    found = getattr(import_module(type(model).__module__), "checkpoint_filter_fn", None)
    return found if found is not None else (lambda state_dict, model: state_dict)
