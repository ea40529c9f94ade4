"""Batch norms that measure the batch of all processes, of every kind that timm has."""

from typing import Any, cast

import lightning as L
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import nn

__all__ = ["SyncBatchNorm", "keep_activations"]


class SyncBatchNorm(TorchSyncBatchNorm):
    """Lightning's ``sync_batchnorm`` by timm's conversion, which keeps what timm puts into a norm.

    The ``BatchNormAct2d`` of timm's MobileNet, EfficientNet, RegNet and others applies the activation too.
    PyTorch's conversion, which Lightning uses, makes a norm alone of it, and the network trains without those
    activations. Our tasks take this plugin by themselves where a trainer has ``sync_batchnorm=True``; for other modules
    it is ``Trainer(plugins=[SyncBatchNorm()])``.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the model with synchronised batch norms; its state dict has the same keys and tensors."""
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted

    def revert(self, model: nn.Module) -> nn.Module:
        """Return the model with ordinary batch norms again, which are in the mode that they were in."""
        modes = {name: module.training for name, module in model.named_modules()}
        for name, module in [*model.named_modules()]:
            if isinstance(module, SyncBatchNormAct):
                model.set_submodule(name, _ordinary(module))
        reverted: nn.Module = super().revert(model)
        for name, module in reverted.named_modules():
            module.training = modes[name]
        return reverted


def _ordinary(module: SyncBatchNormAct) -> BatchNormAct2d:
    ordinary: Any = BatchNormAct2d(
        module.num_features,
        module.eps,
        module.momentum,  # type: ignore[arg-type]  # None, the mean over all batches, is allowed
        module.affine,
        module.track_running_stats,
        device="meta",
    )
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(ordinary, name, getattr(module, name))  # the tensors themselves, which an optimiser may hold
    ordinary.act, ordinary.drop = module.act, module.drop
    return cast(BatchNormAct2d, ordinary)


def keep_activations(trainer: L.Trainer) -> None:
    """Let a trainer that was made with ``sync_batchnorm=True`` convert by `SyncBatchNorm`.

    Only strategies of several processes convert; where somebody gave a plugin of their own, it stays.

    Args:
        trainer: A trainer whose strategy has not been set up.
    """
    strategy = trainer.strategy
    # Lightning has no other way to a trainer that is there already.
    if type(getattr(strategy, "_layer_sync", None)) is TorchSyncBatchNorm:
        strategy._layer_sync = SyncBatchNorm()  # type: ignore[attr-defined]
