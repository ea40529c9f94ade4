"""Private parts of Lightning."""

from lightning.pytorch.cli import LightningCLI

from lk_backbones._private.borrow import borrow

__all__ = ["CheckpointBlindCLI"]

# What is overridden below must be what Lightning calls.
borrow("lightning", "lightning.pytorch.cli", "LightningCLI._parse_ckpt_path")


class CheckpointBlindCLI(LightningCLI):
    """Lightning's command line, which would otherwise hand what a checkpoint says to its instantiators."""

    def _parse_ckpt_path(self) -> None:
        pass
