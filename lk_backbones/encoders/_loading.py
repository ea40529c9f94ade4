"""Put weights, in whatever naming and whatever they are wrapped in, into an encoder, and account for every tensor."""

from __future__ import annotations

from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder
from timm.models import adapt_input_conv
from torch import nn

from lk_backbones.encoders._names import family_filter, full_names, is_timm_model, timm_model, timm_names
from lk_backbones.encoders._registry import list_encoders
from lk_backbones.weights.errors import WeightMismatchError, shorten
from lk_backbones.weights.origins import follow
from lk_backbones.weights.report import LoadReport, Mode, load_state
from lk_backbones.weights.sources import Weights

__all__ = ["find_encoder", "fitting_arguments", "fitting_encoders", "is_dense_model", "load_encoder"]

# Parts beside the backbone in the whole models that OpenMMLab trains.
DENSE_PARTS = ("decode_head.", "auxiliary_head.", "neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.")
_ELSEWHERE = "not part of this encoder (classifier, heads, last norm, deeper stages)"
_CLASSIFIERS = ("fc.", "classifier.", "last_linear.", "head.")  # of the models that smp's own encoders come from


def is_dense_model(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether the keys are those of a whole OpenMMLab segmentation or detection model."""
    return any(key.startswith(DENSE_PARTS) for key in state_dict) and any(k.startswith("backbone.") for k in state_dict)


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
    kinds = tuple({settings["encoder"] for settings in smp.encoders.encoders.values()} | {TimmUniversalEncoder})
    for module in model.modules():
        if isinstance(module, kinds) or is_timm_model(module):
            return module
    raise ValueError(f"there is no encoder of timm or smp in this {type(model).__name__}")


def load_encoder(
    encoder: nn.Module, weights: Weights, kwargs: dict[str, Any] | None = None, mode: Mode = "strict"
) -> LoadReport:
    """Load weights into an encoder.

    Understands the whole models that an encoder can come in (one of our tasks, an smp model, an OpenMMLab model), the
    names in timm's feature extractors, and every naming that the family's ``checkpoint_filter_fn`` maps. The first
    convolution is adapted to other input channels and a classifier of other classes is left alone, as timm does.

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
    state = _encoder_part(weights.state_dict, encoder.state_dict(), report)
    if isinstance(encoder, TimmUniversalEncoder) or is_timm_model(encoder):
        _load_timm(encoder, state, report, kwargs, mode)
    else:
        _load_smp(encoder, state, report, mode)
    network: Any = getattr(encoder, "model", encoder)
    if isinstance(getattr(network, "pretrained_cfg", None), dict):
        network.pretrained_cfg = network.pretrained_cfg | weights.preprocessing  # what the pictures shall look like
    return report


def _load_timm(
    encoder: nn.Module, state: dict[str, torch.Tensor], report: LoadReport, kwargs: dict[str, Any] | None, mode: Mode
) -> None:
    full: Any = encoder if hasattr(encoder, "forward_head") else timm_model(encoder, kwargs)
    own, full_keys = encoder.state_dict(), full.state_dict().keys()
    by_full_name = {full_name: name for name, full_name in timm_names(encoder, full).items()}
    try:
        published, origins = follow(lambda named: _published_to_full(named, full), state)
    except Exception as error:  # keys or shapes that the family's own function does not expect
        name = full.pretrained_cfg.get("architecture")
        raise WeightMismatchError(
            f"'{report.source}' does not hold weights of '{name}': they cannot be renamed "
            f"({type(error).__name__}: {shorten(str(error))}){_hint(state, str(name))}"
        ) from error
    used: frozenset[str] = frozenset().union(*origins.values())
    report.skip(_ELSEWHERE, [key for key in state if key not in used])

    classifier = str(full.pretrained_cfg.get("classifier") or "head.fc") + "."
    renamed: dict[str, torch.Tensor] = {}
    new_classifier = []
    for key, value in published.items():
        name = by_full_name.get(key, key)
        if name in own and key.startswith(classifier) and own[name].shape != value.shape:
            new_classifier.append(name)
            reason = f"a classifier of {len(value)} classes; the model keeps its own, of {len(own[name])}"
            report.skip(reason, sorted(origins[key]))
        elif name in own or not (key in full_keys or key.startswith(classifier)):
            renamed[name] = value  # an unknown key too, so that the comparison names it
        else:
            report.skip(_ELSEWHERE, sorted(origins[key]))
    _adapt_input(full, by_full_name, own, renamed, report)
    title = str(full.pretrained_cfg.get("architecture") or type(full).__name__)
    load_state(encoder, renamed, report, mode, f"'{title}'", lambda: _hint(state, title), new_classifier)


def _load_smp(encoder: nn.Module, state: dict[str, torch.Tensor], report: LoadReport, mode: Mode) -> None:
    """One of smp's own encoders, whose weights have its own names."""
    own = encoder.state_dict()
    classifier = [key for key in state if key not in own and key.startswith(_CLASSIFIERS)]
    report.skip(_ELSEWHERE, classifier)
    state = {key: value for key, value in state.items() if key not in classifier}
    name = type(encoder).__name__
    load_state(encoder, state, report, mode, f"smp's {name}", lambda: _hint(state, name))


def _published_to_full(state: dict[str, torch.Tensor], full: nn.Module) -> dict[str, torch.Tensor]:
    """Any naming that is known to the names of a whole timm model."""
    extractor_names = full_names(state, full)
    named = {extractor_names.get(key, key): value for key, value in state.items()}
    return family_filter(full)(named, full)


def _encoder_part(
    state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], report: LoadReport
) -> dict[str, torch.Tensor]:
    """The part of a state dict that is an encoder's, without the prefix it has in the model around it."""
    prefix = _prefix(state, list(own))
    if not prefix or (prefix == "model." and all(key.startswith(prefix) for key in state)):
        return state
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if prefix == "backbone.":  # OpenMMLab's classifiers keep theirs beside the backbone
        dense = is_dense_model(state)
        part |= {key: value for key, value in state.items() if key.startswith("head.") and not dense}
    report.skip(_ELSEWHERE, [key for key in state if not key.startswith(prefix) and key not in part])
    return part


