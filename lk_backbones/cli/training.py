"""``lk-backbones fit | validate | test | predict``: LightningCLI, with checkpoints that know their model and data."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lk_backbones.weights.errors import WeightsError
from lk_backbones.weights.saved import build_saved, constructor_parameters, read_training_checkpoint

__all__ = ["run"]

# Checkpoints may come from anywhere: never unpickle them. Tables are MetricsTable's, predictions go to files.
_DEFAULTS = {
    "fit": ["--weights_only", "true"],
    "validate": ["--weights_only", "true", "--verbose", "false"],
    "test": ["--weights_only", "true", "--verbose", "false"],
    "predict": ["--weights_only", "true", "--return_predictions", "false"],
}

# What Lightning takes for a checkpoint that it has to find itself.
_NO_FILES = ("best", "last", "hpc", "null")


def run(args: list[str]) -> None:
    """Run one of Lightning's commands.

    Args:
        args: The command and its flags.
    """
    # Imported here: `models` and a mistyped command need not wait for Lightning.
    from lk_backbones.cli.terminal import only_news

    with only_news(training=args[0] == "fit"):
        _run(args)


def _run(args: list[str]) -> None:
    from jsonargparse import Namespace
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningArgumentParser

    from lk_backbones._private.lightning import CheckpointBlindCLI
    from lk_backbones.analysis import ReceptiveField
    from lk_backbones.callbacks import (
        ClassificationResults,
        ClosingLines,
        CocoResults,
        MetricsTable,
        Overlays,
        ReproducibleSteps,
    )
    from lk_backbones.cli.configuration import ConfigFile, Parser, SaveConfig, Trainer, reason_of

    args = [args[0], *_DEFAULTS.get(args[0], []), *args[1:]]
    checkpoint = _read_checkpoint(args)
    args = _pictures(args, checkpoint)
    saved = _from_checkpoint(args, checkpoint)

    class CLI(CheckpointBlindCLI):
        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            kwargs.setdefault("dump_header", [f"lightning=={version('lightning')}"])
            parser = Parser(**kwargs)
            parser.add_argument("-c", "--config", action=ConfigFile, help="Configuration file, or name of a recipe.")
            return parser

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # each asks the task what there is to draw, to print and to write
            parser.add_lightning_class_args(Overlays, "overlays")
            parser.add_lightning_class_args(MetricsTable, "table")
            parser.add_lightning_class_args(CocoResults, "results")
            parser.add_lightning_class_args(ClassificationResults, "classes")
            parser.add_lightning_class_args(ReproducibleSteps, "reproducible")
            parser.add_lightning_class_args(ReceptiveField, "erf")

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            super().parse_arguments(parser, args)
            self.given = parser.parse_args(args, defaults=False)[self.config["subcommand"]]
            for key, part in saved.items():
                part.given = set(vars(self.given.get(key, Namespace())))

        def before_instantiate_classes(self) -> None:
            if not saved:
                _check_file(self.config[self.config["subcommand"]])

        def instantiate_classes(self) -> None:
            try:
                self._take_num_classes()
                super().instantiate_classes()
            except Exception as error:
                reason = reason_of(error)
                raise reason from reason.__cause__

        def _take_num_classes(self) -> None:
            """Set a number of classes that nobody gave to that of the data, or else of the checkpoint."""
            command = self.config["subcommand"]
            config: Any = self.config[command]
            arguments = config.get("model.init_args", Namespace())
            if "num_classes" not in arguments or "model.init_args.num_classes" in self.given:
                return
            only_data = Namespace({"subcommand": command, command: Namespace(data=config["data"])})
            data = self.parser.instantiate_classes(only_data)[command]["data"]
            # What has read its classes is used, rather than a second one.
            self.parser.add_instantiator(lambda *_, **__: data, type(data), subclasses=False, prepend=True)
            number = _num_classes_of_data(data) or _num_classes_of(checkpoint)
            if isinstance(number, int):
                arguments["num_classes"] = number
            # Lightning's copy, of which the checkpoint's hyper-parameters are made, is of before.
            vars(self).pop("config_dump", None)

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            command = self.config_init["subcommand"]
            return super().instantiate_trainer(**_beside_its_run(command, self.config_init[command]), **kwargs)

        def after_instantiate_classes(self) -> None:
            unseeded = self.config[self.config["subcommand"]]["seed_everything"] is False
            trainer: Any = self.trainer
            kept = [c for c in trainer.callbacks if _applies(c, self.model, unseeded)]
            trainer.callbacks = [ClosingLines(), *kept]  # modules of somebody else's bring none along

    # A checkpoint holds every weight: those that its encoder started from are not fetched again.
    restored = _option(args, "--ckpt_path") if args[0] != "fit" else None
    with _restoring(restored) if restored is not None else nullcontext():
        CLI(
            saved["model"].factory(args) if "model" in saved else LightningModule,
            saved["data"].factory(args) if "data" in saved else LightningDataModule,
            subclass_mode_model="model" not in saved,
            subclass_mode_data="data" not in saved,
            trainer_class=Trainer,
            parser_class=Parser,
            auto_configure_optimizers=False,
            # What is restored has no configuration: a file that named it would let a checkpoint name classes.
            save_config_callback=None if saved else SaveConfig,
            load_from_checkpoint_support=not saved,
            parser_kwargs={"prog": "lk-backbones"},
            args=args,
        )


@contextmanager
def _restoring(path: str) -> Iterator[None]:
    """Build without the weights that the encoder started from, and name the checkpoint in errors about it."""
    from lk_backbones.tasks.base import without_encoder_weights

    try:
        with without_encoder_weights():
            yield
    except WeightsError as error:
        if path in str(error):
            raise
        raise WeightsError(f"'{path}': {error}") from error


def _beside_its_run(command: str, config: Any) -> dict[str, Any]:
    """Let what evaluates a run's checkpoint write into the run's folder, if nothing else was asked for.

    Every evaluation gets a folder of its own there, ``<run>/<command>/version_<n>``, so that nothing of the run or of
    an earlier one is written over. A checkpoint is of a run if it lies where Lightning puts it, in ``checkpoints``.

    Args:
        command: Lightning's command.
        config: Its configuration, instantiated.

    Returns:
        Arguments of the trainer.
    """
    from lightning.pytorch.loggers import TensorBoardLogger

    path, logger = config["ckpt_path"], config["trainer"]["logger"]
    if command == "fit" or path is None or path in _NO_FILES or "://" in path:
        return {}
    folder = Path(os.path.abspath(path)).parent
    asked_for = config["trainer"]["default_root_dir"] is not None or not isinstance(logger, bool | None)
    if asked_for or folder.name != "checkpoints" or not os.access(folder.parent, os.W_OK):
        return {}
    if logger is False:
        return {"default_root_dir": str(folder.parent / command)}
    return {"logger": TensorBoardLogger(folder.parent, name=command)}


def _applies(callback: Any, model: Any, unseeded: bool) -> bool:
    """Return whether a callback has anything to do: other modules are not drawn, and some runs shall have no seed."""
    from lk_backbones.analysis import ReceptiveField
    from lk_backbones.callbacks import Overlays, ReproducibleSteps

    if isinstance(callback, Overlays):
        return callback.can_draw(model)
    if isinstance(callback, ReceptiveField):
        return callback.every > 0
    return not (isinstance(callback, ReproducibleSteps) and unseeded and callback.seed is None)


def _option(args: Sequence[str], name: str) -> str | None:
    """Value of ``--name VALUE`` or ``--name=VALUE``, the last one given."""
    value = None
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(f"{name}="):
            value = arg.partition("=")[2]
    return value


@dataclass
class _Saved:
    """A task or data module that a checkpoint describes, whose arguments flags replace.

    Attributes:
        key: Group of the flags, ``model`` or ``data``.
        cls: The class.
        arguments: Its arguments in the checkpoint, checked.
        where: What to call them in messages.
        make: Builds an object of the class from them, as `build_saved` does.
        given: Names of the arguments that flags give.
    """

    key: str
    cls: type
    arguments: dict[str, Any]
    where: str
    make: Callable[..., Any] = build_saved
    given: set[str] = field(default_factory=set)

    def factory(self, args: Sequence[str]) -> Callable[..., Any]:
        """Make what LightningCLI calls to build it, a parameter for every flag; ``None`` stands for the checkpoint's.

        The parser sees the user's flags only, so nothing in the checkpoint can reach its instantiators.

        Args:
            args: The command line.
        """

        def build(**flags: Any) -> Any:
            given = {name: self._extended(name, value, args) for name, value in flags.items() if name in self.given}
            return self.make(self.cls, self.arguments, self.where, **given)

        parameters = [
            parameter.replace(annotation=parameter.annotation | None, default=None)
            for parameter in constructor_parameters(self.cls).values()
        ]
        build.__signature__ = inspect.Signature(parameters, return_annotation=self.cls)  # type: ignore[attr-defined]
        build.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": self.cls}
        build.__doc__ = self.cls.__doc__
        # jsonargparse keeps a class of this name for every function, so two in one process must differ
        build.__qualname__ = f"saved_{self.cls.__name__}_{id(build)}"
        return build

    def _extended(self, name: str, value: Any, args: Sequence[str]) -> Any:
        """Return a flag's value, added to the checkpoint's by ``--model.name.key`` and ``--model.name+``."""
        flag, saved = f"--{self.key}.{name}", self.arguments.get(name)
        if isinstance(value, dict) and isinstance(saved, dict) and any(a.startswith(f"{flag}.") for a in args):
            return saved | value
        if isinstance(value, list) and saved and any(a.split("=")[0] == f"{flag}+" for a in args):
            return [*saved, *value]
        return value


def _read_checkpoint(args: list[str]) -> dict[str, Any] | None:
    """Read the checkpoint that a command line leaves something open to; ``None`` if it leaves nothing open.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the file is not a checkpoint of one of our tasks.
    """
    path = _option(args, "--ckpt_path")
    if args[0] not in ("validate", "test", "predict") or path is None or path in _NO_FILES:
        return None
    return read_training_checkpoint(path) if _left_open(args) or _option(args, "--pictures") is not None else None


def _left_open(args: list[str]) -> list[str]:
    """Which of ``model`` and ``data`` a command line does not name, itself or in a configuration."""
    given = {arg.split("=")[0] for arg in args}
    return [] if any(map(_is_config, args)) else [key for key in ("model", "data") if f"--{key}" not in given]


def _is_config(arg: str) -> bool:
    """Return whether an argument is ``--config`` or ``-c``, with its value or before it."""
    return arg.split("=")[0] == "--config" or (arg.startswith("-c") and not arg.startswith("--"))


def _num_classes_of_data(data: Any) -> Any:
    """Ask a data module for its number of classes; ``None`` if it has none, or knows it only after ``setup()``."""
    from lk_backbones.data.datamodule import PictureDataModule

    try:
        return getattr(data, "num_classes", None)
    except Exception:
        if isinstance(data, PictureDataModule):
            raise  # what is wrong with the data
        return None


def _num_classes_of(checkpoint: dict[str, Any] | None) -> Any:
    """Find the number of classes of a checkpoint's model, for pictures without labels; ``None`` if it does not say."""
    values = (checkpoint or {}).get("hyper_parameters")
    return values.get("num_classes") if isinstance(values, dict) else None


