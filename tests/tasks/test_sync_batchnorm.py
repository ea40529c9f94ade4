"""Synchronised batch norms: what timm keeps in a norm stays there."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn

from lk_backbones.data import SyntheticScenesDataModule
from lk_backbones.tasks import SegmentationTask, SyncBatchNorm
from tests.conftest import SMALL_ENCODERS, randomize_norms

ENCODERS = ["tu-mobilenetv3_small_050", "mobilenetv2_lk_050", *SMALL_ENCODERS]


def segmentation(encoder: str) -> SegmentationTask:
    torch.manual_seed(0)
    return randomize_norms(SegmentationTask("fpn", encoder, num_classes=9)).eval()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_converted_and_back_it_computes_the_same(encoder: str) -> None:
    task = segmentation(encoder)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = task(image)
        before = dict(task.state_dict(keep_vars=True))
        kinds = {name: type(module) for name, module in task.named_modules()}
        converted = SyncBatchNorm().apply(task)
        assert not [m for m in converted.modules() if type(m) in (nn.BatchNorm2d, BatchNormAct2d)]
        torch.testing.assert_close(converted(image), expected)
        reverted = SyncBatchNorm().revert(converted)
        assert not [m for m in reverted.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert all(type(m) is kinds[name] for name, m in reverted.named_modules() if kinds[name] is BatchNormAct2d)
        torch.testing.assert_close(reverted(image), expected)
    after = reverted.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is tensor for name, tensor in before.items())


def test_the_conversion_of_torch_loses_activations() -> None:
    """The day that it does not, the plugin can go."""
    task = segmentation("tu-mobilenetv3_small_050")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = task(image)
        assert not torch.allclose(TorchSyncBatchNorm().apply(copy.deepcopy(task))(image), expected, rtol=0.1)


class Mine(TorchSyncBatchNorm):
    pass


class Seen(L.Callback):
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.norms = {type(m) for m in pl_module.modules() if "BatchNorm" in type(m).__name__}


@pytest.mark.parametrize(
    ("options", "norms"),
    [
        ({"sync_batchnorm": True}, {SyncBatchNormAct}),
        ({"plugins": [SyncBatchNorm()]}, {SyncBatchNormAct}),
        ({"sync_batchnorm": True, "plugins": [Mine()]}, {nn.SyncBatchNorm}),
    ],
    ids=["asked for", "given", "of somebody's own"],
)
def test_a_task_brings_it_along(options: dict, norms: set[type], tmp_path: Path) -> None:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[seen := Seen()], **options,
    )  # fmt: skip
    task = segmentation("mobilenetv2_lk_050")
    data = SyntheticScenesDataModule(image_size=(64, 64), train_images=2, val_images=1, test_images=1, num_workers=0)
    try:
        # The model is converted before torch refuses such norms on a CPU. What Lightning leaves in the environment
        # would tell commands of later tests that somebody else starts their processes, for which they would wait.
        with (
            mock.patch.dict(os.environ),
            pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"),
        ):
            trainer.fit(task, data)
    finally:
        torch.distributed.destroy_process_group()
    assert seen.norms == norms
    assert not [m for m in task.modules() if isinstance(m, nn.SyncBatchNorm)]
