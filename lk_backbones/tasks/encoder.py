"""From the plain arguments `encoder`, `encoder_weights` and `encoder_kwargs` to an encoder that smp builds.

timm's models (ours are among them) go through smp's ``tu-`` route, which passes keyword arguments on; smp's own
encoders go by their own name. Weights come from timm or smp by their own names, and from anywhere else through
`lk_backbones.weights`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import segmentation_models_pytorch as smp
import timm
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lk_backbones._printing import printable
from lk_backbones.encoders import list_encoders
from lk_backbones.encoders._loading import load_encoder
from lk_backbones.encoders._names import timm_model, timm_names
from lk_backbones.layers.enlarge import check_kernel_sizes, enlarge_kernels, plan_enlargement
from lk_backbones.weights.arguments import check_architecture, check_buildable, weight_arguments
from lk_backbones.weights.catalogue import find_published, list_published
from lk_backbones.weights.errors import nearest
from lk_backbones.weights.report import LoadReport
from lk_backbones.weights.saved import fits
from lk_backbones.weights.sources import is_source, pull, pull_config

__all__ = [
    "EncoderSpec",
    "build_encoder",
    "check_enlargement",
    "enlarge_encoder",
    "load_encoder_weights",
    "nearest",
    "resolve_encoder",
    "timm_model",
    "timm_names",
]

_REMOTE = ("hf-hub:", "local-dir:")
_DEFAULT_WEIGHTS = (True, "pretrained")
# Arguments of the enlargement of an encoder's kernels, with their types.
_OF_ENLARGEMENT = {
    name: hint for name, hint in get_type_hints(enlarge_kernels).items() if name not in ("model", "inplace", "return")
}
# Arguments of a timm model that smp or the task decide on.
_SET_BY_SMP = ("in_chans", "num_classes", "global_pool", "output_stride")


@dataclass
class EncoderSpec:
    """An encoder in smp's terms.

    Attributes:
        name: ``encoder_name`` for smp; starts with ``tu-`` if timm builds it.
        weights: ``encoder_weights`` for smp: ``True`` or ``None`` with timm, a name of smp's otherwise.
        kwargs: Keyword arguments that smp passes on to timm.
        source: Weights that `load_encoder_weights` loads once smp has built the encoder, as `lk_backbones.hub.pull`
            takes them.
        preprocessing: Mean and standard deviation that loaded weights expect.
        saved: Arguments as a checkpoint shall hold them, with Hub repositories pinned to the commit that was used.
    """

    name: str
    weights: str | bool | None
    kwargs: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    preprocessing: dict[str, list[float]] = field(default_factory=dict, compare=False)
    saved: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def is_timm(self) -> bool:
        """Return whether timm builds it."""
        return self.name.startswith("tu-")


def resolve_encoder(
    encoder: str, weights: str | bool | None, kwargs: dict[str, Any] | None = None, load: bool = True
) -> EncoderSpec:
    """Check an encoder's name, weights and keyword arguments before anything is built.

    Args:
        encoder: One of ours (``replknet_31b``), one of smp's (``resnet18``), any timm model, with or without smp's
            ``tu-`` prefix, or a Hub repository or folder (``hf-hub:owner/name``, ``local-dir:folder``) whose
            ``config.json`` names the timm model; a name that smp and timm both know is smp's unless it has the prefix.
        weights: ``None``; ``True`` or ``"pretrained"`` (the default weights); a timm tag or a name of smp's; or a
            source as `lk_backbones.hub.pull` takes it: ``hf-hub:owner/name@revision``, a local folder, a
            ``.safetensors`` or ``.pth`` file in a naming that the encoder's family can read, or the name of published
            weights.
        kwargs: Keyword arguments of the timm model, such as ``drop_path_rate``.
        load: ``False`` for the same encoder without its weights, whose file may be gone.

    Returns:
        What to give to smp, and what to load afterwards.

    Raises:
        ValueError: If the encoder or its weights are unknown, keyword arguments are given for an encoder of smp's own
            or say where weights lie, or an encoder without its weights is to come from a repository or folder.
        FileNotFoundError: If a weight file or folder does not exist.
    """
    kwargs = dict(kwargs or {})
    if loading := weight_arguments(kwargs):
        raise ValueError(
            f"encoder_kwargs: {', '.join(repr(name) for name in loading)} would fetch or read weights unchecked; these "
            f"say what the model is, and encoder_weights takes a file, a folder or 'hf-hub:owner/name'"
        )
    base = encoder.removeprefix("tu-")
    if base.startswith(_REMOTE):
        if not load:  # a checkpoint or config.json: those that a task wrote name the model instead
            raise ValueError(
                f"encoder='{encoder}': the encoder of a model that is rebuilt from a file must be named, such as "
                f"'tu-resnet18'; it is not fetched from elsewhere"
            )
        return _resolve_repository(base, weights, kwargs)
    architecture, _, tag = base.partition(".")
    by_smp = not encoder.startswith("tu-") and architecture not in list_encoders() and base in smp.encoders.encoders
    if not (by_smp or timm.is_model(architecture)):
        known = {*list_encoders(), *smp.encoders.encoders, *timm.list_models()}
        raise ValueError(f"unknown encoder '{encoder}'{nearest(architecture, known)}")
    if not by_smp:
        check_architecture(base, f"encoder='{encoder}'")
    if by_smp and kwargs:
        raise ValueError(
            f"encoder_kwargs {sorted(kwargs)} would be dropped: '{encoder}' is an encoder of smp's own, which "
            f"takes none; choose a timm model ('tu-…'), which does{_timm_twin(base)}"
        )
    name = base if by_smp else f"tu-{base}"
    if weights is None or weights is False:
        return EncoderSpec(name, None, kwargs)
    tags = [] if by_smp else _tags(architecture)
    if not load:  # whatever a file says of its weights is not looked for either
        # the tag stays in the name, because it can decide on the architecture (a transformer's image size)
        tagged = weights in tags and tag in ("", weights)
        return EncoderSpec(f"tu-{architecture}.{weights}" if tagged else name, None, kwargs)
    if isinstance(weights, str | os.PathLike) and (is_source(weights) or _is_published_name(weights)):
        source = os.fspath(weights)
        if not source.startswith(_REMOTE) and is_source(source) and not os.path.exists(os.path.expanduser(source)):
            raise FileNotFoundError(f"encoder_weights: there is no file or folder '{weights}'")
        return EncoderSpec(name, None, kwargs, source)
    if by_smp:
        return EncoderSpec(name, _smp_weights(base, weights))
    if weights in _DEFAULT_WEIGHTS:
        if not tags:
            raise ValueError(
                f"nobody published weights for '{encoder}' (encoder_weights={weights!r}); use None, or a source such "
                f"as 'hf-hub:owner/name' or a local weight file"
            )
    elif weights not in tags or tag not in ("", weights):
        raise ValueError(
            f"encoder_weights='{weights}' is neither a Hub repository ('hf-hub:owner/name'), a local file nor weights "
            f"of '{encoder}' (those are {tags or 'none'}){nearest(str(weights), tags)}"
        )
    else:
        base = f"{architecture}.{weights}"  # as above
        name = f"tu-{base}"
    if architecture in list_encoders():  # from the team's mirror or the published place, checked and mapped by us
        return EncoderSpec(name, None, kwargs, base)
    return EncoderSpec(name, True, kwargs)


def _resolve_repository(source: str, weights: str | bool | None, kwargs: dict[str, Any]) -> EncoderSpec:
    """Resolve an encoder that a Hub repository or folder names: its architecture and weights."""
    config, pinned = pull_config(source)
    if config.get("architecture") is None:
        raise ValueError(f"encoder='{source}': its config.json names no timm model ('architecture')")
    name = f"tu-{config['architecture']}"
    described = config.get("model_args") or {}
    check_buildable(lambda: timm.create_model(config["architecture"], **described), f"encoder='{source}'")
    kwargs = {k: v for k, v in described.items() if k not in _SET_BY_SMP} | kwargs
    spec = resolve_encoder(name, pinned if weights in _DEFAULT_WEIGHTS else weights, kwargs)
    # from now on without the network: the architecture is known
    spec.saved |= {"encoder": name, "encoder_kwargs": kwargs, "encoder_weights": pinned if weights else None}
    return spec


def load_encoder_weights(encoder: nn.Module, spec: EncoderSpec) -> LoadReport | None:
    """Load the weights that `resolve_encoder` found, after smp or timm has built the encoder.

    Args:
        encoder: The encoder.
        spec: What it was built from; gets ``preprocessing`` and the pinned ``saved`` arguments.

    Returns:
        What was loaded; ``None`` if there was nothing to load.

    Raises:
        WeightsError: If the weights cannot be had, or more than half of the encoder's tensors are not among them, or
            one has another shape. A smaller part gives a warning: classification weights lack, for instance, the norms
            of the returned maps.
    """
    if spec.source is None:
        return None
    weights = pull(spec.source)
    report = load_encoder(encoder, weights, spec.kwargs, mode="lenient")
    spec.preprocessing = weights.preprocessing
    if weights.source.startswith("hf-hub:"):
        spec.saved["encoder_weights"] = weights.source
    rank_zero_info(printable(report, newlines=True))
    if report.missing:
        rank_zero_warn(
            f"'{report.source}' lacks {len(report.missing)} tensors of '{spec.name}', left random: "
            f"{report.missing[:5]} …"
        )
    return report


def check_enlargement(value: int | Mapping[str, Any] | None) -> None:
    """Check the argument `enlarge_kernels` of a task before anything is built.

    Args:
        value: An odd kernel size, or the keyword arguments of `lk_backbones.enlarge_kernels`, or ``None`` for nothing.

    Raises:
        ValueError: With what would be right.
    """
    arguments = _enlargement(value)
    for name in arguments:
        if name not in _OF_ENLARGEMENT:
            raise ValueError(
                f"enlarge_kernels has no argument '{name}', only {', '.join(_OF_ENLARGEMENT)}"
                f"{nearest(str(name), _OF_ENLARGEMENT)}"
            )
    if value is not None and "kernel_size" not in arguments:
        raise ValueError(f"enlarge_kernels={dict(arguments)} needs a kernel_size, such as 13")
    for name, argument in arguments.items():
        if not fits(argument, _OF_ENLARGEMENT[name]):
            expected = str(_OF_ENLARGEMENT[name]).replace("collections.abc.", "")
            raise ValueError(f"enlarge_kernels: {name}={argument!r} must be {expected}")
    if arguments:
        try:
            check_kernel_sizes(arguments["kernel_size"])
        except ValueError as error:
            raise ValueError(f"enlarge_kernels={value}: {error}") from error


def enlarge_encoder(encoder: nn.Module, value: int | Mapping[str, Any] | None) -> None:
    """Enlarge an encoder's depthwise kernels in place, once its weights are loaded, and say which.

    Args:
        encoder: The encoder.
        value: As for `check_enlargement`.

    Raises:
        ValueError: If nothing can be enlarged that way, with the reasons.
    """
    arguments = _enlargement(value)
    if not arguments:
        return
    try:
        plan = plan_enlargement(encoder, **{k: v for k, v in arguments.items() if k != "peripheral"})
        enlarge_kernels(encoder, **arguments, inplace=True)
    except ValueError as error:
        raise ValueError(f"enlarge_kernels={value}: {error}") from error
    rank_zero_info(printable(plan, newlines=True))


def _enlargement(value: int | Mapping[str, Any] | None) -> dict[str, Any]:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {"kernel_size": value}


def _is_published_name(weights: str | os.PathLike[str]) -> bool:
    return "." in os.fspath(weights) and find_published(os.fspath(weights)) is not None


def _tags(architecture: str) -> list[str]:
    """Tags of published weights: the catalogue's for our own encoders, else those that timm can fetch."""
    if architecture in list_encoders():
        return [published.name.partition(".")[2] for published in list_published(f"{architecture}.*")]
    return [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]


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


def build_encoder(spec: EncoderSpec, in_channels: int) -> nn.Module:
    """Build an encoder on its own, of full depth, with its weights.

    Args:
        spec: The encoder.
        in_channels: Channels of the images.

    Returns:
        The smp encoder.

    Raises:
        ValueError: If the encoder refuses its arguments.
        RuntimeError: If its weights do not fit.
    """
    try:
        encoder: nn.Module = smp.encoders.get_encoder(
            spec.name, in_channels=in_channels, depth=5, weights=spec.weights, **spec.kwargs
        )
    except TypeError as error:
        raise ValueError(f"'{spec.name}' refuses its arguments (encoder_kwargs={spec.kwargs}): {error}") from error
    load_encoder_weights(encoder, spec)
    return encoder
