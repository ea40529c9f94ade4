"""Results in the terminal."""

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from lk_backbones._printing import any_text_can_be_printed

__all__ = ["MetricsTable"]


class MetricsTable(L.Callback):
    """Print a table of results at the end of a training, a validation or a test.

    For a `SegmentationTask` the IoU of every class, mean IoU and pixel accuracy; for a `DetectionTask` COCO's twelve
    numbers and, if the task measures it, the AP of every class; for a `ClassificationTask` top-1 and top-5.

    Args:
        every_validation: Print after each validation during training too.
    """

    def __init__(self, every_validation: bool = False) -> None:
        self.every_validation = every_validation

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table, if it is not that of a validation during training or those are wanted."""
        during_training = trainer.state.fn == TrainerFn.FITTING
        if not trainer.sanity_checking and (self.every_validation or not during_training):
            self._print(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table of the test."""
        self._print(trainer, pl_module, "test")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table of the last validation, if there was one."""
        if not self.every_validation and any(key.startswith("val/") for key in trainer.callback_metrics):
            self._print(trainer, pl_module, "val")

    def _print(self, trainer: L.Trainer, task: Any, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        make = getattr(task, "results_table", None)
        if callable(make):  # a task of somebody else's has none
            with any_text_can_be_printed():
                Console().print(make(trainer.callback_metrics, stage))
