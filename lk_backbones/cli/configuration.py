"""Lightning's command line in our words: errors that begin with the mistake, and numbers that keep their type."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

import lk_backbones.data
import lk_backbones.tasks
from lk_backbones._printing import printable
from lk_backbones.cli.recipes import find_configuration
from lk_backbones.cli.terminal import ParameterSummary
from lk_backbones.data.datamodule import PictureDataModule
from lk_backbones.tasks import BaseTask
from lk_backbones.weights.errors import nearest
from lk_backbones.weights.saved import constructor_parameters, own_classes

__all__ = ["ConfigFile", "Parser", "SaveConfig", "Trainer", "reason_of"]


class SaveConfig(SaveConfigCallback):
    """Save a run's configuration into its logger's folder, and never over a file that is there.

    Without a logger Lightning takes the current folder, and several loggers name it as theirs: what is called
    ``config.yaml`` there may be the very file that the user wrote.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save it, once; see `lightning.pytorch.cli.SaveConfigCallback`.

        Args:
            trainer: The trainer.
            pl_module: Its model.
            stage: What it is about to do.
        """
        folder = trainer.log_dir if trainer.loggers and not self.already_saved else None
        if folder is None:
            return
        path = os.path.join(folder, self.config_filename)
        if trainer.strategy.broadcast(trainer.is_global_zero and get_filesystem(folder).exists(path)):
            rank_zero_warn(f"{path} exists and stays as it is: this run's configuration is not saved")
            self.already_saved = True
            return
        super().setup(trainer, pl_module, stage)


class Trainer(pl.Trainer):
    """Lightning's trainer, for which 1 batch is 1 batch on the command line, and 1.0 all of them.

    Lightning writes ``Optional[Union[int, float]]``. `typing` keeps such types in a cache of limited size in which this
    one equals ``Optional[Union[float, int]]``, so that what was imported before decides which of the two the parser
    sees, and with the second it turns 1 into 1.0. ``int | float | None`` is in no cache.

    Args:
        *args: As `lightning.pytorch.Trainer`.
        limit_train_batches: Training batches per epoch: a number, or a share if it is a float.
        limit_val_batches: Validation batches, likewise.
        limit_test_batches: Test batches, likewise.
        limit_predict_batches: Prediction batches, likewise.
        gradient_clip_val: Largest norm or value of gradients.
        callbacks: Callbacks.
        enable_model_summary: Whether to print the model's parts, by a `ParameterSummary` if no callback does.
        **kwargs: As `lightning.pytorch.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        gradient_clip_val: int | float | None = None,
        callbacks: list[pl.Callback] | pl.Callback | None = None,
        enable_model_summary: bool | None = None,
        **kwargs: Any,
    ) -> None:
        callbacks = [callbacks] if isinstance(callbacks, pl.Callback) else list(callbacks or [])
        if not (enable_model_summary is False or kwargs.get("barebones")):
            if not any(isinstance(callback, ModelSummary) for callback in callbacks):
                callbacks.append(ParameterSummary())
            enable_model_summary = False  # what there is needs no default beside it
        super().__init__(
            *args,
            callbacks=callbacks,
            enable_model_summary=enable_model_summary,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            gradient_clip_val=gradient_clip_val,
            **kwargs,
        )


class ConfigFile(ActionConfigFile):
    """``--config``, which takes a file or the name of a recipe."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read it; see `jsonargparse.ActionConfigFile`."""
        super().__call__(parser, cfg, find_configuration(values), option_string)


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are one sentence about the mistake instead of all flags and types there are."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and exit with status 2, as `argparse` does.

        With ``LK_BACKBONES_TRACEBACK=1`` in the environment jsonargparse prints everything that it knows.
        """
        if not self.exit_on_error or os.environ.get("LK_BACKBONES_TRACEBACK"):
            super().error(message, ex)  # the first is raised, and comes back here as part of a longer text
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [option for action in parser._actions for option in action.option_strings]
        command = parser.prog.replace(" [options]", "")
        print(f"error: {printable(one_sentence(message, options))}", file=sys.stderr)
        print(f"`{command} --help` lists the flags.", file=sys.stderr)
        sys.exit(2)


def reason_of(error: Exception) -> Exception:
    """Return what a constructor raised, below the texts in which jsonargparse wraps it.

    Args:
        error: What instantiating a configuration raised.

    Returns:
        The constructor's error, as a `ValueError` if it is of a kind that users do not expect; ``error`` itself if
        nothing is wrapped.
    """
    reason: BaseException = error
    while str(reason).startswith(_UNION) and reason.__cause__ is not None:
        reason = reason.__cause__
    if reason is error or isinstance(reason, ValueError | OSError):
        return reason
    told = ValueError(f"{type(reason).__name__}: {reason}")
    told.__cause__ = reason  # for LK_BACKBONES_TRACEBACK
    return told


_UNION = "Does not validate against any of the Union subtypes"
_NOISE = (_UNION, "Subtypes: ", "Errors:", "Given value type: ", "Given value: ", "- Expected a <class 'NoneType'>")


def one_sentence(message: str, options: Iterable[str]) -> str:
    """Make one sentence of an error of jsonargparse: which argument, what is wrong, what may have been meant.

    Args:
        message: Its text, in which every type that was tried adds some lines around the mistake.
        options: The flags there are.

    Returns:
        The sentence.
    """
    lines = [line.strip() for line in message.splitlines()]
    kept = [line.removeprefix("- ") for line in lines if line and not line.startswith(_NOISE)]
    place: list[str] = []
    classes: list[str] = []
    reasons: list[str] = []
    for line in kept:
        if found := re.fullmatch(r"Parser key \"([^\"]+)\":(.*)", line):
            place.append(found[1])
            line = found[2].strip()
        elif found := re.fullmatch(r"Problem with given class_path '([^']+)':(.*)", line):
            classes.append(found[1].rpartition(".")[2])
            line = found[2].strip()
        if line:
            reasons.append(line)
    given = next((line.partition(": ")[2] for line in reversed(lines) if line.startswith("Given value: ")), "")
    where = ".".join(key for key in place if key != "config")
    reason = _in_our_words("; ".join(dict.fromkeys(reasons)), where, classes, [*options], given)
    return ": ".join(part for part in (where, *classes[-1:], reason) if part)


def _in_our_words(reason: str, where: str, classes: list[str], options: list[str], given: str) -> str:
    """Replace Python's names of types, and add names that resemble a wrong one."""
    known: dict[str, type] = {
        **own_classes(lk_backbones.tasks, BaseTask),
        **own_classes(lk_backbones.data, PictureDataModule),
    }
    callbacks: dict[str, type] = own_classes(lk_backbones.tasks, pl.Callback)
    keys = [option.removeprefix("--") for option in options]
    if found := re.search(r"Option '([^']+)' is not accepted", reason):
        cls = (known | callbacks).get(classes[-1]) if classes else None
        near = nearest(found[1], constructor_parameters(cls)) if cls else ""
        all_of_them = f"; --{where}.help {classes[-1]} lists them" if cls in known.values() else ""
        return f"there is no argument '{found[1]}'{near or all_of_them}"
    if found := re.search(r"does not accept option '([^']+)'", reason):
        name = found[1].removesuffix(".class_path")
        return f"there is no option '{name}'{nearest(name, keys)}"
    if found := re.search(r"[Uu]nrecognized arguments: (\S+)", reason):
        name = found[1].partition("=")[0]
        return f"there is no flag {name}{nearest(name.removeprefix('--'), keys)}"
    if found := re.search(r"Expected a dot import path string: (\w+)", reason):
        names = [*callbacks, *pl.callbacks.__all__] if where.startswith("trainer.callbacks") else known
        return f"there is no class '{found[1]}'{_nearest_class(found[1], names)}"
    if found := re.search(r"arguments are required: (.+)", reason):
        missing = [re.sub(r"^(fit|validate|test|predict)\.", "", name.strip()) for name in found[1].split(",")]
        flags = " and ".join(missing if classes else [f"--{name}" for name in missing])
        return f"{flags} must be given{'' if classes else ', or a --config that names them'}"
    reason = re.sub(r"typing\.|<class '([^']+)'>", lambda m: (m[1] or "").rpartition(".")[2], reason)
    reason = re.sub(r"\bExpected an? ", "must be ", reason).replace("; must be ", " or ")
    reason = reason.replace(". Got value: ", ", got ")
    if reason.startswith("must be ") and ", got " not in reason and given:
        reason += f", got {given}"
    return reason


def _nearest_class(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: classes whose names resemble a wrong one, however it is capitalised."""
    by_key = {key.lower(): key for key in known}
    return re.sub(r"'(\w+)'", lambda m: f"'{by_key.get(m[1], m[1])}'", nearest(name, by_key))
