"""From weights and what is written beside them to the model they belong to, without its values."""

from collections.abc import Callable
from typing import Any

import segmentation_models_pytorch as smp
import timm
from torch import nn

from lk_backbones.encoders._loading import fitting_arguments, fitting_encoders
from lk_backbones.tasks import DetectionTask, SegmentationTask
from lk_backbones.tasks.base import BaseTask, build_saved_task, saved_task
from lk_backbones.weights.arguments import (
    check_architecture,
    check_model_arguments,
    check_size,
    not_buildable,
    weight_arguments,
)
from lk_backbones.weights.catalogue import identify_published, list_published
from lk_backbones.weights.errors import WeightsError, shorten
from lk_backbones.weights.openmmlab import detector_arguments, is_dense_model, upernet_arguments
from lk_backbones.weights.sources import Weights

__all__ = ["build_model"]


def build_model(weights: Weights, name: str | None = None, kwargs: dict[str, Any] | None = None) -> nn.Module:
    """Build the model that weights belong to; its values are still to be loaded.

    Args:
        weights: What `pull` returned.
        name: A timm model (``replknet_31b.in1k``) or published weights, for a bare file that does not say what it is.
        kwargs: Keyword arguments of that timm model, such as ``kernel_sizes``.

    Returns:
        A timm model, an smp model or a task.

    Raises:
        WeightsError: If that cannot be told, or is not known here.
    """
    config = weights.config
    own = config.get("_lk_backbones") or {}
    if own.get("hyper_parameters") is not None:
        hyper_parameters = own["hyper_parameters"]
        if isinstance(hyper_parameters, dict):
            hyper_parameters = hyper_parameters | {"_class_path": own.get("class") or "SegmentationTask"}
        return _task(hyper_parameters, weights)
    if weights.hyper_parameters:
        return _task(weights.hyper_parameters, weights)
    if config.get("_model_class") is not None:
        return _smp_model(weights)
    if config.get("architecture") is not None:
        architecture = config["architecture"]
        arguments = dict(config.get("model_args") or {})
        if config.get("num_classes") is not None:
            arguments.setdefault("num_classes", config["num_classes"])
        tag = (config.get("pretrained_cfg") or {}).get("tag")
        full_name = f"{architecture}.{tag}"
        known = tag and full_name in timm.list_models(f"{architecture}.*", include_tags=True)
        return _build(lambda: timm.create_model(full_name if known else architecture, **arguments), weights)
    return _published_model(weights, name or (weights.published.name if weights.published else None), kwargs or {})


def _build(make: Callable[[], Any], weights: Weights) -> Any:
    """Build a model that a file describes, unless it outgrows the tensors that it is to take."""
    _check_size(make, weights)
    try:
        return make()
    except WeightsError:
        raise
    except Exception as error:
        raise not_buildable(f"'{weights.source}'", error) from error


def _check_size(make: Callable[[], Any], weights: Weights) -> None:
    check_size(make, [*weights.state_dict.values(), *weights.extra.values()], f"'{weights.source}'")


def _task(hyper_parameters: Any, weights: Weights) -> BaseTask:
    task_class: type[BaseTask]
    task_class, arguments, where = saved_task({"hyper_parameters": hyper_parameters}, weights.source)
    return build_saved_task(task_class, arguments, where, [*weights.state_dict.values(), *weights.extra.values()])


def _smp_model(weights: Weights) -> nn.Module:
    config, where = weights.config, f"'{weights.source}'"
    class_name = config["_model_class"]
    known = {model_class.__name__: model_class for model_class in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if class_name not in known:
        raise WeightsError(f"{where} is an smp model {shorten(class_name)}, unknown to this version of smp")
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    arguments.pop("encoder_weights", None)  # they are in the file; smp would fetch them
    arguments = check_model_arguments(arguments, where)
    encoder = arguments.get("encoder_name")
    if encoder is not None and encoder not in list(smp.encoders.encoders):
        prefix, _, architecture = str(encoder).partition("-")
        check_architecture(architecture if prefix in ("tu", "timm") else encoder, f"{where}: 'encoder_name'")
    return _build(lambda: known[class_name](**arguments, encoder_weights=None), weights)


def _published_model(weights: Weights, name: str | None, kwargs: dict[str, Any]) -> nn.Module:
    """Return the model of a bare published file: by name, else by its keys and shapes."""
    if not isinstance(kwargs, dict) or (loading := weight_arguments(kwargs)):
        wrong = f"{', '.join(loading)} say where weights lie" if isinstance(kwargs, dict) else f"not {shorten(kwargs)}"
        raise WeightsError(f"the model's keyword arguments must be a dictionary of what the model is: {wrong}")
    state = weights.state_dict
    if name is None:
        published = identify_published(weights.file)
        name = published.name if published is not None else None
    encoders = [name] if name and timm.is_model(name.partition(".")[0]) else fitting_encoders(state)
    if len(encoders) != 1:
        possible = f"it could be {' or '.join(encoders)}" if encoders else "it fits none of our encoders"
        raise WeightsError(
            f"'{weights.source}' does not say what model it is of, and {possible}: name it, with --model"
        )
    if is_dense_model(state):
        segments = any(key.startswith("decode_head.") for key in state)
        try:
            arguments = upernet_arguments(state) if segments else detector_arguments(state)
        except KeyError as error:
            raise WeightsError(
                f"'{weights.source}' is a whole OpenMMLab model of an unknown kind (it lacks {error}); UPerNet, "
                f"Cascade Mask R-CNN and FCOS are known. load_weights(model, …) takes its backbone"
            ) from error
        arguments |= _preprocessing(weights, name, encoders[0])
        arguments |= {"encoder": encoders[0], "encoder_kwargs": fitting_arguments(encoders[0], weights) | kwargs}
        task_class = SegmentationTask if segments else DetectionTask
        return _build(lambda: task_class(**arguments), weights)
    name = name if name in encoders else encoders[0]
    _check_size(lambda: timm.create_model(name, **kwargs), weights)
    arguments = {"num_classes": 0} | fitting_arguments(name, weights, kwargs) | kwargs
    return _build(lambda: timm.create_model(name, **arguments), weights)


def _preprocessing(weights: Weights, name: str | None, encoder: str) -> dict[str, Any]:
    """Mean and standard deviation that the authors used, which a bare file does not hold."""
    published = list_published(name or f"*_{encoder}.*") or list_published(f"{encoder}.*")
    if weights.preprocessing or not published:
        return dict(weights.preprocessing)
    return {"mean": list(published[0].mean), "std": list(published[0].std)}
