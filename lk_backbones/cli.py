"""The command line: ``lk-backbones fit | validate | test | predict`` (LightningCLI) and ``lk-backbones models``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

import lk_backbones

__all__ = ["main"]

_USAGE = """usage: lk-backbones COMMAND ...

Large-kernel ConvNets for segmentation.

  fit       train:     lk-backbones fit --config recipes/quickstart/unet_replknet_31n_scenes.yaml
  validate  evaluate:  lk-backbones validate --ckpt_path CHECKPOINT
  test      evaluate:  lk-backbones test --ckpt_path CHECKPOINT
  predict   label maps and overlays for a folder of pictures:
                       lk-backbones predict --ckpt_path CHECKPOINT --pictures FOLDER
  models    list the encoders: name, parameters, kernel sizes, weights

`lk-backbones COMMAND --help` explains a command. A checkpoint knows its model and data; flags after --ckpt_path
override them (--model.inference slide). LK_BACKBONES_TRACEBACK=1 shows where an error comes from.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Arguments, by default those of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return
    if args[0] == "--version":
        print(f"lk-backbones {lk_backbones.__version__}")
        return
    try:
        if args[0] == "models":
            _models(args[1:])
        else:
            _lightning(args)
    except (ValueError, FileNotFoundError, IsADirectoryError) as error:
        # What these say is meant for the user; the way to them is not.
        if os.environ.get("LK_BACKBONES_TRACEBACK"):
            raise
        Console(stderr=True, soft_wrap=True).print("[bold red]error:[/]", str(error), highlight=False, markup=True)
        sys.exit(1)


# ---- models ----


def _models(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="lk-backbones models", description="List the encoders.")
    parser.add_argument("pattern", nargs="?", default="*", help="names to list, such as 'replknet_31*'")
    names = lk_backbones.list_encoders(parser.parse_args(args).pattern)
    if not names:
        raise ValueError(f"no encoder matches; there are {', '.join(lk_backbones.list_encoders())}")
    table = Table("name", Column("parameters", justify="right"), "kernel sizes", "published weights", title="encoders")
    for name in names:
        table.add_row(name, *_describe(name))
    table.caption = "Parameters without classifier. *: only on the authors' page, see README."
    Console().print(table)


def _describe(name: str) -> tuple[str, str, str]:
    """Parameters without the classifier, kernel size of each stage, and weights (starred: timm cannot fetch them)."""
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kernels = [
        max(module.kernel_size for module in stage.modules() if isinstance(module, torch.nn.Conv2d))
        for stage in model.stages
    ]
    sizes = "-".join(str(k[0]) if k[0] == k[1] else f"{k[0]}x{k[1]}" for k in kernels)
    fetchable = set(timm.list_pretrained(f"{name}.*"))
    weights = [
        full_name.partition(".")[2] + ("" if full_name in fetchable else "*")
        for full_name in timm.list_models(f"{name}.*", include_tags=True)
        if not full_name.endswith(".untrained")
    ]
    return f"{parameters / 1e6:.1f} M", sizes, ", ".join(weights) or "none"


# ---- fit, validate, test, predict ----

# Checkpoints may come from anywhere: never unpickle them. Tables are IoUTable's, predictions go to files.
_DEFAULTS = {
    "fit": ["--weights_only", "true"],
    "validate": ["--weights_only", "true", "--verbose", "false"],
    "test": ["--weights_only", "true", "--verbose", "false"],
    "predict": ["--weights_only", "true", "--return_predictions", "false"],
}


def _lightning(args: list[str]) -> None:
    # Imported here: `models` and a mistyped command need not wait for Lightning.
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    import lk_backbones.data
    import lk_backbones.tasks  # noqa: F401, so that short class names resolve
    from lk_backbones.tasks.base import without_encoder_weights
    from lk_backbones.tasks.callbacks import IoUTable, ReproducibleSteps, SegmentationOverlays

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(SegmentationOverlays, "overlays")
            parser.add_lightning_class_args(IoUTable, "table")
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
    lines = []
    overlays = next((callback for callback in trainer.callbacks if hasattr(callback, "folder")), None)
    if overlays is not None and overlays.folder.is_dir():
        lines.append(f"pictures:   {overlays.folder}")
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
        class_path = hyper_parameters.pop("_class_path", "lk_backbones.tasks.SegmentationTask")
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


if __name__ == "__main__":
    main()
