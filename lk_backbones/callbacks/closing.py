"""The last lines of a run: where to find what it has left on the disk."""

import os
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lk_backbones._printing import any_text_can_be_printed, printable

__all__ = ["ClosingLines", "WritingCallback"]


class WritingCallback(L.Callback):
    """Base of the callbacks that leave something on the disk for whoever started the run."""

    def written(self) -> list[tuple[str, Path]]:
        """Tell what the current or last run has written, as pairs of what it is and where, for `ClosingLines`."""
        raise NotImplementedError


class ClosingLines(L.Callback):
    """Name what a run has left on the disk, when it ends: pictures, results files, the best checkpoint.

    Every task brings it along, so that a script ends as the command line does. The first process prints, once per
    `fit`, `validate`, `test` or `predict`; a run that fails names nothing.
    """

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the lines; all files are written by now."""
        if not trainer.is_global_zero:
            return
        writers = [c for c in trainer.callbacks if isinstance(c, WritingCallback)]  # type: ignore[attr-defined]
        found = [(kind, str(path)) for writer in writers for kind, path in writer.written()]
        if trainer.state.fn == "fit":
            keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
            paths = dict.fromkeys(keeper.best_model_path or keeper.last_model_path for keeper in keepers)
            found += [("checkpoint", _from_here(path)) for path in paths if path]
        with any_text_can_be_printed():
            for kind, path in found:
                print(f"{kind + ':':<11} {printable(path)}")


def _from_here(path: str) -> str:
    """Return a path as one would type it in the current folder; addresses, and paths on another drive, as they are."""
    try:
        return path if "://" in path else os.path.relpath(path)
    except ValueError:
        return path
