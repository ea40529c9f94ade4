"""The one translation of names: of whatever a weight file calls an encoder's tensors, to those of the encoder at hand.

A file's names reach a whole timm model by way of what is wrapped around them (`unwrap`, `encoder_part`), of timm's
feature extractors (`full_names`) and of the family's own ``checkpoint_filter_fn``. From there they go into the
container: that model, a feature extractor of timm's, or an encoder of smp's around one. The heads of OpenMMLab's whole
models are in `lk_backbones.weights.openmmlab`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar

import timm
import torch
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder
from torch import nn

from lk_backbones.layers.enlarge import original_name
from lk_backbones.weights.files import unwrap
from lk_backbones.weights.openmmlab import is_dense_model

__all__ = [
    "build_empty",
    "classifiers",
    "elsewhere",
    "full_names",
    "is_timm_model",
    "needed_arguments",
    "timm_arguments",
    "timm_model",
    "timm_names",
    "translate",
    "whole_model",
]

T = TypeVar("T", bound=nn.Module)

# Arguments of timm.create_model that choose what is returned of a model, not what the model is.
_VIEW = ("features_only", "out_indices", "feature_cls", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
# So many copies of an encoder a model may hold, such as a student, its average and its teacher.
_MOST_COPIES = 100


# ---- the translation ----


def translate(
    state_dict: Mapping[str, Any], encoder: nn.Module, full: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Rename weights, in any naming that is known, to the names of an encoder.

    Args:
        state_dict: Tensors by key, of an encoder or of a model that contains one; or a file's content, which holds them
            under a key of its own.
        encoder: A timm model, a feature extractor of timm's, or an smp encoder.
        full: The whole timm model, as `whole_model` returns it; by default found out.

    Returns:
        Tensors by the encoder's names. What the encoder does not have keeps the whole model's name (`elsewhere` tells
        it), and what is unknown its own. What belongs to other parts than an encoder is left out.
    """
    state, _ = unwrap(state_dict)
    own = encoder.state_dict()
    full = whole_model(encoder) if full is None else full
    state = encoder_part(state, list(own))
    if full is None:  # smp's own, which have one naming
        return dict(state)
    extractor_names = full_names(state, full)
    # a name of the whole model's own is not given away, to a copy such as a teacher
    extractor_names = {key: name for key, name in extractor_names.items() if name not in state}
    named = {extractor_names.get(key, key): value for key, value in state.items()}
    published = _of_family(full, "checkpoint_filter_fn", lambda state_dict, model: state_dict)(named, full)
    names = {full_name: name for name, full_name in full_names(own, full).items()}
    return {names.get(key, key): value for key, value in published.items()}


def elsewhere(names: Iterable[str], own: Container[str], full: nn.Module) -> set[str]:
    """Tell which translated names are of parts that a whole timm model has and the encoder at hand lacks.

    Args:
        names: What `translate` returned.
        own: The encoder's names.
        full: The whole timm model.

    Returns:
        Those of its classifier, of its last norm, of stages that were cut off.
    """
    known, classifier = full.state_dict().keys(), classifiers(full)
    return {name for name in names if name not in own and (name in known or name.startswith(classifier))}


def encoder_part(state: Mapping[str, Any], own: list[str]) -> dict[str, Any]:
    """Take the encoder out of a whole model, without the prefix that it has there.

    Args:
        state: Tensors by key.
        own: The encoder's names.

    Returns:
        The encoder's tensors; all of them if nothing is around it.
    """
    prefix = _prefix(state, own)
    if not prefix or (prefix == "model." and all(key.startswith(prefix) for key in state)):
        return dict(state)
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if prefix == "backbone." and not is_dense_model(state):  # OpenMMLab's classifiers keep theirs beside the backbone
        part |= {key: value for key, value in state.items() if key.startswith("head.")}
    return part


