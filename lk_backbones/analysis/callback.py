"""How the effective receptive field grows while a network is trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from lk_backbones._files import write_atomically
from lk_backbones.analysis.erf import EffectiveReceptiveField, effective_receptive_field
from lk_backbones.analysis.levels import Level
from lk_backbones.analysis.pictures import folder_pictures, noise_pictures, scene_pictures
from lk_backbones.callbacks.closing import WritingCallback
from lk_backbones.callbacks.overlays import log_picture
from lk_backbones.drawing.canvas import save_png
from lk_backbones.drawing.heat_maps import draw_heat_maps, ratio_lines

__all__ = ["ReceptiveField"]


class ReceptiveField(WritingCallback):
    """Measure the effective receptive field every so many steps, draw it, and log the areas.

    The first process measures, before the first step, every ``every`` steps and after the last one; the others wait.
    The pictures are the same each time, one after the other is taken, and nothing of the training changes: not its
    random numbers, modes, gradients, statistics of norms.

    Written are ``<directory>/step_<step>.png`` and ``.npy`` (`EffectiveReceptiveField.contribution`), and at the end
    ``growth.png`` with all of them on one scale. Logged are the picture and ``erf/area_<percent>``, the ratios.

    Args:
        every: Optimiser steps from one measurement to the next; 0 for none at all.
        size: Side of the pictures in pixels.
        num_images: Pictures to average over.
        pictures: ``"scenes"`` (drawn), ``"noise"``, or a folder of pictures.
        level: As in `effective_receptive_field`.
        relu: As in `effective_receptive_field`.
        directory: Folder for the pictures; ``None`` for ``erf`` in the trainer's log folder.
        log: Whether to hand pictures and ratios to the logger.
    """

    def __init__(
        self,
        every: int = 0,
        size: int = 256,
        num_images: int = 4,
        pictures: str = "scenes",
        level: int | str = -1,
        relu: bool = True,
        directory: str | None = None,
        log: bool = True,
    ) -> None:
        if every < 0 or size < 1 or num_images < 1:
            raise ValueError(f"every={every} must be at least 0, size={size} and num_images={num_images} at least 1")
        self.every = every
        self.size = size
        self.num_images = num_images
        self.pictures = pictures
        self.level: Level = level
        self.relu = relu
        self.directory = directory
        self.log = log
        self._folder = Path()
        self._series: Any = None
        self._measured: dict[int, EffectiveReceptiveField] = {}
        self._last_step: int | None = None

    def written(self) -> list[tuple[str, Path]]:
        """See `WritingCallback.written`; the folder, if there is a picture in it."""
        return [("receptive", self._folder)] if self._measured else []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder and the pictures; Lightning calls it.

        Raises:
            FileNotFoundError: If there is no such folder, or no picture in it.
            ValueError: If scenes cannot be drawn so small.
        """
        self._measured, self._last_step = {}, None
        if not self.every or stage != "fit":
            return
        self._folder = Path(self.directory or Path(trainer.log_dir or trainer.default_root_dir) / "erf")
        size = (self.size, self.size)
        if self.pictures == "noise":
            self._series = noise_pictures(size, self.num_images)
        elif self.pictures == "scenes":
            self._series = scene_pictures(size, self.num_images)
        else:
            self._series = folder_pictures(self.pictures, size, self.num_images)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure before the first step, also of a training that goes on."""
        self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after every so many steps."""
        if self.every and trainer.global_step % self.every == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure after the last step, and draw the growth."""
        self._measure(trainer, pl_module)
        if self._measured and trainer.is_global_zero:
            save_png(self._growth(), self._folder / "growth.png")

    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if not self.every or not trainer.is_global_zero or step == self._last_step:
            return
        self._last_step = step
        channels = int(module.hparams.get("in_channels", 3))
        try:
            images = self._series.make(channels)
            field = effective_receptive_field(module, images, self.level, self.relu, num_images=self.num_images)
        except ValueError as error:
            if not self._measured:
                raise  # before the first step; later it is no reason to lose a training
            warnings.warn(f"the receptive field at step {step} could not be measured: {error}", stacklevel=2)
            return
        self._measured[step] = field
        figure = self._draw({step: field})
        save_png(figure, self._folder / f"step_{step:08d}.png")
        with write_atomically(self._folder / f"step_{step:08d}.npy") as file:
            np.save(file, field.contribution)
        if self.log:
            log_picture(trainer, "erf", figure)
            ratios = {f"erf/area_{100 * share:g}": area for share, area in field.ratios.items()}
            for logger in trainer.loggers:
                logger.log_metrics(ratios, step=step)

    def _growth(self) -> Image.Image:
        steps = sorted(self._measured)
        # evenly spread, the first and the last among them
        places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 12)).round().astype(int))
        return self._draw({steps[place]: self._measured[steps[place]] for place in places})

    def _draw(self, fields: dict[int, EffectiveReceptiveField]) -> Image.Image:
        panels = [(f"step {step}", field.matrix, ratio_lines(field.ratios)) for step, field in fields.items()]
        last = next(reversed(fields.values()))
        caption = f"{last.level}, {self._series.description} of {self.size} x {self.size}"
        return draw_heat_maps(panels, caption, "log10(1 + contribution) / its maximum")
