"""The one repository layout: ``model.safetensors``, ``config.json``, model card; for a task also what smp cannot hold.

``config.json`` serves three readers. timm reads ``architecture``, ``model_args`` and ``pretrained_cfg`` of an encoder;
smp reads ``mean`` and ``std`` at the top level of an encoder, or a model's arguments and ``_model_class``; this package
reads ``_lk_backbones``. Keys with a leading underscore are those that smp does not take for arguments.
"""

import json
import math
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from segmentation_models_pytorch.base import SegmentationModel
from segmentation_models_pytorch.encoders.timm_universal import TimmUniversalEncoder
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from torch import nn

import lk_backbones
from lk_backbones.encoders._names import build_empty, is_timm_model, timm_arguments, timm_names
from lk_backbones.layers.enlarge import enlarged_parameters
from lk_backbones.repository.card import CardFacts, write_card
from lk_backbones.repository.folder import record_files
from lk_backbones.tasks.base import BaseTask, without_encoder_weights
from lk_backbones.weights.catalogue import (
    PublishedWeights,
    find_published,
    identify_published,
    published_by_checksum,
)
from lk_backbones.weights.errors import WeightsError
from lk_backbones.weights.sources import EXTRA_FILE, Weights

__all__ = ["RepositoryInfo", "write_repository"]

# Of the arguments that a timm model was built with, those that its config.json has a place of its own for.
_NOT_MODEL_ARGUMENTS = ("num_classes", "pretrained_model_args", "cache_dir", "scriptable", "exportable", "no_jit")


@dataclass
class RepositoryInfo:
    """What a model card says that the model cannot tell.

    Attributes:
        model: The timm model (``replknet_31b.in1k``) or the published weights that a bare file holds.
        model_kwargs: Keyword arguments of that timm model, such as ``kernel_sizes``.
        license: SPDX identifier of the weights' licence; by default that of the published weights, if they are some.
        data: What it was trained on.
        metrics: What was measured, such as ``{"val/mean_iou": 0.52}``.
        command: The command that measured it.
        description: A sentence or two on what it is for.
        class_names: Names of the classes, for encoders with a classifier and smp models.
    """

    model: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    data: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    command: str | None = None
    description: str | None = None
    class_names: list[str] = field(default_factory=list)


def write_repository(
    model: nn.Module, folder: Path, repo_id: str, info: RepositoryInfo, weights: Weights | None = None
) -> None:
    """Write a model as a repository.

    Args:
        model: A timm model, an smp encoder built by timm, an smp model, or a task.
        folder: Where to; an empty folder.
        repo_id: ``owner/name``, for the card.
        info: What the card says beside.
        weights: Where the model was just loaded from, if it was.

    Raises:
        WeightsError: If the model is of no such kind, or could not be rebuilt from its arguments.
    """
    published, claimed = _published(info, weights)
    if isinstance(model, BaseTask):
        facts = _write_task(model, folder)
    elif isinstance(model, SegmentationModel):
        facts = _write_smp_model(model, folder, _encoder_preprocessing(model.encoder))
    elif isinstance(model, TimmUniversalEncoder) or is_timm_model(model):
        facts = _write_encoder(model, folder, published)
    else:
        raise WeightsError(
            f"a {type(model).__name__} cannot be published: a timm model, an smp encoder built by timm, an smp model "
            f"or one of our tasks can"
        )
    facts.repo_id, facts.published, facts.claimed = repo_id, published, claimed
    facts.parameters = sum(parameter.numel() for parameter in model.parameters())
    if weights is not None:
        facts.origin, facts.origin_sha256 = (
            weights.published.name if weights.published else weights.file.name,
            weights.sha256,
        )
        facts.noted_metrics = _checkpoint_metrics(weights.checkpoint)
    facts.license = info.license or (published.license if published else None)
    facts.data = info.data or (published.data if published else None)
    facts.metrics = dict(info.metrics)
    facts.command, facts.description = info.command, info.description
    facts.class_names = info.class_names or facts.class_names
    write_card(facts, folder / "README.md")
    record_files(folder)


def _published(
    info: RepositoryInfo, weights: Weights | None
) -> tuple[PublishedWeights | None, PublishedWeights | None]:
    """Return the catalogue's entry, if it is published weights that are published again.

    Returns:
        The entry, if the file is known to be it: by its checksum, or because it came from the authors' repository. And
        the entry that it is only called after, by name: of that nothing is known.
    """
    if weights is None:
        return None, None
    known = published_by_checksum(weights.sha256)
    named = weights.published
    if known is None and named is not None and named.hub and named.file:
        known = named if weights.source.startswith(f"hf-hub:{named.hub}/{named.file}@") else None
    if known is not None:
        return known, None
    given = find_published(info.model) if info.model and "." in info.model else None
    return None, given or named or identify_published(weights.file)