def _prefix(state: dict[str, torch.Tensor], own: list[str]) -> str:
    """What stands in front of the encoder's keys, such as ``backbone.body.`` in torchvision's detectors."""
    bare = [key.removeprefix("model.") for key in own]
    flat, unflat = [key.replace(".", "_", 1) for key in bare], [key.replace("_", ".", 1) for key in bare]
    for names in (own, bare, flat, unflat):
        for candidate in [key.removesuffix(names[0]) for key in state if key.endswith(f".{names[0]}")]:
            if 2 * sum(candidate + name in state for name in names) > len(names):
                return candidate
    # in the published naming, which resembles none of ours
    known = ("model.encoder.", "encoder.", "backbone.")
    return next((prefix for prefix in known if any(key.startswith(prefix) for key in state)), "")


def _adapt_input(
    full: Any,
    by_full_name: dict[str, str],
    own: dict[str, torch.Tensor],
    state: dict[str, torch.Tensor],
    report: LoadReport,
) -> None:
    """Make the first convolution fit other input channels, as timm does: summed for one, repeated for more."""
    convs = full.pretrained_cfg.get("first_conv") or ()
    for conv in (convs,) if isinstance(convs, str) else convs:
        name = by_full_name.get(f"{conv}.weight", f"{conv}.weight")
        if name not in state or name not in own or state[name].shape == own[name].shape:
            continue
        given, wanted = state[name].shape, own[name].shape
        if given[1] == 3 and given[2:] == wanted[2:] and given[0] == wanted[0]:
            state[name] = adapt_input_conv(wanted[1], state[name])
            report.adapted.append(f"{conv}: from 3 to {wanted[1]} input channels")


def _hint(state: dict[str, torch.Tensor], name: str) -> str:
    fitting = [candidate for candidate in fitting_encoders(state) if candidate != name]
    return f". The shapes are those of {' or '.join(repr(f) for f in fitting)}" if fitting else ""


def fitting_encoders(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """Registered encoders that weights fit, judged by names and shapes.

    Args:
        state_dict: Weights in any naming that a registered family understands.

    Returns:
        Their names.
    """
    fitting = []
    for name in list_encoders():
        with torch.device("meta"):
            full: Any = timm.create_model(name)
        state = _encoder_part(state_dict, full.state_dict(), LoadReport(""))
        try:
            published = _published_to_full(state, full)
        except Exception:  # a family's filter may stumble over the keys of another one
            continue
        ignored = tuple(f"{full.pretrained_cfg.get(key)}." for key in ("classifier", "first_conv"))
        wanted = {
            key: value.shape
            for key, value in full.state_dict().items()
            if not key.startswith(ignored) and not key.endswith("num_batches_tracked")
        }
        present = [key for key in wanted if key in published]
        if len(present) > 0.9 * len(wanted) and all(published[key].shape == wanted[key] for key in present):
            fitting.append(name)
    return fitting


def fitting_arguments(name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Keyword arguments with which a registered encoder has a place for every tensor of a whole model's backbone.

    Args:
        name: A registered encoder that the weights fit.
        state_dict: The weights.

    Returns:
        ``{"norm_features": True}`` if they have norms of the returned maps, else nothing.
    """
    with torch.device("meta"):
        full = timm.create_model(name)
    published = _published_to_full(_encoder_part(state_dict, full.state_dict(), LoadReport("")), full)
    return {"norm_features": True} if any(key.startswith("feature_norms.") for key in published) else {}
