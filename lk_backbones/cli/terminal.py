"""What a training says in the terminal: what is news to its user, in the form of the other messages."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import get_human_readable_count, summarize
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lk_backbones._printing import printable

__all__ = ["ParameterSummary", "only_news"]

# Messages of these beginnings, whole, tell of things that nobody asked for and nobody has to know.
_NO_NEWS = re.compile(
    r"💡 Tip: "  # advertisements
    r"|TPU available: False, "
    r"|Loading `train_dataloader` to estimate number of stepping batches"
    r"|(\[rank: \d+\] )?Seed set to \d+$"  # the configuration has it
    r"|Restoring states from the checkpoint path at "  # that they are restored is told too
)
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
_NO_WARNINGS = (
    r"LightningCLI's args parameter",  # for those who call it from Python and mix the two up
    r"No seed found, seed set to \d+$",  # also where nothing is random
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # to Lightning, by torch
)
# Of a training's checkpoints, to those who do not train.
_NO_WARNINGS_OF_EVALUATION = (
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    r"The dirpath has changed from ",
)


@contextmanager
def only_news(training: bool) -> Iterator[None]:
    """Leave out the known messages of other libraries that are no news, and print warnings like errors, on a line.

    Every other message and warning comes through. With ``LK_BACKBONES_TRACEBACK=1`` in the environment warnings say
    where they come from, as Python prints them.

    Args:
        training: Whether what runs is a training, whose checkpoints and callbacks have to go together.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_is_news)
    before = warnings.formatwarning
    with warnings.catch_warnings():
        for message in (*_NO_WARNINGS, *(() if training else _NO_WARNINGS_OF_EVALUATION)):
            warnings.filterwarnings("ignore", message=message)
        if not os.environ.get("LK_BACKBONES_TRACEBACK"):
            warnings.formatwarning = _format_warning
        try:
            yield
        finally:
            warnings.formatwarning = before
            for logger in loggers:
                logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not _NO_NEWS.match(record.getMessage())


def _format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    # lines after the first are set back, as those of errors are
    text = printable(message, newlines=True).strip().replace("\n", "\n  ")
    return f"warning: {text}\n"


class ParameterSummary(ModelSummary):
    """Print the parts of a model that have parameters.

    Lightning's own table has a row for every loss and metric, and counts operations as 0 without an example batch.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print them; Lightning calls it.

        Args:
            trainer: The trainer.
            pl_module: The model.
        """
        if not trainer.is_global_zero:
            return
        summary = summarize(pl_module)
        table = Table("part", "class", Column("parameters", justify="right"), box=box.SIMPLE)
        rows = zip(summary.layer_names, summary.layer_types, summary.param_nums, strict=True)
        for name, kind, number in rows:
            if number:
                table.add_row(Text(name), Text(kind.lstrip("_")), get_human_readable_count(number))
        if summary.trainable_parameters != summary.total_parameters:
            table.add_section()
            table.add_row("of these are trained", "", get_human_readable_count(summary.trainable_parameters))
        Console().print(table)