def _from_checkpoint(args: list[str], checkpoint: dict[str, Any] | None) -> dict[str, _Saved]:
    """Return what a checkpoint knows of the model and the data that the command line leaves open.

    Raises:
        ValueError: If it is not of one of our tasks or data modules.
    """
    from lk_backbones.data.datamodule import saved_data
    from lk_backbones.tasks.base import build_saved_task, saved_task

    if checkpoint is None:
        return {}
    path, saved = _option(args, "--ckpt_path"), {}
    if "model" in _left_open(args):
        weights = [*checkpoint["state_dict"].values()]
        saved["model"] = _Saved("model", *saved_task(checkpoint, path), partial(build_saved_task, tensors=weights))
    if "data" in _left_open(args):
        saved["data"] = _Saved("data", *saved_data(checkpoint, path))
    return saved


def _check_file(config: Any) -> None:
    """Read the checkpoint that a trainer is about to load, before anything is built."""
    path = config["ckpt_path"]
    elsewhere = path is None or path in _NO_FILES or "://" in path or path.startswith("registry")
    if not elsewhere and config["weights_only"] is not False:
        read_training_checkpoint(path)


def _pictures(args: list[str], checkpoint: dict[str, Any] | None) -> list[str]:
    """Turn ``--pictures FOLDER`` into the data module that it stands for, which repeats the checkpoint's evaluation.

    It replaces the data of a configuration; flags win over it.
    """
    folder = _option(args, "--pictures")
    if args[0] != "predict" or folder is None:
        return args
    from lk_backbones.data.picture_folder import evaluation_arguments

    evaluation = evaluation_arguments(checkpoint or {}, _option(args, "--ckpt_path"))
    data = ["--data", "PictureFolderDataModule", "--data.folder", folder, "--data.batch_size", "1"]
    data += [f"--data.{name}={json.dumps(value)}" for name, value in evaluation.items()]
    configurations, rest = [], []
    arguments = iter(args[1:])
    for arg in arguments:
        is_config = _is_config(arg)
        if not is_config and arg.split("=")[0] != "--pictures":
            rest.append(arg)
            continue
        value = [next(arguments, "")] if arg in ("--pictures", "--config", "-c") else []
        configurations += [arg, *value] if is_config else []
    return [args[0], *configurations, *data, *rest]
