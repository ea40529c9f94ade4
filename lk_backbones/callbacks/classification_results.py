"""What a classifier found, as a table that spreadsheets read, sheets of pictures, and the confusion matrix."""

import csv
import io
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import IO, Any

import lightning as L
from PIL import Image

from lk_backbones._files import write_atomically
from lk_backbones._processes import gathered
from lk_backbones.callbacks.closing import WritingCallback
from lk_backbones.callbacks.overlays import Overlays
from lk_backbones.drawing.canvas import save_png
from lk_backbones.drawing.classes import draw_confusion, draw_sheet

__all__ = ["ClassificationResults"]

#: Rows that are sent from process to process together.
_AT_ONCE = 1024


class ClassificationResults(WritingCallback):
    """Write what a classifier finds.

    Prediction writes into ``<directory>``, test into ``<directory>/test``, separate validation runs into
    ``<directory>/val``, and a training at its end into ``<directory>/val``:

    - ``predictions.csv`` (not after a training): one row per picture: ``file``, ``truth`` if it is known, and the five
      best classes with their probabilities, the best first. It is UTF-8.
    - ``contact_sheet_001.png`` and so on, of a prediction: all pictures with their five best classes, as the network
      sees them: cropped.
    - ``confusion_matrix.png``, where there are labels: what is taken for what, and the accuracy of every class.

    While it runs, every process keeps its rows in ``predictions.part<process>.csv`` in the same folder. When all is
    done they become ``predictions.csv``. If the run is stopped or killed they stay, with all pictures until then; the
    next run into the same folder replaces them. For other tasks than classification nothing is written.

    Args:
        directory: Folder for the files; ``None`` for that of `Overlays` if it runs too, else ``predictions`` in the
            trainer's log folder.
        pictures_per_sheet: Pictures on a contact sheet; 0 for no sheets.
        columns: Pictures in a row of a sheet.
    """

    def __init__(self, directory: str | None = None, pictures_per_sheet: int = 24, columns: int = 6) -> None:
        if pictures_per_sheet < 0 or columns < 1:
            raise ValueError(
                f"pictures_per_sheet={pictures_per_sheet} must be at least 0 and columns={columns} at least 1"
            )
        self.directory = directory
        self.pictures_per_sheet = pictures_per_sheet
        self.columns = columns
        self._folder = Path()
        self._part: IO[str] | None = None
        self._has_truth = False
        self._rows = 0
        self._cells: list[Image.Image] = []
        self._sheets = 0
        self._written: list[tuple[str, Path]] = []

    @property
    def files(self) -> list[Path]:
        """What the current or last run has written, apart from sheets after the first."""
        return [path for _, path in self._written]

    def written(self) -> list[tuple[str, Path]]:
        """See `WritingCallback.written`."""
        return self._written

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
        self._part, self._rows, self._sheets = None, 0, 0
        self._cells, self._written = [], []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the rows of a separate validation run."""
        if trainer.state.fn == "validate":
            self._keep(trainer, pl_module, "val", batch, outputs, batch_idx)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the rows."""
        self._keep(trainer, pl_module, "test", batch, outputs, batch_idx)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the rows, and draw the pictures."""
        if not _classifies(pl_module):
            return
        self._keep(trainer, pl_module, "", batch, outputs, batch_idx)
        if not self.pictures_per_sheet:
            return
        figures: Any = pl_module.figures()
        for i, path in enumerate(figures.paths(batch, f"batch_{batch_idx}")):
            self._cells.append(figures.cell(batch, outputs, i, path))
            if len(self._cells) == self.pictures_per_sheet:
                self._write_sheet(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files of a separate validation run."""
        if trainer.state.fn == "validate" and _classifies(pl_module):
            self._write_table(trainer, pl_module, "val")
            self._write_confusion(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files."""
        if _classifies(pl_module):
            self._write_table(trainer, pl_module, "test")
            self._write_confusion(trainer, pl_module, "test")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table and the last sheet."""
        if _classifies(pl_module):
            self._write_table(trainer, pl_module, "")
            if self._cells:
                self._write_sheet(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the confusion matrix of the last validation."""
        if _classifies(pl_module):
            self._write_confusion(trainer, pl_module, "val")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say where the rows until then are."""
        if self._part is not None:
            self._close()
            warnings.warn(f"The classes of {self._rows} pictures are in {self._part.name}.", stacklevel=2)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the file; Lightning calls it."""
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file out, where the callback is sent to another process."""
        return {**self.__dict__, "_part": None}

    def _close(self) -> None:
        if self._part is not None:
            self._part.close()

    def _keep(self, trainer: L.Trainer, task: Any, stage: str, batch: Any, outputs: Any, batch_idx: int) -> None:
        """Write the rows of some pictures, so that they are safe."""
        if not _classifies(task):
            return
        if self._part is None:
            path = self._folder / stage / f"predictions.part{trainer.global_rank}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            # names of files may hold bytes that are no text
            self._part = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        unnamed = f"batch_{batch_idx}" if trainer.world_size == 1 else f"process_{trainer.global_rank}_{batch_idx}"
        writer, names = csv.writer(self._part), task.class_names
        for picture in task.classified(batch, outputs, unnamed):
            self._has_truth = "label" in picture
            row = [picture["path"], *([names[picture["label"]]] if self._has_truth else [])]
            for index, probability in zip(picture["classes"], picture["probabilities"], strict=True):
                row += [names[index], f"{probability:.6g}"]
            writer.writerow(row)
            self._rows += 1
        self._part.flush()

    def _write_table(self, trainer: L.Trainer, task: Any, stage: str) -> None:
        """Make one table of the rows of all processes, in the order of the pictures, which they take in turn."""
        self._close()
        part = None if self._part is None else Path(self._part.name)
        has_truth = any(gathered(self._has_truth))
        best = min(5, len(task.class_names))
        header = ["file", *(["truth"] if has_truth else [])]
        header += [f"{key}_{place}" for place in range(1, best + 1) for key in ("class", "probability")]
        path = self._folder / stage / "predictions.csv"
        with ExitStack() as stack:
            file = stack.enter_context(write_atomically(path)) if trainer.is_global_zero else None
            for line in chain([_line(header)], _lines(part)):
                if file is not None:
                    file.write(line)
        if trainer.is_global_zero:
            self._written.append(("classes", path))
        trainer.strategy.barrier()
        if part is not None:
            part.unlink()
            self._part = None

    def _write_sheet(self, trainer: L.Trainer) -> None:
        self._sheets += 1
        process = f"process_{trainer.global_rank}_" if trainer.world_size > 1 else ""
        path = self._folder / f"contact_sheet_{process}{self._sheets:03d}.png"
        save_png(draw_sheet(self._cells, self.columns), path)
        self._cells = []
        if self._sheets == 1:
            self._written.append(("sheets", path))

    def _write_confusion(self, trainer: L.Trainer, task: Any, stage: str) -> None:
        matrix = task.measured.get("confusion")
        if not trainer.is_global_zero or matrix is None or not len(matrix) or not matrix.sum():
            return
        path = self._folder / stage / "confusion_matrix.png"
        pictures, top1 = int(matrix.sum()), 100 * float(task.measured["top1"])
        save_png(draw_confusion(matrix.numpy(), task.class_names, f"{pictures} pictures, top-1 {top1:.2f} %"), path)
        self._written.append(("matrix", path))


def _classifies(task: Any) -> bool:
    """Return whether a task answers for the classes of pictures, as `ClassificationTask` does."""
    return callable(getattr(task, "classified", None))


def _line(row: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerow(row)
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def _lines(part: Path | None) -> Iterator[bytes]:
    """Yield the rows of all processes in turn, each of which has some in a file of its own; all run through it."""
    with ExitStack() as stack:
        rows: Iterator[list[str]] = iter(())
        if part is not None:
            file = stack.enter_context(part.open(encoding="utf-8", errors="surrogateescape", newline=""))
            rows = csv.reader(file)
        while True:
            blocks = gathered(list(islice(rows, _AT_ONCE)))
            if not any(blocks):
                return
            for turn in zip_longest(*blocks):
                yield from (_line(row) for row in turn if row is not None)
