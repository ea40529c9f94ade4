"""``lk-backbones fit | validate | test | predict``: LightningCLI, with checkpoints that know their model and data."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

__all__ = ["run"]

# Checkpoints may come from anywhere: never unpickle them. Tables are MetricsTable's, predictions go to files.
_DEFAULTS = {
    "fit": ["--weights_only", "true"],
    "validate": ["--weights_only", "true", "--verbose", "false"],
    "test": ["--weights_only", "true", "--verbose", "false"],
    "predict": ["--weights_only", "true", "--return_predictions", "false"],
}


def run(args: list[str]) -> None:
    """Run one of Lightning's commands.

    Args:
        args: The command and its flags.
    """
    # Imported here: `models` and a mistyped command need not wait for Lightning.
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    import lk_backbones.data
    import lk_backbones.tasks  # noqa: F401, so that short class names resolve
    from lk_backbones.tasks import CocoResults, MetricsTable, Overlays, ReproducibleSteps
    from lk_backbones.tasks.base import without_encoder_weights

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # each asks the task what there is to draw, to print and to write
            parser.add_lightning_class_args(Overlays, "overlays")
            parser.add_lightning_class_args(MetricsTable, "table")
            parser.add_lightning_class_args(CocoResults, "results")
            parser.add_lightning_class_args(ReproducibleSteps, "reproducible")

        def _parse_ckpt_path(self) -> None:
            """Lightning would let the checkpoint win over flags; :func:`_from_checkpoint` lets flags win."""

    # The arguments come from the command line or from a test; Lightning only wants to warn of a mix-up.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    args = [args[0], *_DEFAULTS.get(args[0], []), *args[1:]]
    restored = args[0] != "fit" and _option(args, "--ckpt_path") is not None
    # A checkpoint holds every weight: those that its encoder started from are not fetched again.
    with without_encoder_weights() if restored else nullcontext():
        cli = CLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "lk-backbones"},
            args=_pictures(_from_checkpoint(args)),
        )
    if cli.trainer.is_global_zero:
        _say_where(cli.trainer)


def _say_where(trainer: Any) -> None:
    """Name what a run has left on the disk."""
    from lk_backbones.tasks import CocoResults, Overlays

    lines = []
    for callback in trainer.callbacks:
        if isinstance(callback, Overlays) and callback.folder.is_dir():
            lines.append(f"pictures:   {callback.folder}")
        if isinstance(callback, CocoResults):
            lines += [f"detections: {file}" for file in callback.files]
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if trainer.state.fn == "fit" and checkpoint:
        lines.append(f"checkpoint: {os.path.relpath(checkpoint)}")
    for line in lines:
        print(line)


def _option(args: Sequence[str], name: str) -> str | None:
    """Value of ``--name VALUE`` or ``--name=VALUE``, the last one given."""
    value = None
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(f"{name}="):
            value = arg.partition("=")[2]
    return value


def _from_checkpoint(args: list[str]) -> list[str]:
    """Put what a checkpoint knows of its model and data in front of the user's own flags.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the file is not a checkpoint of one of our tasks.
    """
    from lk_backbones.tasks.base import class_name_of

    path = _option(args, "--ckpt_path")
    if args[0] == "fit" or path is None or path in ("best", "last", "null") or path.startswith("hf-hub:"):
        return args
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        hyper_parameters = dict(checkpoint["hyper_parameters"])
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint that `lk-backbones fit` wrote: {error}") from error

    known = []
    has_config = _option(args, "--config") is not None
    if not has_config and not any(arg.split("=")[0] == "--model" for arg in args):
        class_path = hyper_parameters.pop("_class_path", f"lk_backbones.tasks.{class_name_of(hyper_parameters)}")
        known += ["--model", _config(class_path, hyper_parameters)]
    data = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    given = any(arg.split("=")[0] in ("--data", "--pictures") for arg in args)
    if not has_config and not given and "_class_path" in data:
        known += ["--data", _config(data.pop("_class_path"), data)]
    return [args[0], *known, *args[1:]]


def _config(class_path: str, init_args: dict[str, Any]) -> str:
    init_args = {key: value for key, value in init_args.items() if not key.startswith("_")}
    return json.dumps({"class_path": class_path, "init_args": init_args})


def _pictures(args: list[str]) -> list[str]:
    """Turn ``--pictures FOLDER`` into the data module that it stands for."""
    folder = _option(args, "--pictures")
    if args[0] != "predict" or folder is None:
        return args
    rest = []
    arguments = iter(args[1:])
    for arg in arguments:
        if arg == "--pictures":
            next(arguments)
        elif not arg.startswith("--pictures="):
            rest.append(arg)
    return [args[0], "--data", "PictureFolderDataModule", "--data.folder", folder, *rest]