# ---- encoders ----


def _write_encoder(encoder: nn.Module, folder: Path, published: PublishedWeights | None) -> CardFacts:
    full: Any
    full, new = (encoder, []) if hasattr(encoder, "forward_head") else _whole_model(encoder)
    architecture = full.pretrained_cfg["architecture"]
    arguments = {k: v for k, v in timm_arguments(full).items() if k not in _NOT_MODEL_ARGUMENTS}
    again = build_empty(lambda: timm.create_model(architecture, num_classes=full.num_classes, **arguments))
    _check_rebuilt(full, again)
    save_for_hf(full, str(folder), model_args=arguments, safe_serialization=True)

    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    timm_config = config["pretrained_cfg"]
    if published is None or published.name != f"{architecture}.{timm_config.get('tag')}":
        for key in ("tag", "license", "origin_url"):  # those of the published weights, which these no longer are
            timm_config.pop(key, None)
    if arguments.get("in_chans", 3) != 3:
        # timm before 1.0.31 takes every published input layer for one of three channels, and would drop this one.
        timm_config["first_conv"] = None
    preprocessing = {key: list(timm_config[key]) for key in ("mean", "std")}
    config |= {
        "input_space": "RGB",
        "input_range": [0, 1],
        **preprocessing,
        "_lk_backbones": _ours("encoder", preprocessing),
    }
    _write_json(file, config)
    name = f"{architecture}.{timm_config['tag']}" if timm_config.get("tag") else architecture
    return CardFacts(
        kind="encoder",
        name=name,
        encoder=architecture,
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        num_classes=full.num_classes,
        input_size=list(timm_config["input_size"]),
        arguments=arguments,
        new_tensors=new,
    )


