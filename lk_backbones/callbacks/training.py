"""What one wants to be sure of while a task runs: that it is like its recipe, and goes on exactly where it stopped."""

import os
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["ReproducibleSteps", "SamplesSeen"]


class SamplesSeen(L.Callback):
    """Warn when a run sees other batches, or more or fewer samples, than its recipe was made for.

    Copying a recipe's steps to fewer devices trains on a fraction of its samples, the most common reason for not
    reaching a published number.

    Args:
        expected_batch_size: Samples per optimiser step in the recipe: devices x batch size x accumulation.
        expected_samples: Samples seen in the whole training, if the recipe fixes them.
    """

    def __init__(self, expected_batch_size: int, expected_samples: int | None = None) -> None:
        if expected_batch_size < 1 or (expected_samples is not None and expected_samples < 1):
            raise ValueError(
                f"expected_batch_size={expected_batch_size} and expected_samples={expected_samples} must be positive"
            )
        self.expected_batch_size = expected_batch_size
        self.expected_samples = expected_samples

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the run with the recipe and warn, naming what to change."""
        per_device = _batch_size(trainer.train_dataloader)
        if per_device is None or getattr(trainer, "fast_dev_run", False):
            return
        devices, accumulation = trainer.world_size, trainer.accumulate_grad_batches
        batch_size = devices * per_device * accumulation
        expected, lr = self.expected_batch_size, pl_module.hparams.get("lr")
        if batch_size != expected:
            ratio = batch_size / expected
            remedies = []
            if expected % (devices * per_device) == 0:
                remedies.append(f"set accumulate_grad_batches={expected // (devices * per_device)}")
            if expected % (devices * accumulation) == 0:
                remedies.append(f"set the batch size per device to {expected // (devices * accumulation)}")
            if lr is not None:
                remedies.append(
                    f"keep it and scale the learning rate to lr={lr * ratio:.3g} and the steps to "
                    f"{1 / ratio:.3g} times the recipe's"
                )
            rank_zero_warn(
                f"the recipe is made for {expected} samples per optimiser step, this run has {batch_size} "
                f"({devices} devices x {per_device} per device x {accumulation} accumulated): {'; or '.join(remedies)}"
            )
        samples = int(trainer.estimated_stepping_batches * batch_size)
        if self.expected_samples is not None and abs(samples - self.expected_samples) > 0.01 * self.expected_samples:
            steps = round(self.expected_samples / batch_size)
            rank_zero_warn(
                f"the recipe trains on {self.expected_samples} samples, this run on {samples}: set the trainer's "
                f"max_steps={steps} (with {batch_size} samples per step)"
            )


def _batch_size(dataloader: Any) -> int | None:
    sampler = getattr(dataloader, "batch_sampler", None)
    return getattr(dataloader, "batch_size", None) or getattr(sampler, "batch_size", None)


class ReproducibleSteps(L.Callback):
    """Seed torch before every training batch, from the run's seed, the batch's position and the process.

    A run that is resumed from a checkpoint in the middle of an epoch then draws the same drop-path and dropout masks as
    an undisturbed one. The order of the data is the data module's concern.

    Args:
        seed: ``None`` takes that of ``seed_everything``.

    Raises:
        ValueError: At the start, if no seed was set.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is a seed."""
        self._seed()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed the generators of the CPU and of all accelerators."""
        entropy = (self._seed(), trainer.global_step, batch_idx, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def _seed(self) -> int:
        seed = self.seed if self.seed is not None else os.environ.get("PL_GLOBAL_SEED")
        if seed is None:
            raise ValueError("ReproducibleSteps needs a seed: call seed_everything, or pass seed=…")
        return int(seed)