def _prefix(state: Mapping[str, Any], own: list[str]) -> str:
    """Return what stands in front of the encoder's keys, such as ``backbone.body.`` in torchvision's detectors."""
    bare = [key.removeprefix("model.") for key in own]
    flat, unflat = [key.replace(".", "_", 1) for key in bare], [key.replace("_", ".", 1) for key in bare]
    for names in (own, bare, flat, unflat):
        # none first: what is around it may hold a copy of it, such as a teacher
        found = (key.removesuffix(names[0]) for key in state if key.endswith(f".{names[0]}"))
        for candidate in ["", *islice(found, _MOST_COPIES)]:
            if 2 * sum(candidate + name in state for name in names) > len(names):
                return candidate
    # in the published naming, which resembles none of ours
    known = ("model.encoder.", "encoder.", "backbone.")
    return next((prefix for prefix in known if any(key.startswith(prefix) for key in state)), "")


def full_names(names: Iterable[str], full: nn.Module) -> dict[str, str]:
    """Translate names in a feature extractor of timm's, or in an smp encoder around one, to those of the whole model.

    timm's feature extractors hold a model's children either flattened (``stem.0`` becomes ``stem_0``) or whole, under
    one more name; smp puts ``model.`` in front.

    Args:
        names: Names in the extractor or smp encoder.
        full: The whole model.

    Returns:
        Name there to name in ``full.state_dict()``, or to what it would be if the whole model had been enlarged too
        (`lk_backbones.enlarge_kernels`); those that have none, such as norms of the returned maps that only the
        extractor has, are left out.
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
        match = next((candidate for candidate in candidates if original_name(candidate) in known), None)
        if match is not None:
            out[name] = match
    return out


def timm_names(encoder: nn.Module, full: nn.Module) -> dict[str, str]:
    """Return the names that an encoder's tensors have in the whole timm model.

    Args:
        encoder: An smp encoder built by timm, or timm's own model or feature extractor.
        full: What `timm_model` returns for it.

    Returns:
        Name in ``encoder.state_dict()`` to name in ``full.state_dict()``, as from `full_names`; tensors that only the
        extractor has are left out.
    """
    return full_names(encoder.state_dict(), full)


# ---- what the family says ----


def _of_family(full: nn.Module, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the file that a timm model's family lives in."""
    found: Callable[..., Any] = getattr(import_module(type(full).__module__), name, default)
    return found


def needed_arguments(full: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the keyword arguments with which a timm model has a place for every tensor.

    Args:
        full: The whole timm model.
        state_dict: Tensors by its names, as `translate` returns them.

    Returns:
        What the family's ``checkpoint_arguments`` says, if it has such a function; and ``num_classes``, if there is a
        classifier.
    """
    arguments: dict[str, Any] = dict(_of_family(full, "checkpoint_arguments", lambda state_dict: {})(state_dict))
    weights = [state_dict[f"{name}weight"] for name in classifiers(full) if f"{name}weight" in state_dict]
    return arguments | ({"num_classes": len(weights[0])} if weights else {})


def classifiers(full: Any) -> tuple[str, ...]:
    """Return the prefixes of a timm model's classifier, ``("head.fc.",)`` in our families."""
    names = full.pretrained_cfg.get("classifier") if isinstance(getattr(full, "pretrained_cfg", None), dict) else None
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names or ("head.fc",)))


# ---- the whole model ----


def is_timm_model(module: nn.Module) -> bool:
    """Return whether a module is a timm model, or timm's feature extractor around one."""
    config = getattr(module, "pretrained_cfg", None)
    return isinstance(config, dict) and timm.is_model(str(config.get("architecture", "")))


def timm_arguments(module: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments that a timm model or smp ``tu-`` encoder was built with, as far as recorded."""
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
    """Build the whole timm model of an encoder, for its names and hooks only (on the meta device if possible).

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


def whole_model(encoder: nn.Module, kwargs: dict[str, Any] | None = None) -> nn.Module | None:
    """Return the whole timm model of an encoder, itself if it is one; ``None`` for smp's own encoders.

    Args:
        encoder: A timm model, a feature extractor of timm's, or an smp encoder.
        kwargs: As for `timm_model`.

    Returns:
        The model, for its names and shapes.
    """
    if not (isinstance(encoder, TimmUniversalEncoder) or is_timm_model(encoder)):
        return None
    return encoder if hasattr(encoder, "forward_head") else timm_model(encoder, kwargs)
