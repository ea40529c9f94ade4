"""Detections as COCO results files, which pycocotools and evaluation servers read."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import distributed

from lk_backbones.tasks.detection import DetectionTask
from lk_backbones.tasks.files import write_atomically
from lk_backbones.tasks.overlays import Overlays

__all__ = ["CocoResults", "results_of"]


class CocoResults(L.Callback):
    """Write the detections of a validation, a test or a prediction into a COCO results file.

    ``predictions.json`` is a list with one entry per detection: ``image_id``, ``category_id``, ``bbox`` (x, y, width,
    height in pixels of the original picture), ``score`` and, from mask detectors, ``segmentation`` (run lengths).
    Prediction writes it into ``<directory>``, test into ``<directory>/test``, separate validation runs into
    ``<directory>/val``. The validations during a training write nothing.

    pycocotools takes that file as it is to measure boxes. To measure masks it would take the sizes of objects from the
    boxes, so test and validation write ``predictions_masks.json`` too, the same without boxes, which gives the
    official numbers.

    Pictures without an ``image_id`` are numbered from 1 and named in ``file_name``. For other tasks than detection
    nothing is written.

    Args:
        directory: Folder for the files; ``None`` for that of `Overlays` if it runs too, else ``predictions`` in the
            trainer's log folder.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self._folder = Path()
        self._results: list[dict[str, Any]] = []
        self._files: list[Path] = []

    @property
    def files(self) -> list[Path]:
        """What the current or last run has written."""
        return self._files

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, in all processes together; Lightning calls it."""
        overlays = next((c for c in trainer.callbacks if isinstance(c, Overlays)), None)  # type: ignore[attr-defined]
        if self.directory is not None:
            self._folder = Path(self.directory)
        elif overlays is not None:
            self._folder = overlays.find_folder(trainer)
        else:
            self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "predictions"
        self._results, self._files = [], []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the detections of a separate validation run."""
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the detections."""
        if isinstance(pl_module, DetectionTask):
            for target, prediction in zip(batch[1], outputs["predictions"], strict=True):
                self._results += results_of(prediction | {"image_id": target["image_id"]}, pl_module.category_ids)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the detections."""
        if isinstance(pl_module, DetectionTask):
            for prediction in outputs:
                self._results += results_of(prediction, pl_module.category_ids)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files of a separate validation run."""
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files."""
        self._write(trainer, pl_module, "test")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        self._write(trainer, pl_module, "")

    def _write(self, trainer: L.Trainer, task: L.LightningModule, stage: str) -> None:
        if not isinstance(task, DetectionTask):
            return
        results = _numbered(_gathered(self._results))
        self._results = []
        if not trainer.is_global_zero:
            return
        self._save(results, self._folder / stage / "predictions.json")
        if stage and task.has_masks:
            only_masks = [{key: value for key, value in r.items() if key != "bbox"} for r in results]
            self._save(only_masks, self._folder / stage / "predictions_masks.json")

    def _save(self, results: list[dict[str, Any]], path: Path) -> None:
        with write_atomically(path) as file:
            file.write(json.dumps(results).encode())
        self._files.append(path)


def results_of(prediction: dict[str, Any], category_ids: list[int]) -> list[dict[str, Any]]:
    """Turn the detections of a picture into entries of a COCO results file.

    Args:
        prediction: ``boxes (N, 4)`` in xyxy, ``labels (N,)`` from 1, ``scores (N,)``, ``image_id``; from mask detectors
            ``segmentation``, a list of run lengths; ``path`` if there is no ``image_id``.
        category_ids: Id of every class, that of label 1 first.

    Returns:
        One entry per detection, plain values only. Numbers are not rounded, so that they give the very metrics.
    """
    corner, opposite = prediction["boxes"].split(2, dim=1)
    boxes = torch.cat([corner, opposite - corner], dim=1).tolist()
    entries: list[dict[str, Any]] = []
    for i, (label, score) in enumerate(zip(prediction["labels"].tolist(), prediction["scores"].tolist(), strict=True)):
        entry = {"image_id": prediction["image_id"]}
        if entry["image_id"] is None:
            entry["file_name"] = prediction["path"]
        entry |= {"category_id": category_ids[label - 1], "bbox": boxes[i], "score": score}
        if "segmentation" in prediction:
            entry["segmentation"] = prediction["segmentation"][i]
        entries.append(entry)
    return entries


def _gathered(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return results
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, results)
    return [entry for part in parts for entry in part]


def _numbered(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gives pictures without an id a number."""
    names = dict.fromkeys(entry["file_name"] for entry in results if "file_name" in entry)
    numbers = {name: number for number, name in enumerate(names, start=1)}
    return [
        entry | {"image_id": numbers[entry["file_name"]]} if entry["image_id"] is None else entry for entry in results
    ]
