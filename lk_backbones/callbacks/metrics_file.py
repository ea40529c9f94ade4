"""A run's last metrics in a file, for programs."""

import json
import math
from pathlib import Path

import lightning as L

from lk_backbones._files import write_atomically
from lk_backbones.callbacks.shape_decisions import ShapeDecisions

__all__ = ["MetricsFile"]


class MetricsFile(L.Callback):
    """Write what a training logged last into a JSON file, once it is over; what was interrupted leaves none.

    The file holds an object of numbers: every metric by its name, and ``shape_decisions``, the share that
    `ShapeDecisions` has measured if it is among the callbacks. What is not finite is ``null``.

    Args:
        path: The file; it appears at once, whole, and replaces one that is there.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write it; Lightning calls it after everything else, and not after an error."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ShapeDecisions):
                metrics["shape_decisions"] = callback.share
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with write_atomically(self.path) as file:
            file.write(json.dumps(finite, indent=2).encode())
