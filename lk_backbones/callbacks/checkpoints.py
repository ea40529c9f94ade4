"""Checkpoints that survive what ends a run: a kill, a full disk, a request to terminate."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lk_backbones._files import UNFINISHED, write_atomically
from lk_backbones.weights.arguments import shorten
from lk_backbones.weights.errors import WeightsError

__all__ = ["AtomicCheckpointIO", "SafeCheckpoints"]

#: Age in seconds at which an unfinished file is taken for one that nobody writes any more.
_ABANDONED = 24 * 60 * 60

#: What a shell reports of a process that SIGTERM has ended.
_TERMINATED = 128 + signal.SIGTERM


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save checkpoints so that a file is replaced once the new one is on the disk, and not before.

    Lightning's own plugin writes to the temporary folder and moves the file, which overwrites the earlier one in place
    if that folder is another file system. This one writes beside the earlier file, under a name that nothing takes for
    a checkpoint, and without a second copy in memory. The disk must hold one checkpoint more. Remote paths
    (``s3://…``) go Lightning's way.

    `SafeCheckpoints` brings it along; with other tasks than ours: ``Trainer(plugins=[AtomicCheckpointIO()])``. To save
    in the background, wrap it: ``Trainer(plugins=[AsyncCheckpointIO(AtomicCheckpointIO())])``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: What to save.
            path: File to save it in.
            storage_options: Not supported, as in Lightning.

        Raises:
            OSError: If it cannot be written. The earlier file is still there then, and nothing else.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            with write_atomically(path, durable=True) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch says of a failed write only that it is somewhere else in the file than expected
            reason = next((cause for cause in _causes(error) if isinstance(cause, OSError)), None)
            if reason is None:
                raise
            raise OSError(
                f"the checkpoint {path} cannot be saved: {reason}. Earlier checkpoints are as they were."
            ) from error
        _remove_abandoned(path.parent)


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed while saving have left behind."""
    for file in folder.glob(UNFINISHED):
        try:
            if time.time() - file.stat().st_mtime > _ABANDONED:
                file.unlink()
        except OSError:
            pass  # another process was faster, or owns it


class SafeCheckpoints(L.Callback):
    """Save checkpoints atomically, and one more when the run is asked to terminate. Every task brings it along.

    Checkpoints are written by `AtomicCheckpointIO`, unless the trainer was given a plugin of its own for that.

    On SIGTERM (a cluster's time limit, ``docker stop``, ``timeout``) Lightning ends after the running batch, but saves
    nothing and reports success. This callback saves a checkpoint to go on from, in place of ``last.ckpt`` where
    `ModelCheckpoint` keeps one, else beside its checkpoints, and lets the process end with the exit status 143. The
    resumed run ends with the weights of an undisturbed one, if the signal does not come between two steps of an
    accumulation: gradients are not saved. Nothing is saved where checkpoints are switched off.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the place of Lightning's own plugin for checkpoints."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep a checkpoint from naming what a run would remove or overwrite as its own earlier checkpoints.

        `ModelCheckpoint` takes the paths of the earlier ones from the file. Lightning then removes whatever lies at
        them, folders included, if it has another protocol than ``file`` or begins with the run's folder.
        """
        states = checkpoint.get("callbacks")
        for keeper in trainer.checkpoint_callbacks:
            state = states.get(keeper.state_key) if isinstance(states, dict) else None
            if not isinstance(keeper, ModelCheckpoint) or state is None:
                continue
            if not isinstance(state, dict) or not isinstance(state.get("best_k_models", {}), dict):
                raise WeightsError(f"{trainer.ckpt_path}: its state of {type(keeper).__name__} is {shorten(state)}")
            best = state.get("best_model_path")
            state["best_model_path"] = best if _is_plain(best, keeper) or _is_of(best, keeper) else ""
            for key in ("kth_best_model_path", "last_model_path"):
                if key in state:
                    state[key] = state[key] if _is_of(state[key], keeper) else ""
            if "best_k_models" in state:
                models = state["best_k_models"]
                state["best_k_models"] = {path: score for path, score in models.items() if _is_of(path, keeper)}

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """End a prediction too if SIGTERM has come; Lightning ends all other loops."""
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save if SIGTERM has come."""
        if not isinstance(exception, SIGTERMException):
            return
        exception.code = _TERMINATED
        path = None
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = _last_path(trainer)
        if path is None:
            rank_zero_info("Terminated by SIGTERM.")
            return
        if trainer.validating:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_end(trainer, pl_module)  # gives the trained weights back
        trainer.save_checkpoint(path)
        rank_zero_info(f"Terminated by SIGTERM. To go on where the run has stopped: --ckpt_path {path}")


def _is_plain(path: object, keeper: ModelCheckpoint) -> bool:
    """Return whether a path is one of a checkpoint on this machine, and what it begins with is where it lies."""
    named = isinstance(path, str) and path.endswith(keeper.FILE_EXTENSION) and ".." not in Path(path).parts
    return named and "://" not in str(path) and "::" not in str(path)


def _is_of(path: object, keeper: ModelCheckpoint) -> bool:
    """Return whether a path is one of a checkpoint in the folder, or below the address, that a callback saves in."""
    if not isinstance(path, str) or not keeper.dirpath:
        return False
    rest = path.removeprefix(os.fspath(keeper.dirpath))
    return rest != path and rest.startswith(("/", os.sep)) and _is_plain(rest, keeper)


def _last_path(trainer: L.Trainer) -> str | None:
    """Where a run's last checkpoint belongs; to be asked in all processes together."""
    keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if not keepers:
        return None
    keeper = next((k for k in keepers if k.save_last), keepers[0])
    if keeper.last_model_path:
        return keeper.last_model_path
    version, path = 0, keeper.format_checkpoint_name({}, keeper.CHECKPOINT_NAME_LAST)
    while keeper.file_exists(path, trainer):  # an earlier run's
        version += 1
        path = keeper.format_checkpoint_name({}, keeper.CHECKPOINT_NAME_LAST, version)
    return path
