"""Put weights into an encoder, whatever they are called and wrapped in, and account for every tensor."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder
from timm.models import (
    PretrainedCfg,
    adapt_input_conv,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    resolve_pretrained_cfg,
)
from torch import nn

from lk_backbones.encoders._names import (
    build_empty,
    classifiers,
    elsewhere,
    full_names,
    is_timm_model,
    needed_arguments,
    translate,
    whole_model,
)
from lk_backbones.encoders._registry import list_encoders
from lk_backbones.layers.enlarge import enlarged_parameters
from lk_backbones.weights.catalogue import find_published
from lk_backbones.weights.errors import WeightMismatchError, WeightsError, shorten
from lk_backbones.weights.report import LoadReport, Mode, check_values, follow, load_state
from lk_backbones.weights.sources import Weights, pull, pull_url, split_hub_id

__all__ = [
    "build_pretrained",
    "find_encoder",
    "fitting_arguments",
    "fitting_encoders",
    "kernels_of_its_own",
    "load_encoder",
]

_ELSEWHERE = "not part of this encoder (classifier, heads, last norm, deeper stages)"
_CLASSIFIERS = ("fc.", "classifier.", "last_linear.", "head.")  # of the models that smp's own encoders come from


def find_encoder(model: nn.Module) -> nn.Module:
    """Find the encoder inside a model.

    Args:
        model: A timm model, an smp encoder or model, a task, or anything with one of them inside, such as a detector.

    Returns:
        The outermost module that is an smp encoder or a timm model.

    Raises:
        ValueError: If there is none.
    """
    encoder = getattr(model, "encoder", None)
    if isinstance(encoder, nn.Module):
        return encoder
    kinds = tuple({settings["encoder"] for settings in smp_encoders.values()} | {TimmUniversalEncoder})
    for module in model.modules():
        if isinstance(module, kinds) or is_timm_model(module):
            return module
    raise ValueError(f"there is no encoder of timm or smp in this {type(model).__name__}")


def load_encoder(
    encoder: nn.Module, weights: Weights, kwargs: dict[str, Any] | None = None, mode: Mode = "strict"
) -> LoadReport:
    """Load weights into an encoder.

    Understands every naming that `translate` does. The first convolution is adapted to other input channels and a
    classifier of other classes is left alone, as timm does.

    Args:
        encoder: An smp encoder, or timm's own model or feature extractor.
        weights: What `pull` returned.
        kwargs: The keyword arguments the encoder was built with, as for `timm_model`.
        mode: ``"strict"``, ``"lenient"`` or ``"partial"``, see `lk_backbones.weights.report`.

    Returns:
        What was loaded, adapted, skipped and left.

    Raises:
        WeightMismatchError: If the weights are another model's; the message names one of ours that they fit.
    """
    report = LoadReport(weights.source)
    for reason, keys in weights.skipped.items():
        report.skip(reason, keys)
    own, full = encoder.state_dict(), whole_model(encoder, kwargs)
    config = {} if full is None else getattr(full, "pretrained_cfg", {})
    name = str(config.get("architecture") or type(encoder if full is None else full).__name__)
    renamed, origins = _translated(weights, name, encoder, full)
    used: frozenset[str] = frozenset().union(*origins.values())
    report.skip(_ELSEWHERE, [key for key in weights.state_dict if key not in used])

    if full is None:
        left_out = {key for key in renamed if key not in own and key.startswith(_CLASSIFIERS)}
    else:
        left_out = elsewhere(renamed, own, full)
    for key in renamed:
        if key in left_out:
            report.skip(_ELSEWHERE, sorted(origins[key]))
    renamed = {key: value for key, value in renamed.items() if key not in left_out}
    new_classifier = [] if full is None else _new_classifier(full, own, renamed)
    for key in new_classifier:
        reason = f"a classifier of {len(renamed.pop(key))} classes; the model keeps its own, of {len(own[key])}"
        report.skip(reason, sorted(origins[key]))
    if full is not None:
        _adapt_input(full, own, renamed, report)
    kept = [*new_classifier, *kernels_of_its_own(encoder, renamed, report)]
    title = f"smp's {name}" if full is None else f"'{name}'"
    load_state(encoder, renamed, report, mode, title, lambda: _hint(weights.state_dict, name), kept)
    network: Any = getattr(encoder, "model", encoder)
    if isinstance(getattr(network, "pretrained_cfg", None), dict):
        # what the pictures shall look like
        network.pretrained_cfg = network.pretrained_cfg | weights.preprocessing | weights.picture_settings
    return report


def _translated(
    weights: Weights, name: str, encoder: nn.Module, full: nn.Module | None
) -> tuple[dict[str, torch.Tensor], dict[str, frozenset[str]]]:
    try:
        return follow(lambda named: translate(named, encoder, full), weights.state_dict)
    except Exception as error:  # keys or shapes that the family's own function does not expect
        raise WeightMismatchError(
            f"'{weights.source}' does not hold weights of '{name}': they cannot be renamed "
            f"({type(error).__name__}: {shorten(str(error))}){_hint(weights.state_dict, name)}"
        ) from error


def kernels_of_its_own(model: nn.Module, state: Container[str], report: LoadReport) -> list[str]:
    """Tell the large kernels of a model that weights of the same model, not enlarged, do not have.

    Args:
        model: What the weights are for.
        state: Their names, as the model's.
        report: Gets a note of it.

    Returns:
        Names of the kernels, which may keep their values; none if the weights are those of an enlarged model.
    """
    own = list(enlarged_parameters(model))
    if not own or any(name in state for name in own):
        return []
    report.adapted.append(f"{len(own)} enlarged kernels keep their values: the weights are those of the small ones")
    return own


def _new_classifier(full: nn.Module, own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> list[str]:
    """Names of a classifier that has other classes in the file than in the model."""
    whole = full_names(own, full)
    mine = [key for key in state if key in own and whole.get(key, key).startswith(classifiers(full))]
    return [key for key in mine if state[key].shape != own[key].shape]


def _adapt_input(full: Any, own: dict[str, torch.Tensor], state: dict[str, torch.Tensor], report: LoadReport) -> None:
    """Make the first convolution fit other input channels, as timm does: summed for one, repeated for more."""
    names = {full_name: name for name, full_name in full_names(own, full).items()}
    convs = full.pretrained_cfg.get("first_conv") or ()
    for conv in (convs,) if isinstance(convs, str) else convs:
        name = names.get(f"{conv}.weight", f"{conv}.weight")
        if name not in state or name not in own or state[name].shape == own[name].shape:
            continue
        given, wanted = state[name].shape, own[name].shape
        if len(given) == 4 and given[1] == 3 and given[2:] == wanted[2:] and given[0] == wanted[0]:
            state[name] = adapt_input_conv(wanted[1], state[name])
            report.adapted.append(f"{conv}: from 3 to {wanted[1]} input channels")


# ---- which encoder it is ----


def _hint(state: dict[str, torch.Tensor], name: str) -> str:
    fitting = [candidate for candidate in fitting_encoders(state) if candidate != name]
    return f". The shapes are those of {' or '.join(repr(f) for f in fitting)}" if fitting else ""


@cache
def _without_memory(name: str) -> Any:
    """Return an encoder on the meta device, to be looked at only: building one takes longer than comparing it."""
    with torch.device("meta"):
        return timm.create_model(name)


def fitting_encoders(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """Find the registered encoders that weights fit, judged by names and shapes.

    Args:
        state_dict: Weights in any naming that a registered family understands.

    Returns:
        Their names; of encoders that are part of one another, such as a deeper one of the same widths, the largest.
    """
    fitting: dict[str, int] = {}
    for name in list_encoders():
        full = _without_memory(name)
        try:
            published = translate(state_dict, full, full)
        except Exception:  # a family's filter may stumble over the keys of another one
            continue
        ignored = (*classifiers(full), f"{full.pretrained_cfg.get('first_conv')}.")
        wanted = {
            key: value.shape
            for key, value in full.state_dict().items()
            if not key.startswith(ignored) and not key.endswith("num_batches_tracked")
        }
        present = [key for key in wanted if key in published]
        if len(present) > 0.9 * len(wanted) and all(published[key].shape == wanted[key] for key in present):
            fitting[name] = len(present)
    return [name for name, tensors in fitting.items() if tensors == max(fitting.values())]


def fitting_arguments(name: str, weights: Weights, kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Find the keyword arguments with which a timm model has a place for every tensor of an encoder.

    Args:
        name: The timm model.
        weights: What `pull` returned; an encoder, or a model that contains one.
        kwargs: Keyword arguments that are known.

    Returns:
        What the family says (``norm_features``, for instance), and ``num_classes`` if the weights have a classifier.

    Raises:
        WeightMismatchError: If they are another model's.
    """
    full = build_empty(lambda: timm.create_model(name, **(kwargs or {})))
    return needed_arguments(full, _translated(weights, name, full, full)[0])


