"""The command line: ``lk-backbones COMMAND``, one file per group of commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

import lk_backbones
from lk_backbones._printing import any_text_can_be_printed, printable
from lk_backbones.cli import (
    analysis,
    benchmark,
    export,
    grid,
    hub,
    looking,
    models,
    recipes,
    sweep,
    training,
    tune,
)

__all__ = ["main"]

_USAGE = """usage: lk-backbones COMMAND ...

Large-kernel ConvNets for classification, segmentation and detection.

  fit       train:     lk-backbones fit --config quickstart/unet_replknet_31n_scenes
                       lk-backbones fit --config own/unet_replknet_31n_256 --data.root FOLDER
  validate  evaluate:  lk-backbones validate --ckpt_path CHECKPOINT
  test      evaluate:  lk-backbones test --ckpt_path CHECKPOINT
  predict   overlays, and label maps, detections or classes, for a folder of pictures:
                       lk-backbones predict --ckpt_path CHECKPOINT --pictures FOLDER
  recipes   list the recipes that --config knows by name, and their published results; recipes copy NAME [TO]
  sweep     train every cell of a published table: lk-backbones sweep guidelines/shortcut --small
  models    list the encoders: name, parameters, kernel sizes, weights
  grid      how a peripheral kernel shares its weights: lk-backbones grid 101 --save grid.png
  hub       weights: lk-backbones hub list | pull SOURCE | publish CHECKPOINT --repo you/name
  erf       what a model sees, its effective receptive field: lk-backbones erf MODEL MODEL --pictures FOLDER
  shape-bias  what a classifier goes by, shape or texture: lk-backbones shape-bias MODEL --pictures FOLDER
  cam       what speaks for an answer, activation maps: lk-backbones cam PICTURE --model MODEL --class NAME
  features  what an encoder makes of a picture, all its levels: lk-backbones features PICTURE --model MODEL
  demo      a page in the browser to drop pictures on: lk-backbones demo MODEL MODEL
  benchmark speed and memory of models, side by side: lk-backbones benchmark MODEL MODEL; --ops of the convolution
  tune      which path of the convolution is fastest on this GPU: lk-backbones tune MODEL; --show what is known
  export    a model as a file for onnxruntime or PyTorch alone: lk-backbones export CHECKPOINT --images FOLDER
  convert   a published checkpoint to our layout: lk-backbones convert FILE --to FOLDER

`lk-backbones COMMAND --help` explains a command. A checkpoint knows its model and data; flags after --ckpt_path
override them (--model.inference slide). LK_BACKBONES_TRACEBACK=1 shows where an error comes from.
"""

# The others are Lightning's, which takes their names too.
_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "recipes": recipes.run,
    "sweep": sweep.run,
    "models": models.run,
    "grid": grid.run,
    "hub": hub.run,
    "convert": hub.convert,
    "erf": analysis.erf,
    "shape-bias": analysis.shape_bias,
    "cam": looking.cam,
    "features": looking.features,
    "demo": looking.demo,
    "benchmark": benchmark.run,
    "tune": tune.run,
    "export": export.run,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Arguments, by default those of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    with any_text_can_be_printed():
        try:
            _run(args)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            # What these say is meant for the user; the way to them is not.
            if os.environ.get("LK_BACKBONES_TRACEBACK"):
                raise
            # Lines after the first are set back: a name with a newline in it makes no error of its own.
            message = printable(error, newlines=True).replace("\n", "\n  ")
            text = Text.assemble(("error:", "bold red"), " ", message)
            Console(stderr=True, soft_wrap=True).print(text, highlight=False)
            sys.exit(1)


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
    elif args[0] == "--version":
        print(f"lk-backbones {lk_backbones.__version__}")
    elif args[0] in _COMMANDS:
        _COMMANDS[args[0]](args[1:])
    else:
        training.run(args)
