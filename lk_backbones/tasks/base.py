"""What every task shares: encoder arguments, normalisation, optimiser and schedule, safe checkpoints."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import segmentation_models_pytorch as smp
import torch
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich.table import Table
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import Self

from lk_backbones.callbacks.checkpoints import SafeCheckpoints
from lk_backbones.callbacks.closing import ClosingLines
from lk_backbones.drawing.figures import Figures
from lk_backbones.drawing.palette import Color, class_palette
from lk_backbones.tasks.encoder import EncoderSpec, enlarge_encoder, resolve_encoder
from lk_backbones.tasks.optim import (
    encoder_lr_scales,
    parameter_groups,
    warmup_cosine_scheduler,
    warmup_poly_scheduler,
    warmup_step_scheduler,
)
from lk_backbones.tasks.sync_batchnorm import keep_activations
from lk_backbones.weights.arguments import check_size
from lk_backbones.weights.errors import WeightMismatchError, WeightsError, shorten
from lk_backbones.weights.report import check_values
from lk_backbones.weights.saved import (
    build_saved,
    checked_arguments,
    find_class,
    own_classes,
    read_training_checkpoint,
    require_finite,
)

__all__ = ["BaseTask", "build_saved_task", "mean_and_std", "saved_task", "without_encoder_weights"]

TaskT = TypeVar("TaskT", bound="BaseTask")

_skip_encoder_weights: ContextVar[bool] = ContextVar("_skip_encoder_weights", default=False)


@contextmanager
def without_encoder_weights() -> Iterator[None]:
    """Build tasks inside this context without reading or downloading their ``encoder_weights``.

    For tasks whose weights come from a checkpoint anyway; `BaseTask.load_from_checkpoint` uses it. The argument itself
    stays among the hyper-parameters.
    """
    token = _skip_encoder_weights.set(True)
    try:
        yield
    finally:
        _skip_encoder_weights.reset(token)


def saved_task(
    checkpoint: Mapping[str, Any], source: object, cls: "type[TaskT] | None" = None
) -> "tuple[type[TaskT], dict[str, Any], str]":
    """Find the task that a checkpoint describes, and check its arguments.

    Args:
        checkpoint: Content of the checkpoint, or of a file with the same ``hyper_parameters``.
        source: Its name, for messages.
        cls: The class that is asked for; by default whichever of ours the checkpoint names.

    Returns:
        Class, constructor arguments, and what to call them in messages.

    Raises:
        WeightsError: If it describes none of our tasks, or holds what cannot be arguments of it.
    """
    from lk_backbones import tasks  # the classes in it derive from the one below

    values = checkpoint.get("hyper_parameters")
    where = f"'{source}', hyper_parameters"
    if not isinstance(values, Mapping):
        raise WeightsError(f"{where}: there are none, so it does not say what model it is of; --model or --config can")
    # a bare trainer does not note the class; only detectors number their categories, only classifiers crop
    told = {"category_ids": "DetectionTask", "crop_pct": "ClassificationTask"}
    bare = next((name for key, name in told.items() if key in values), "SegmentationTask")
    known: Any = own_classes(tasks, BaseTask)
    found = find_class(cls or BaseTask, values.get("_class_path", bare), known, where, "--model")
    arguments = checked_arguments(found, values, where)
    if str(arguments.get("encoder")).startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        raise WeightsError(
            f"{where}: encoder={shorten(arguments['encoder'])}. A file may not say where an encoder is fetched or read "
            f"from; a task writes the architecture's name instead"
        )
    return found, arguments, where


def build_saved_task(
    cls: "type[TaskT]", arguments: Mapping[str, Any], where: str, tensors: Iterable[Any], **given: Any
) -> "TaskT":
    """Build a task from what `saved_task` returned, unless it outgrows the weights that it is to take.

    Args:
        cls: The class.
        arguments: Its keyword arguments in a file.
        where: What to call the file and the place in it in messages.
        tensors: The weights.
        **given: Arguments that the user gives instead.

    Returns:
        The task, whose weights are still to be loaded; those that its encoder started from are not fetched.

    Raises:
        WeightsError: If it cannot be built, or is far larger than the weights.
        FileNotFoundError: If the constructor misses a file.
    """

    def make() -> TaskT:
        with without_encoder_weights():
            return build_saved(cls, arguments, where, **given)

    check_size(make, tensors, where)
    return make()


def _saved_device(storage: Any, location: str) -> Any:
    """Put tensors where they were saved from, if that is here, else on the CPU."""
    kind = location.partition(":")[0]
    here = kind == "cpu" or (kind == "cuda" and torch.cuda.is_available()) or (
        kind == "mps" and torch.backends.mps.is_available()
    )  # fmt: skip
    return None if here else storage.cpu()


class BaseTask(L.LightningModule):
    """Base of the tasks: a network around an encoder, trained by the published recipes.

    A subclass stores its constructor's arguments with ``save_hyperparameters()``. Among them are, with the same names
    in every task: ``encoder``, ``encoder_weights``, ``encoder_kwargs``, ``enlarge_kernels``, ``in_channels``,
    ``num_classes``, ``class_names``, ``class_colors``, ``mean``, ``std``, ``freeze_encoder``,
    ``gradient_checkpointing``, ``optimizer``, ``lr``, ``momentum``, ``weight_decay``, ``bias_weight_decay``,
    ``layer_decay``, ``layer_decay_type``, ``warmup_steps``, ``warmup_ratio``, ``power`` and ``min_lr``; where the
    encoder is a part of the network, ``encoder_lr_scale``; where the learning rate may drop after some epochs instead
    of decaying, ``milestones`` and ``gamma``; and where it may follow a cosine, ``schedule``.

    Attributes:
        taken_from_data: Hyper-parameters that are taken over from the data module where they are ``None``.
    """

    taken_from_data: tuple[str, ...] = ("class_names", "class_colors")

    image_mean: torch.Tensor
    image_std: torch.Tensor

    @property
    def encoder(self) -> nn.Module:
        """The encoder inside the network: smp's or, where the network is a whole timm model, that."""
        raise NotImplementedError

    @property
    def class_names(self) -> list[str]:
        """Names of the classes: the argument's, else the data module's, else ``class_0`` and so on."""
        return self.hparams["class_names"] or [f"class_{i}" for i in range(self.hparams["num_classes"])]

    @property
    def class_colors(self) -> list[Color]:
        """Colours of the classes: the argument's, else the data module's, else those of `class_palette`."""
        colors = self.hparams["class_colors"] or class_palette(self.hparams["num_classes"])
        return [(color[0], color[1], color[2]) for color in colors]

    # --- building ---------------------------------------------------------------------------------------------------

    def resolve_encoder(self) -> EncoderSpec:
        """Check the encoder's arguments, for a subclass's constructor, minding `without_encoder_weights`."""
        hparams: Any = self.hparams
        load = not _skip_encoder_weights.get()
        return resolve_encoder(hparams.encoder, hparams.encoder_weights, hparams.encoder_kwargs, load)

    def prepare_encoder(self, spec: EncoderSpec) -> None:
        """Apply the shared encoder arguments; to be called at the end of a subclass's constructor.

        Args:
            spec: What the encoder was built from.

        Raises:
            ValueError: If gradient checkpointing is asked of an encoder that has none, nothing of it can be enlarged,
                or mean and std do not fit.
        """
        enlarge_encoder(self.encoder, self.hparams.get("enlarge_kernels"))  # its weights are those of small kernels
        if self.hparams["gradient_checkpointing"]:
            _checkpoint_gradients(self.encoder, spec)
        if self.hparams["freeze_encoder"]:
            self.encoder.requires_grad_(False).eval()
        mean, std = mean_and_std(self.encoder, spec, self.hparams)
        # saved with the checkpoint: by which commit it started, and how to read a picture
        self.hparams.update(spec.saved)
        self.hparams["mean"], self.hparams["std"] = mean, std
        self.register_buffer("image_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; a frozen encoder stays in evaluation mode, so that its batch norms do too."""
        super().train(mode)
        if self.hparams["freeze_encoder"]:
            self.encoder.eval()
        return self

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """Normalise images in [0, 1] by the task's mean and standard deviation, shape ``(N, C, H, W)``."""
        if image.shape[1] != self.image_mean.shape[1]:
            raise ValueError(
                f"the images have {image.shape[1]} channels, the task in_channels={self.image_mean.shape[1]}"
            )
        return (image - self.image_mean) / self.image_std

    # --- optimiser and schedule -------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimiser and the schedule from the hyper-parameters; Lightning calls it."""
        hparams: Any = self.hparams
        scales, exempt = encoder_lr_scales(
            self.encoder,
            hparams.layer_decay,
            hparams.encoder_kwargs,
            hparams.layer_decay_type,
            hparams.get("encoder_lr_scale", 1.0),
        )
        prefix = next(name for name, module in self.named_modules() if module is self.encoder) + "."
        groups = parameter_groups(
            self,
            hparams.lr,
            hparams.weight_decay,
            {prefix + name: scale for name, scale in scales.items()},
            {prefix + name for name in exempt},
            hparams.bias_weight_decay,
        )
        optimizer: torch.optim.Optimizer
        if hparams.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=hparams.lr)
        else:
            optimizer = torch.optim.SGD(groups, lr=hparams.lr, momentum=hparams.momentum)
        total_steps = self.trainer.estimated_stepping_batches
        if not 0 < total_steps < float("inf"):
            raise ValueError("the schedule needs an end: set the trainer's max_steps or max_epochs")
        if hparams.warmup_steps >= total_steps and not getattr(self.trainer, "fast_dev_run", False):
            rank_zero_warn(
                f"warmup_steps={hparams.warmup_steps} is not shorter than the training of {total_steps} steps, so the "
                f"learning rate never reaches lr={hparams.lr}"
            )
        if milestones := hparams.get("milestones"):
            epoch = -(-int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches)
            steps = [epoch * milestone for milestone in milestones]
            scheduler: LRScheduler = warmup_step_scheduler(
                optimizer, steps, hparams.gamma, hparams.warmup_steps, hparams.warmup_ratio
            )
        else:
            lengths = int(total_steps), hparams.warmup_steps, hparams.warmup_ratio
            least = hparams.min_lr / hparams.lr
            if hparams.get("schedule") == "cosine":
                scheduler = warmup_cosine_scheduler(optimizer, *lengths, least)
            else:
                scheduler = warmup_poly_scheduler(optimizer, *lengths, hparams.power, least)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- what callbacks ask -----------------------------------------------------------------------------------------

    def figures(self, opacity: float = 0.6, score_threshold: float = 0.3) -> Figures:
        """Make what draws this task's batches and outputs, for `Overlays`.

        Args:
            opacity: Of the classes' colours over the image, 0 to 1.
            score_threshold: Least score of a detection that is drawn.
        """
        raise NotImplementedError

    def results_table(self, metrics: Mapping[str, Any], stage: str) -> Table:
        """Make the table of this task's results, for `MetricsTable`.

        Args:
            metrics: ``trainer.callback_metrics``.
            stage: ``"val"`` or ``"test"``.
        """
        raise NotImplementedError

    # --- data -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compare the data module with the task, and take over what the task leaves to it, before anything runs.

        Args:
            stage: What the trainer is about to do.

        Raises:
            ValueError: If the numbers of classes differ.
        """
        data = getattr(self.trainer, "datamodule", None)
        num_classes = getattr(data, "num_classes", None)
        if num_classes is not None and num_classes != self.hparams["num_classes"]:
            raise ValueError(
                f"{type(data).__name__} has num_classes={num_classes}, but the task was built with "
                f"num_classes={self.hparams['num_classes']}: make them equal"
            )
        for key in self.taken_from_data:
            if self.hparams[key] is None and getattr(data, key, None):
                # plain values only, as checkpoints are read without unpickling
                values = [tuple(v) if isinstance(v, list | tuple) else v for v in getattr(data, key)]
                self.hparams[key] = values
        keep_activations(self.trainer)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """Bring along `SafeCheckpoints` and `ClosingLines`, unless the trainer has them."""
        has: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds: tuple[type[L.Callback], ...] = (SafeCheckpoints, ClosingLines)
        return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in has)]

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Rebuild a task from a checkpoint alone, without the network or the file of its encoder weights.

        The class is this one, or where this is `BaseTask` the one of lk_backbones that the checkpoint names; its
        arguments are plain values. The checkpoint builds nothing else and runs nothing.

        Args:
            checkpoint_path: Path, URL or file object.
            map_location: Device of the task, as for `torch.load`; by default the one it was saved from, if it is here.
            hparams_file: A YAML file of hyper-parameters, instead of those in the checkpoint.
            strict: Whether every weight must be in the checkpoint and the reverse; ``None`` for the task's own choice.
            weights_only: ``False`` unpickles the file, which runs whatever its writer put into it.
            **kwargs: Replace hyper-parameters.

        Returns:
            The task, in training mode as every new module: call ``eval()`` before using it without a trainer.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or no checkpoint of such a task.
            RuntimeError: If the checkpoint's weights are not those of the network that its hyper-parameters describe.
        """
        checkpoint = read_training_checkpoint(
            checkpoint_path, _saved_device if map_location is None else map_location, weights_only is not False
        )
        if hparams_file is not None:
            checkpoint["hyper_parameters"] = load_hparams_from_yaml(hparams_file, use_omegaconf=False)
        task_class, arguments, where = saved_task(checkpoint, checkpoint_path, cls)
        weights = checkpoint["state_dict"]
        task = build_saved_task(task_class, arguments, where, weights.values(), **kwargs)
        task.on_load_checkpoint(checkpoint)
        try:
            task.load_state_dict(weights, strict=task.strict_loading if strict is None else strict)
        except WeightsError as error:
            raise type(error)(f"'{checkpoint_path}': {error}") from error
        devices = [value.device for value in weights.values()]
        return task.to(devices[0]) if devices else task

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, as `torch.nn.Module.load_state_dict`, with an error that says what does not fit.

        Raises:
            WeightMismatchError: If something is no tensor, a shape differs or, when strict, a key is missing or
                unknown: with the first of each.
            WeightsError: If the weights are not finite, or numbers of another kind than the model's.
        """
        own = self.state_dict()
        tensors = {key: value for key, value in state_dict.items() if _is_ordinary(value)}
        problems = {
            "missing": [key for key in own if key not in state_dict] if strict else [],
            "unknown": [str(key) for key in state_dict if key not in own] if strict else [],
            "that are no ordinary tensors": [key for key in own if key in state_dict and key not in tensors],
            "of another shape": [
                f"{key} {tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}"
                for key in own
                if key in tensors and own[key].shape != tensors[key].shape
            ],
        }
        if any(problems.values()):
            lines = [f"{len(keys)} {kind}, first {keys[:5]}" for kind, keys in problems.items() if keys]
            described = {k: self.hparams[k] for k in ("architecture", "encoder", "num_classes") if k in self.hparams}
            raise WeightMismatchError(
                f"the checkpoint holds another model than {type(self).__name__}({described}): {'; '.join(lines)}"
            )
        check_values(tensors, own, "the checkpoint")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _is_ordinary(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor) and value.layout is torch.strided and not (value.is_meta or value.is_quantized)
    )


def _checkpoint_gradients(encoder: nn.Module, spec: EncoderSpec) -> None:
    if not spec.is_timm:
        raise ValueError(
            f"gradient_checkpointing: '{spec.name}' is an encoder of smp's own, which cannot; use a 'tu-…' encoder"
        )
    network: Any = getattr(encoder, "model", encoder)  # timm's feature extractor, or a whole timm model
    stages = [m for m in network.modules() if m is not network and hasattr(m, "grad_checkpointing")]
    for stage in stages:
        stage.grad_checkpointing = True
    if not stages:  # whole children of the extractor at a time
        network.set_grad_checkpointing(True)


def mean_and_std(encoder: nn.Module, spec: EncoderSpec, hparams: Any) -> tuple[list[float], list[float]]:
    """Return the arguments ``mean`` and ``std``, else those of the encoder's weights, else ImageNet's."""
    channels = hparams["in_channels"]
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    if spec.preprocessing:
        mean, std = spec.preprocessing["mean"], spec.preprocessing["std"]
    elif spec.is_timm:
        config = getattr(getattr(encoder, "model", encoder), "pretrained_cfg", None) or {}
        mean, std = config.get("mean", mean), config.get("std", std)
    elif spec.weights is not None and hparams["mean"] is None:
        settings = smp.encoders.get_preprocessing_params(spec.name, spec.weights)
        top = settings["input_range"][1]
        mean, std = ([value / top for value in settings[key]] for key in ("mean", "std"))
    given = {key: hparams[key] for key in ("mean", "std") if hparams[key] is not None}
    for key, values in given.items():
        if len(values) != channels:
            raise ValueError(f"{key}={list(values)} must have one number per channel, in_channels={channels}")
    # more or fewer channels than the defaults have: repeated in turn, as smp and timm do with the first weights
    defaults = {"mean": mean, "std": std}
    chosen = {
        key: given.get(key, [values[i % len(values)] for i in range(channels)]) for key, values in defaults.items()
    }
    require_finite(chosen)
    if min(chosen["std"]) <= 0:
        raise ValueError(f"std={list(chosen['std'])} must be positive")
    return [float(v) for v in chosen["mean"]], [float(v) for v in chosen["std"]]