# ---- timm's own way: create_model(..., pretrained=True) ----


def build_pretrained(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """Build a timm model, as timm's `build_model_with_cfg` does, with weights that come through our reader.

    Weights from elsewhere are fetched, verified and read by `pull`, so that whatever goes wrong is one error. What lies
    on this machine (``file``, ``state_dict``, ``local-dir:``) timm reads itself. In both cases timm loads them into the
    model: it adapts the first convolution and leaves out a classifier of other classes.

    Args:
        model_cls: Class of the model.
        variant: Its registered name.
        pretrained: Whether to load weights.
        pretrained_cfg: Tag or configuration of the weights, by default the registered one.
        pretrained_cfg_overlay: Replaces entries of it.
        cache_dir: Folder for fetched files, instead of the usual caches.
        **kwargs: As for `build_model_with_cfg`.

    Returns:
        The model, or a feature extractor around it.

    Raises:
        WeightsError: If the weights cannot be had, or there are none; with the name, what failed and what to do.
    """
    weights = None
    if pretrained:
        config: Any = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
        try:
            weights = _fetch(variant, config, cache_dir)
        except WeightsError as error:
            name = f"{variant}.{config.tag}" if config.tag else variant
            raise type(error)(
                f"the weights of '{name}' (pretrained=True) could not be loaded. {error}\n"
                f"pretrained=False, or encoder_weights=None in smp, builds the model with random weights"
            ) from None  # it says what there is to say; before it stood pages of what network libraries raised
    # timm copies its configuration several times: it gets a mark, and the tensors on another way
    mark = {} if weights is None else {"state_dict": {"from": weights.source}, "source": None}

    def filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
        renamed = translate(state_dict if weights is None else weights.state_dict, model, model)
        source = f"what '{variant}' is given" if weights is None else f"'{weights.source}'"
        tensors = {key: value for key, value in renamed.items() if isinstance(value, torch.Tensor)}
        check_values(tensors, model.state_dict(), source)
        return renamed

    model: Any = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=(pretrained_cfg_overlay or {}) | mark,
        pretrained_filter_fn=filter_fn,
        cache_dir=cache_dir,
        **kwargs,
    )
    if weights is not None:
        for module in model.modules():  # a feature extractor has one, and perhaps the model inside
            if isinstance(getattr(module, "pretrained_cfg", None), dict):
                module.pretrained_cfg.pop("state_dict", None)
                module.pretrained_cfg |= {"source": config.source} if config.source else {}
    return model


