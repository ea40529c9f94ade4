"""What one wants to see and to be sure of while a task runs: pictures, tables, recipe checks, exact resumption.

Drawing and printing live here and never in a task's steps.
"""

import os
from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from rich.console import Console
from rich.table import Table

from lk_backbones.tasks.drawing import draw_panels, fit_size, label_map_image, overlay, save_png, to_rgb
from lk_backbones.tasks.segmentation import SegmentationTask

__all__ = ["IoUTable", "ReproducibleSteps", "SamplesSeen", "SegmentationOverlays"]


class SegmentationOverlays(L.Callback):
    """Draw image, truth and prediction side by side, for the logger and into a folder.

    Validation and test: some pictures, evenly spread over the data (those of the first process), in
    ``<directory>/val/step_<step>/`` and ``<directory>/test/``, with the IoU of every class in that picture.
    Prediction: every picture, its label map in ``<directory>/label_maps/`` (a PNG file of class indices, 8 bit up to
    256 classes, else 16 bit) and the overlay in ``<directory>/overlays/``.

    Args:
        directory: Folder for the pictures; ``None`` for ``overlays`` in the trainer's log folder.
        num_pictures: Pictures per validation or test.
        opacity: Of the classes' colours over the image, 0 to 1.
        log: Whether to hand the pictures to the logger too.
    """

    def __init__(
        self, directory: str | None = None, num_pictures: int = 4, opacity: float = 0.6, log: bool = True
    ) -> None:
        if num_pictures < 0 or not 0 <= opacity <= 1:
            raise ValueError(f"num_pictures={num_pictures} must be at least 0 and opacity={opacity} in [0, 1]")
        self.directory = directory
        self.num_pictures = num_pictures
        self.opacity = opacity
        self.log = log
        self._folder = Path()
        self._taken: dict[str, str] = {}

    @property
    def folder(self) -> Path:
        """Where the pictures of the current or last run are."""
        return self._folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, in all processes together; Lightning calls it."""
        if not isinstance(pl_module, SegmentationTask):
            raise TypeError(f"SegmentationOverlays draws a SegmentationTask, not {type(pl_module).__name__}")
        self._folder = Path(self.directory or Path(trainer.log_dir or trainer.default_root_dir) / "overlays")
        self._taken.clear()

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
        """Write label map and overlay of every picture in the batch."""
        for image, path, label_map in zip(batch["image"], outputs["path"], outputs["label_map"], strict=True):
            name = self._unique_name(path)
            labels = label_map_image(label_map, pl_module.hparams["num_classes"])
            save_png(labels, self._folder / "label_maps" / f"{name}.png")
            figure = self._figure(pl_module, image, {"Prediction": label_map}, path)
            save_png(figure, self._folder / "overlays" / f"{name}.png")

    def _draw_chosen(
        self,
        trainer: L.Trainer,
        task: SegmentationTask,
        outputs: Any,
        batch: dict[str, Any],
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
        for i in range(min(per_batch, len(batch["image"]))):
            path = str(batch["path"][i]) if batch.get("path") else f"batch_{batch_idx}_{i}"
            maps = {"Truth": batch["mask"][i], "Prediction": outputs["label_map"][i]}
            figure = self._figure(task, batch["image"][i], maps, path)
            name = self._unique_name(path)
            save_png(figure, self._folder / folder / f"{name}.png")
            if self.log:
                _log_picture(trainer, f"{folder.split('/')[0]}/{name}", figure)

    def _figure(
        self, task: SegmentationTask, image: torch.Tensor, maps: dict[str, torch.Tensor], path: str
    ) -> Image.Image:
        """Panels of the image and of every label map over it, with the classes that occur, most frequent first."""
        height, width = next(iter(maps.values())).shape
        picture = to_rgb(image).resize(fit_size((width, height)), Image.Resampling.BICUBIC)
        colors, names = task.class_colors, task.class_names
        drawn = [(title, overlay(picture, labels, colors, self.opacity)) for title, labels in maps.items()]
        labels = torch.cat([label_map.flatten().cpu().long() for label_map in maps.values()])
        is_class = (labels >= 0) & (labels < len(names))
        counts = torch.bincount(labels[is_class], minlength=len(names))
        order = [c for c in counts.argsort(descending=True).tolist() if counts[c]]
        ious = _ious(maps["Truth"], maps["Prediction"], len(names)) if "Truth" in maps else None
        legend = [(names[c] if ious is None else f"{names[c]}  {100 * ious[c]:.0f} %", colors[c]) for c in order]
        # first, so that it is not cut off a long legend
        entries: list[tuple[str, Any]] = [*legend] if is_class.all() else [("ignored", None), *legend]
        caption = f"{Path(path).name}, {width} x {height}" + (
            ", IoU in this picture by class" if ious is not None else ""
        )
        return draw_panels([("Image", picture), *drawn], entries, caption)

    def _unique_name(self, path: str) -> str:
        """The picture's file name without suffix; with its folder's name or a number if another one has it already."""
        stem, parent = Path(path).stem, Path(path).parent.name
        for name in chain([stem, f"{parent}_{stem}"], (f"{parent}_{stem}_{i}" for i in count(2))):
            if self._taken.setdefault(name, path) == path:
                return name
        raise AssertionError("unreachable: the numbers do not end")


def _ious(truth: torch.Tensor, prediction: torch.Tensor, num_classes: int) -> list[float]:
    counted = (truth >= 0) & (truth < num_classes)
    pairs = truth[counted].cpu().long() * num_classes + prediction[counted].cpu().long()
    matrix = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes).double()
    hits = matrix.diagonal()
    return (hits / (matrix.sum(0) + matrix.sum(1) - hits).clamp(min=1)).tolist()


def _log_picture(trainer: L.Trainer, tag: str, figure: Image.Image) -> None:
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):  # Weights & Biases, and those that follow it
            logger.log_image(tag, [figure], step=trainer.global_step)
        elif hasattr(experiment, "add_image"):  # TensorBoard
            experiment.add_image(tag, np.array(figure), trainer.global_step, dataformats="HWC")


class IoUTable(L.Callback):
    """Print the IoU of every class, mean IoU and pixel accuracy at the end of a training, a validation or a test.

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
        if not self.every_validation and "val/mean_iou" in trainer.callback_metrics:
            self._print(trainer, pl_module, "val")

    def _print(self, trainer: L.Trainer, task: Any, stage: str) -> None:
        if trainer.is_global_zero:
            Console().print(self.table(trainer.callback_metrics, task.class_names, stage))

    @staticmethod
    def table(metrics: dict[str, Any], class_names: list[str], stage: str) -> Table:
        """Make the table from logged metrics.

        Args:
            metrics: ``trainer.callback_metrics``.
            class_names: Names of the classes.
            stage: ``"val"`` or ``"test"``.

        Returns:
            A table; classes that occur nowhere show a dash.
        """
        table = Table(title={"val": "Validation", "test": "Test"}[stage], show_footer=True)
        table.add_column("class", footer="mean IoU\npixel accuracy")
        footer = "\n".join(f"{100 * float(metrics[f'{stage}/{key}']):.2f}" for key in ("mean_iou", "pixel_accuracy"))
        table.add_column("IoU %", justify="right", footer=footer)
        for name in class_names:
            iou = float(metrics[f"{stage}/iou/{name}"])
            table.add_row(name, "–" if np.isnan(iou) else f"{100 * iou:.2f}")
        return table


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
