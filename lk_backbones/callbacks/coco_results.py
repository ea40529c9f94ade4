"""Detections as COCO results files, which pycocotools and evaluation servers read."""

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch

from lk_backbones._files import write_atomically
from lk_backbones._processes import gathered
from lk_backbones.callbacks.closing import WritingCallback
from lk_backbones.callbacks.overlays import Overlays

__all__ = ["CocoResults", "results_of"]


class CocoResults(WritingCallback):
    """Write the detections of a validation, a test or a prediction into a COCO results file.

    ``predictions.json`` is a list with one entry per detection: ``image_id``, ``category_id``, ``bbox`` (x, y, width,
    height in pixels of the original picture), ``score`` and, from mask detectors, ``segmentation`` (run lengths).
    Prediction writes it into ``<directory>``, test into ``<directory>/test``, separate validation runs into
    ``<directory>/val``. The validations during a training write nothing.

    pycocotools takes that file as it is to measure boxes. To measure masks it would take the sizes of objects from the
    boxes, so test and validation write ``predictions_masks.json`` too, the same without boxes, which gives the
    official numbers.

    Pictures of a folder are numbered from 1 in its natural order, whether anything is detected in them or not, and
    named in ``file_name``. For other tasks than detection nothing is written.

    While it runs, every process keeps the detections in ``predictions.part<process>.jsonl`` in the same folder, one
    line per picture: a list of the entries. When all is done that becomes ``predictions.json``. If the run is stopped
    or killed it stays, with all pictures until then; the next run into the same folder replaces it.

    Args:
        directory: Folder for the files; ``None`` for that of `Overlays` if it runs too, else ``predictions`` in the
            trainer's log folder.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self._folder = Path()
        self._part: IO[str] | None = None
        self._pictures = 0
        self._files: list[Path] = []

    @property
    def files(self) -> list[Path]:
        """What the current or last run has written."""
        return self._files

    def written(self) -> list[tuple[str, Path]]:
        """See `WritingCallback.written`."""
        return [("detections", file) for file in self._files]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, in all processes together; Lightning calls it."""
        overlays = next((c for c in trainer.callbacks if isinstance(c, Overlays)), None)  # type: ignore[attr-defined]
        if self.directory is not None:
            self._folder = Path(self.directory)
        elif overlays is not None:
            self._folder = overlays.find_folder(trainer)
        else:
            self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "predictions"
        self._close()
        self._part, self._pictures, self._files = None, 0, []

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
        self._keep(trainer, pl_module, "test" if trainer.state.fn == "test" else "val", batch, outputs)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the detections."""
        self._keep(trainer, pl_module, "", batch, outputs)

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

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say where the detections until then are."""
        if self._part is not None:
            self._close()
            warnings.warn(f"The detections of {self._pictures} pictures are in {self._part.name}.", stacklevel=2)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the file; Lightning calls it."""
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file out, where the callback is sent to another process."""
        return {**self.__dict__, "_part": None}

    def _close(self) -> None:
        if self._part is not None:
            self._part.close()

    def _keep(self, trainer: L.Trainer, task: Any, stage: str, batch: Any, outputs: Any) -> None:
        """Write the detections of some pictures, one line for each, so that they are safe."""
        if not _detects(task):
            return
        if self._part is None:
            path = self._folder / stage / f"predictions.part{trainer.global_rank}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._part = path.open("w", encoding="utf-8")
        for picture in task.detections(batch, outputs):
            if picture["image_id"] is None:  # processes take pictures in turn
                number = self._pictures * trainer.world_size + trainer.global_rank + 1
                picture = {**picture, "image_id": number, "file_name": picture["path"]}
            self._part.write(json.dumps(results_of(picture, task.category_ids)) + "\n")
            self._pictures += 1
        self._part.flush()

    def _write(self, trainer: L.Trainer, task: Any, stage: str) -> None:
        """Make the results files of the lines of all processes."""
        if not _detects(task):
            return
        self._close()
        part = None if self._part is None else Path(self._part.name)
        names = ["predictions.json"] + (["predictions_masks.json"] if stage and task.has_masks else [])
        files = [self._folder / stage / name for name in names]
        with ExitStack() as stack:
            opened = [stack.enter_context(write_atomically(file)) for file in files] if trainer.is_global_zero else []
            for file in opened:
                file.write(b"[")
            before = b"\n"
            for entry in _entries(part):
                for file in opened[:1]:
                    file.write(before + json.dumps(entry).encode())
                for file in opened[1:]:
                    file.write(before + json.dumps({k: v for k, v in entry.items() if k != "bbox"}).encode())
                before = b",\n"
            for file in opened:
                file.write(b"\n]\n")
        self._files += files if trainer.is_global_zero else []
        trainer.strategy.barrier()
        if part is not None:
            part.unlink()
            self._part = None


def _detects(task: Any) -> bool:
    """Return whether a task answers for detections, as `DetectionTask` does."""
    return callable(getattr(task, "detections", None))


def results_of(prediction: dict[str, Any], category_ids: list[int]) -> list[dict[str, Any]]:
    """Turn the detections of a picture into entries of a COCO results file.

    Args:
        prediction: ``boxes (N, 4)`` in xyxy, ``labels (N,)`` from 1, ``scores (N,)``, ``image_id``; from mask detectors
            ``segmentation``, a list of run lengths; ``file_name`` if the entries shall have it.
        category_ids: Id of every class, that of label 1 first.

    Returns:
        One entry per detection, plain values only. Numbers are not rounded, so that they give the very metrics.
    """
    corner, opposite = prediction["boxes"].split(2, dim=1)
    boxes = torch.cat([corner, opposite - corner], dim=1).tolist()
    entries: list[dict[str, Any]] = []
    for i, (label, score) in enumerate(zip(prediction["labels"].tolist(), prediction["scores"].tolist(), strict=True)):
        entry = {"image_id": prediction["image_id"]}
        if "file_name" in prediction:
            entry["file_name"] = prediction["file_name"]
        entry |= {"category_id": category_ids[label - 1], "bbox": boxes[i], "score": score}
        if "segmentation" in prediction:
            entry["segmentation"] = prediction["segmentation"][i]
        entries.append(entry)
    return entries


# Pictures whose detections are sent from process to process together.
_AT_ONCE = 256


def _entries(part: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the entries of all processes, each of which has some lines in a file of its own; all run through it."""
    with ExitStack() as stack:
        lines = iter(()) if part is None else iter(stack.enter_context(part.open(encoding="utf-8")))
        while True:
            blocks = gathered(list(islice(lines, _AT_ONCE)))
            if not any(blocks):
                return
            for line in chain.from_iterable(blocks):
                yield from json.loads(line)