def _fetch(variant: str, config: PretrainedCfg, cache_dir: str | Path | None) -> Weights | None:
    """Return the weights that a configuration leads to; ``None`` if timm is to read them itself."""
    if config.file or config.state_dict or config.source == "local-dir":
        return None
    name = f"{variant}.{config.tag}" if config.tag else variant
    # somebody's own configuration may have a tag of theirs, which timm's registry does not know
    registered = get_arch_pretrained_cfgs(variant).get(name)
    said_otherwise = registered is None or (config.url, config.hf_hub_id) != (registered.url, registered.hf_hub_id)
    if config.source is None and config.tag and not said_otherwise:
        published = find_published(name)
        if published is None:
            raise WeightsError(
                "Nobody published any. pretrained_cfg_overlay={'file': …} loads a file of yours, and "
                "'hf-hub:owner/name' in place of the model's name a Hub repository"
            )
        if cache_dir is None or not published.url:
            return pull(published.name)
        return pull_url(published.url, published.sha256, folder=cache_dir)
    if config.hf_hub_id:
        if cache_dir is not None:  # which only timm passes on
            return None
        repo, _, revision = split_hub_id(config.hf_hub_id)
        file = f"/{config.hf_hub_filename}" if config.hf_hub_filename else ""
        return pull(f"hf-hub:{repo}{file}", revision)
    if not config.url:
        raise WeightsError("The configuration says of no place where they lie: neither 'file', 'url' nor 'hf_hub_id'")
    return pull_url(str(config.url), folder=cache_dir)
