"""What every task shares: encoder arguments, normalisation, optimiser and schedule, safe checkpoints."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import lightning as L
import segmentation_models_pytorch as smp
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from typing_extensions import Self

from lk_backbones.tasks.encoder import EncoderSpec, resolve_encoder
from lk_backbones.tasks.optim import encoder_lr_scales, parameter_groups, warmup_poly_scheduler

__all__ = ["BaseTask", "without_encoder_weights"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

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


class BaseTask(L.LightningModule):
    """Base of the tasks: a network around an encoder, trained by the published recipes.

    A subclass stores its constructor's arguments with ``save_hyperparameters()``. Among them are, with the same names
    in every task: ``encoder``, ``encoder_weights``, ``encoder_kwargs``, ``in_channels``, ``num_classes``, ``mean``,
    ``std``, ``freeze_encoder``, ``gradient_checkpointing``, ``optimizer``, ``lr``, ``momentum``, ``weight_decay``,
    ``layer_decay``, ``warmup_steps``, ``warmup_ratio``, ``power`` and ``min_lr``.
    """

    image_mean: torch.Tensor
    image_std: torch.Tensor

    @property
    def encoder(self) -> nn.Module:
        """The smp encoder inside the network."""
        raise NotImplementedError

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
            ValueError: If gradient checkpointing is asked of an encoder that has none, or mean and std do not fit.
        """
        if self.hparams["gradient_checkpointing"]:
            _checkpoint_gradients(self.encoder, spec)
        if self.hparams["freeze_encoder"]:
            self.encoder.requires_grad_(False).eval()
        mean, std = _mean_and_std(self.encoder, spec, self.hparams)
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
        scales, exempt = encoder_lr_scales(self.encoder, hparams.layer_decay, hparams.encoder_kwargs)
        prefix = next(name for name, module in self.named_modules() if module is self.encoder) + "."
        groups = parameter_groups(
            self,
            hparams.lr,
            hparams.weight_decay,
            {prefix + name: scale for name, scale in scales.items()},
            {prefix + name for name in exempt},
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
        scheduler = warmup_poly_scheduler(
            optimizer,
            int(total_steps),
            hparams.warmup_steps,
            hparams.warmup_ratio,
            hparams.power,
            hparams.min_lr / hparams.lr,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- data -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compare the data module with the task before anything runs.

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

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Rebuild a task from a checkpoint alone, without the network or the file of its encoder weights.

        Args:
            checkpoint_path: Path, URL or file object.
            *args: As `lightning.LightningModule.load_from_checkpoint`.
            **kwargs: As there; unknown ones replace hyper-parameters.

        Returns:
            The task, in training mode as every new module: call ``eval()`` before using it without a trainer.

        Raises:
            FileNotFoundError: If there is no such file.
            RuntimeError: If the checkpoint's weights are not those of the network that its hyper-parameters describe.
        """
        if isinstance(checkpoint_path, str | os.PathLike) and "://" not in str(checkpoint_path):
            path = Path(checkpoint_path)
            if not path.is_file():
                raise FileNotFoundError(f"there is no checkpoint '{path}'")
        kwargs.setdefault("weights_only", True)  # a checkpoint may come from anywhere: never unpickle arbitrary objects
        with without_encoder_weights():
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, as `torch.nn.Module.load_state_dict`, with an error that says what does not fit.

        Raises:
            RuntimeError: If a shape differs or, when strict, a key is missing or unknown: with the first of each.
        """
        own = self.state_dict()
        problems = {
            "missing": [key for key in own if key not in state_dict] if strict else [],
            "unknown": [key for key in state_dict if key not in own] if strict else [],
            "of another shape": [
                f"{key} {tuple(state_dict[key].shape)} instead of {tuple(own[key].shape)}"
                for key in own
                if key in state_dict and own[key].shape != state_dict[key].shape
            ],
        }
        if any(problems.values()):
            lines = [f"{len(keys)} {kind}, first {keys[:5]}" for kind, keys in problems.items() if keys]
            described = {k: self.hparams[k] for k in ("architecture", "encoder", "num_classes") if k in self.hparams}
            raise RuntimeError(
                f"the checkpoint holds another model than {type(self).__name__}({described}): {'; '.join(lines)}"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _checkpoint_gradients(encoder: nn.Module, spec: EncoderSpec) -> None:
    if not spec.is_timm:
        raise ValueError(
            f"gradient_checkpointing: '{spec.name}' is an encoder of smp's own, which cannot; use a 'tu-…' encoder"
        )
    network: Any = encoder.model  # timm's feature extractor
    stages = [m for m in network.modules() if m is not network and hasattr(m, "grad_checkpointing")]
    for stage in stages:
        stage.grad_checkpointing = True
    if not stages:  # whole children of the extractor at a time
        network.set_grad_checkpointing(True)


def _mean_and_std(encoder: nn.Module, spec: EncoderSpec, hparams: Any) -> tuple[list[float], list[float]]:
    """The arguments ``mean`` and ``std``, else those of the encoder's weights, else ImageNet's."""
    channels = hparams["in_channels"]
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    if spec.preprocessing:
        mean, std = spec.preprocessing["mean"], spec.preprocessing["std"]
    elif spec.is_timm:
        config = getattr(encoder.model, "pretrained_cfg", None) or {}
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
    if min(chosen["std"]) <= 0:
        raise ValueError(f"std={list(chosen['std'])} must be positive")
    return [float(v) for v in chosen["mean"]], [float(v) for v in chosen["std"]]
