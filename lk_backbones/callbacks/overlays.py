"""Pictures of what a task does: for the logger, and into a folder."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from lk_backbones._files import OutputNames
from lk_backbones.callbacks.closing import WritingCallback
from lk_backbones.drawing.canvas import save_png
from lk_backbones.drawing.figures import Figures

__all__ = ["Overlays", "log_picture"]


class Overlays(WritingCallback):
    """Draw image, truth and prediction side by side, for the logger and into a folder.

    Validation and test: some pictures, evenly spread over the data (those of the first process), in
    ``<directory>/val/step_<step>/`` and ``<directory>/test/``. Prediction: every picture, in
    ``<directory>/overlays/``.

    Of a `SegmentationTask` the figures tell the IoU of every class in that picture, and predictions are written as
    label maps too, in ``<directory>/label_maps/`` (PNG files of class indices, 8 bit up to 256 classes, else 16 bit).
    Of a `DetectionTask` they show boxes and masks with class names and scores. Of a `ClassificationTask` the figures
    show the best classes; predictions are drawn by `ClassificationResults`.

    Args:
        directory: Folder for the pictures; ``None`` for ``overlays`` in the trainer's log folder.
        num_pictures: Pictures per validation or test.
        opacity: Of the classes' colours over the image, 0 to 1.
        log: Whether to hand the pictures to the logger too.
        score_threshold: Least score of a detection that is drawn.
    """

    def __init__(
        self,
        directory: str | None = None,
        num_pictures: int = 4,
        opacity: float = 0.6,
        log: bool = True,
        score_threshold: float = 0.3,
    ) -> None:
        if num_pictures < 0 or not 0 <= opacity <= 1:
            raise ValueError(f"num_pictures={num_pictures} must be at least 0 and opacity={opacity} in [0, 1]")
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold={score_threshold} must be in [0, 1]")
        self.directory = directory
        self.num_pictures = num_pictures
        self.opacity = opacity
        self.log = log
        self.score_threshold = score_threshold
        self._folder = Path()
        self._has_drawn = False
        self._names: dict[str, OutputNames] = {}

    @property
    def folder(self) -> Path:
        """Where the pictures of the current or last run are."""
        return self._folder

    def written(self) -> list[tuple[str, Path]]:
        """See `WritingCallback.written`; the folder, if there is a picture in it."""
        return [("pictures", self._folder)] if self._has_drawn else []

    @staticmethod
    def can_draw(module: L.LightningModule) -> bool:
        """Return whether a module tells how to draw what it does, by a method `figures` as that of `BaseTask`."""
        return callable(getattr(module, "figures", None))

    def find_folder(self, trainer: L.Trainer) -> Path:
        """Where the pictures of a run will be; to be asked in all processes together."""
        return Path(self.directory or Path(trainer.log_dir or trainer.default_root_dir) / "overlays")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder; Lightning calls it.

        Raises:
            TypeError: If nobody knows how to draw what the task does.
        """
        self._figures(pl_module)
        self._folder = self.find_folder(trainer)
        self._has_drawn = False
        self._names.clear()

    def _figures(self, task: L.LightningModule) -> Figures:
        if not self.can_draw(task):
            raise TypeError(
                f"Overlays draws a task that has a method figures(opacity, score_threshold), as SegmentationTask and "
                f"DetectionTask have; {type(task).__name__} has none"
            )
        make: Any = task.figures
        figures: Figures = make(self.opacity, self.score_threshold)
        return figures

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw a picture of the batch if it is one of the chosen ones."""
        if not trainer.sanity_checking:
            folder = f"val/step_{trainer.global_step:08d}"
            batches = trainer.num_val_batches[dataloader_idx]
            self._draw_chosen(trainer, pl_module, outputs, batch, batch_idx, batches, folder)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw a picture of the batch if it is one of the chosen ones."""
        batches = trainer.num_test_batches[dataloader_idx]
        self._draw_chosen(trainer, pl_module, outputs, batch, batch_idx, batches, "test")

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw every picture of the batch."""
        figures = self._figures(pl_module)
        unnamed = f"batch_{batch_idx}" if not dataloader_idx else f"loader_{dataloader_idx}_batch_{batch_idx}"
        if trainer.world_size > 1:
            unnamed = f"process_{trainer.global_rank}_{unnamed}"
        for i, path in enumerate(figures.paths(batch, unnamed)):
            name = self._name(trainer, path)
            for folder, picture in figures.predicted(batch, outputs, i, path).items():
                self._save(picture, folder, name)

    def _draw_chosen(
        self,
        trainer: L.Trainer,
        task: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        num_batches: int | float,
        folder: str,
    ) -> None:
        if not trainer.is_global_zero or not self.num_pictures:
            return
        # batches at equal distances; the first picture of each, then the second ones if there are too few batches
        batches = int(min(num_batches, 10**9))
        per_batch = -(-self.num_pictures // batches)
        wanted = -(-self.num_pictures // per_batch)
        if batch_idx not in {i * batches // wanted for i in range(wanted)}:
            return
        figures = self._figures(task)
        for i, path in enumerate(figures.paths(batch, f"batch_{batch_idx}")[:per_batch]):
            figure = figures.compared(batch, outputs, i, path)
            name = self._name(trainer, path)
            self._save(figure, folder, name)
            if self.log:
                log_picture(trainer, f"{folder.split('/')[0]}/{name}", figure)

    def _save(self, picture: Image.Image, folder: str, name: str) -> None:
        save_png(picture, self._folder / folder / f"{name}.png")
        self._has_drawn = True

    def _name(self, trainer: L.Trainer, path: str) -> str:
        """Name what is drawn of a picture, among all pictures of the stage, whichever process they are in."""
        stage = str(trainer.state.stage)
        if stage not in self._names:
            self._names[stage] = OutputNames(_all_paths(trainer), alone=trainer.world_size == 1)
        return self._names[stage][path]


def _all_paths(trainer: L.Trainer) -> list[str]:
    """Paths of all pictures of the running stage, as far as its data sets tell by a method ``path(index)``."""
    if trainer.predicting:
        loaders = trainer.predict_dataloaders
    else:
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    paths: list[str] = []
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        dataset: Any = getattr(loader, "dataset", None)
        if callable(getattr(dataset, "path", None)) and hasattr(dataset, "__len__"):
            paths += [str(dataset.path(i)) for i in range(len(dataset))]
    return paths


def log_picture(trainer: L.Trainer, tag: str, figure: Image.Image) -> None:
    """Hand a picture to every logger that takes pictures, under the current step."""
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):  # Weights & Biases, and those that follow it
            logger.log_image(tag, [figure], step=trainer.global_step)
        elif hasattr(experiment, "add_image"):  # TensorBoard
            experiment.add_image(tag, np.array(figure), trainer.global_step, dataformats="HWC")
