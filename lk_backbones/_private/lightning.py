"""Private parts of Lightning."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lk_backbones._private.borrow import borrow

__all__ = ["CheckpointBlindCLI", "averaged_models"]

# What is overridden below must be what Lightning calls.
borrow("lightning", "lightning.pytorch.cli", "LightningCLI._parse_ckpt_path")


class CheckpointBlindCLI(LightningCLI):
    """Lightning's command line, which would otherwise hand what a checkpoint says to its instantiators."""

    def _parse_ckpt_path(self) -> None:
        pass


def averaged_models(callbacks: Iterable[Any]) -> list[nn.Module]:
    """Return the models in which Lightning's callbacks average the weights of the one that is trained.

    Args:
        callbacks: The trainer's.

    Returns:
        One for each callback that averages, whose parameters have the names that they have in the trained one.

    Raises:
        ImportError: If the installed release keeps them elsewhere.
    """
    models = []
    for callback in callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            if not hasattr(callback, "_average_model"):
                raise ImportError(
                    f"lk_backbones needs {type(callback).__name__}._average_model, which is not public and which the "
                    f"installed lightning no longer has. Install an earlier lightning, or a later lk-backbones"
                )
            model = callback._average_model
            models.append(model.module if isinstance(model, AveragedModel) else model)
    return [model for model in models if model is not None]