def _whole_model(encoder: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the whole timm model around an encoder's weights, without a classifier.

    Returns:
        The model, and those of its tensors that the encoder does not have: of the norm in front of the classifier.

    Raises:
        WeightsError: If the encoder lacks anything else.
    """
    network: Any = encoder.model if isinstance(encoder, TimmUniversalEncoder) else encoder
    arguments = timm_arguments(network)
    arguments.pop("num_classes", None)
    if isinstance(encoder, TimmUniversalEncoder):
        arguments["in_chans"] = encoder.out_channels[0]  # which smp changes afterwards
    full: Any = timm.create_model(network.pretrained_cfg["architecture"], num_classes=0, **arguments)
    full.pretrained_cfg = full.pretrained_cfg | {
        key: value for key, value in network.pretrained_cfg.items() if key in ("mean", "std", "tag")
    }
    if added := enlarged_parameters(encoder):
        raise WeightsError(
            f"this encoder has {len(added)} enlarged kernels, which a timm model does not have, first '{min(added)}': "
            f"publish the task it is part of (enlarge_kernels=…), which tells of them"
        )
    values = encoder.state_dict()
    own = {full_name: values[name] for name, full_name in timm_names(encoder, full).items()}
    new = [key for key in full.state_dict() if key not in own]
    missing = sorted(set(new) - _last_norms(full, own))
    if missing:
        raise WeightsError(
            f"the encoder lacks {len(missing)} tensors of a whole '{network.pretrained_cfg['architecture']}', first "
            f"{missing[:3]}; if its later stages were cut off (encoder_depth), publish the whole smp model instead"
        )
    full.load_state_dict(own, strict=False)
    return full, new


def _last_norms(full: nn.Module, own: Container[str]) -> set[str]:
    """Tensors of norms in front of the classifier: what a feature extractor leaves out and a new model has untrained.

    They lie in a part of the network, such as ``norm`` or ``head``, of which the encoder has nothing.
    """
    state = full.state_dict()
    taken = {key.partition(".")[0] for key in state if key in own}
    norms = [name for name, module in full.named_modules() if name and "norm" in type(module).__name__.lower()]
    return {key for key in state if key.partition(".")[0] not in taken and key.rpartition(".")[0] in norms}


# ---- smp models and tasks ----


def _write_smp_model(model: Any, folder: Path, preprocessing: dict[str, list[float]]) -> CardFacts:
    arguments = {key: value for key, value in model.config.items() if not key.startswith("_")}
    arguments["encoder_weights"] = None  # they are in the model; smp would download them again
    _check_rebuilt(model, build_empty(lambda: type(model)(**arguments)))
    model.save_pretrained(folder)
    _write_json(
        folder / "config.json",
        arguments | {"_model_class": type(model).__name__, "_lk_backbones": _ours("segmentation_model", preprocessing)},
    )
    return CardFacts(
        kind="segmentation_model",
        name=f"{type(model).__name__} on {arguments['encoder_name']}",
        encoder=str(arguments["encoder_name"]),
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        num_classes=arguments.get("classes", 0),
    )


def _encoder_preprocessing(encoder: nn.Module) -> dict[str, list[float]]:
    """Return what the encoder's weights expect, or ImageNet's mean and standard deviation."""
    config = getattr(getattr(encoder, "model", None), "pretrained_cfg", None) or {}
    return {
        "mean": list(config.get("mean", IMAGENET_DEFAULT_MEAN)),
        "std": list(config.get("std", IMAGENET_DEFAULT_STD)),
    }


def _write_task(task: BaseTask, folder: Path) -> CardFacts:
    hparams: dict[str, Any] = {key: _plain(value) for key, value in task.hparams.items() if not key.startswith("_")}
    if isinstance(hparams["encoder_weights"], str) and not hparams["encoder_weights"].startswith("hf-hub:"):
        hparams["encoder_weights"] = Path(hparams["encoder_weights"]).name  # not where it lay on this machine
    preprocessing = {"mean": hparams["mean"], "std": hparams["std"]}
    network: Any = getattr(task, "model", None)
    # smp does not know of enlarged kernels: only the task can say how to make them
    if isinstance(network, SegmentationModel) and hparams.get("enlarge_kernels") is None:
        facts = _write_smp_model(network, folder, preprocessing)
        extra = {key: value for key, value in task.state_dict().items() if not key.startswith("model.")}
    elif is_timm_model(network):  # a classifier, which timm shall load too
        facts, extra = _write_encoder(network, folder, None), {}
    else:
        with without_encoder_weights():
            _check_rebuilt(task, build_empty(lambda: type(task)(**hparams)))
        facts = CardFacts(kind="task", name=f"{type(task).__name__} on {hparams['encoder']}", **preprocessing)
        extra = {}
        save_file({key: value.contiguous() for key, value in task.state_dict().items()}, folder / "model.safetensors")
        _write_json(folder / "config.json", {})
    if extra:
        save_file({key: value.contiguous() for key, value in extra.items()}, folder / EXTRA_FILE)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["_lk_backbones"] = _ours("task", preprocessing) | {
        "class": type(task).__name__, "hyper_parameters": hparams, "extra": bool(extra),
    }  # fmt: skip
    _write_json(file, config)
    facts.task_class, facts.num_classes = type(task).__name__, hparams["num_classes"]
    facts.class_names = hparams.get("class_names") or []
    facts.hyper_parameters, facts.encoder = hparams, str(hparams["encoder"])
    return facts


def _checkpoint_metrics(content: dict[str, Any]) -> dict[str, float]:
    """Return what the callbacks of a training watched, with their best values."""
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, dict) else []
    return {
        str(state["monitor"]): float(state["best_model_score"])
        for state in states
        if isinstance(state, dict) and state.get("monitor") and state.get("best_model_score") is not None
        if math.isfinite(float(state["best_model_score"]))
    }


# ---- common ----


def _check_rebuilt(model: nn.Module, again: nn.Module) -> None:
    own = {key: value.shape for key, value in model.state_dict().items()}
    rebuilt = {key: value.shape for key, value in again.state_dict().items()}
    if own != rebuilt:
        different = sorted(key for key in own.keys() | rebuilt.keys() if own.get(key) != rebuilt.get(key))
        raise WeightsError(
            f"this {type(model).__name__} cannot be rebuilt from the arguments it was made with: {len(different)} "
            f"tensors differ, first {different[:3]}. Publish it before folding it (reparameterize) or changing modules"
        )


def _ours(kind: str, preprocessing: dict[str, list[float]]) -> dict[str, Any]:
    return {"kind": kind, "version": lk_backbones.__version__, **preprocessing}


def _plain(value: Any) -> Any:
    """Tuples as lists, paths as text: what JSON knows."""
    return json.loads(json.dumps(value, default=str))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
