"""From weights and what is written beside them to the model they belong to, without its values."""

from typing import Any

import segmentation_models_pytorch as smp
import timm
from torch import nn

import lk_backbones.tasks
from lk_backbones.encoders.loading import fitting_arguments, fitting_encoders, is_dense_model
from lk_backbones.tasks import DetectionTask, SegmentationTask
from lk_backbones.tasks.base import BaseTask, class_name_of, without_encoder_weights
from lk_backbones.tasks.openmmlab import detector_arguments, upernet_arguments
from lk_backbones.weights.catalogue import identify_published, list_published
from lk_backbones.weights.errors import WeightsError
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
    own = weights.config.get("_lk_backbones", {})
    if "hyper_parameters" in own:
        return _task(own.get("class", "SegmentationTask"), own["hyper_parameters"], weights)
    if weights.hyper_parameters:
        return _task(class_name_of(weights.hyper_parameters), weights.hyper_parameters, weights)
    if "_model_class" in weights.config:
        return _smp_model(weights)
    if "architecture" in weights.config:
        arguments = weights.config.get("model_args", {})
        if "num_classes" in weights.config:
            arguments = {"num_classes": weights.config["num_classes"]} | arguments
        tag = weights.config.get("pretrained_cfg", {}).get("tag")
        full_name = f"{weights.config['architecture']}.{tag}" if tag else weights.config["architecture"]
        known = full_name in timm.list_models(f"{weights.config['architecture']}.*", include_tags=True)
        return timm.create_model(full_name if known else weights.config["architecture"], **arguments)
    return _published_model(weights, name or (weights.published.name if weights.published else None), kwargs or {})


def _task(class_name: str, hyper_parameters: dict[str, Any], weights: Weights) -> BaseTask:
    # Only our own tasks: a file must not be able to choose what is imported and run.
    task_class = getattr(lk_backbones.tasks, class_name, None) if class_name in lk_backbones.tasks.__all__ else None
    if not (isinstance(task_class, type) and issubclass(task_class, BaseTask)):
        raise WeightsError(f"'{weights.source}' is of a task '{class_name}', which this version of lk_backbones lacks")
    arguments = {key: value for key, value in hyper_parameters.items() if not key.startswith("_")}
    try:
        with without_encoder_weights():
            return task_class(**arguments)
    except TypeError as error:
        raise WeightsError(f"'{weights.source}' was written by another version of {class_name}: {error}") from error


def _smp_model(weights: Weights) -> nn.Module:
    config = dict(weights.config)
    class_name = config.pop("_model_class")
    known = {model_class.__name__: model_class for model_class in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if class_name not in known:
        raise WeightsError(f"'{weights.source}' is an smp model '{class_name}', unknown to this version of smp")
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    return known[class_name](**(arguments | {"encoder_weights": None}))


def _published_model(weights: Weights, name: str | None, kwargs: dict[str, Any]) -> nn.Module:
    """The model of a bare published file: by name, else by its keys and shapes."""
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
        arguments |= {"encoder": encoders[0], "encoder_kwargs": fitting_arguments(encoders[0], state) | kwargs}
        return SegmentationTask(**arguments) if segments else DetectionTask(**arguments)
    classes = [len(value) for key, value in state.items() if key in _CLASSIFIER_WEIGHTS]
    name = name if name in encoders else encoders[0]
    return timm.create_model(name, num_classes=classes[0] if classes else 0, **kwargs)


_CLASSIFIER_WEIGHTS = ("head.weight", "head.fc.weight")


def _preprocessing(weights: Weights, name: str | None, encoder: str) -> dict[str, Any]:
    """Mean and standard deviation that the authors used, which a bare file does not hold."""
    published = list_published(name or f"*_{encoder}.*") or list_published(f"{encoder}.*")
    if weights.preprocessing or not published:
        return dict(weights.preprocessing)
    return {"mean": list(published[0].mean), "std": list(published[0].std)}
