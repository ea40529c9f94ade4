"""Numbers that no network can be built or trained with, which comparisons with a limit let pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lk_backbones.data import (
    ADE20KDataModule,
    CityscapesDataModule,
    CocoDataModule,
    PictureFolderDataModule,
    SegmentationFolderDataModule,
    SyntheticScenesDataModule,
    SyntheticScenesDetectionDataModule,
)
from lk_backbones.tasks import DetectionTask, SegmentationTask
from tests.hostile.conftest import Refused

INF, NAN = float("inf"), float("nan")
TASK = {"architecture": "fpn", "num_classes": 2, "encoder_kwargs": {"kernel_sizes": 3}}
DETECTOR = {"architecture": "fcos", "num_classes": 2, "encoder_kwargs": {"kernel_sizes": 3}}

NUMBERS: list[tuple[type, dict[str, Any], dict[str, Any]]] = [
    *((SegmentationTask, TASK, {name: INF}) for name in ("lr", "weight_decay", "layer_decay", "power", "min_lr")),
    *((SegmentationTask, TASK, {name: NAN}) for name in ("lr", "weight_decay", "momentum", "power", "warmup_ratio")),
    *((SegmentationTask, TASK, {name: -0.1}) for name in ("momentum", "min_lr", "power", "weight_decay")),
    (SegmentationTask, TASK, {"class_weights": [1.0, NAN]}),
    (SegmentationTask, TASK, {"class_weights": [1.0, INF]}),
    (SegmentationTask, TASK, {"class_weights": torch.tensor([1.0, NAN])}),
    (SegmentationTask, TASK, {"class_weights": np.array([1.0, NAN])}),
    (SegmentationTask, TASK, {"std": [0.2, NAN, 0.2]}),
    (SegmentationTask, TASK, {"std": [0.2, INF, 0.2]}),
    (SegmentationTask, TASK, {"mean": [0.2, NAN, 0.2]}),
    (SegmentationTask, TASK, {"auxiliary_weight": NAN}),
    (SegmentationTask, TASK, {"tta_scales": [1.0, INF]}),
    (SegmentationTask, TASK, {"tta_scales": [1.0, NAN]}),
    (SegmentationTask, TASK, {"encoder_kwargs": {"kernel_sizes": 3, "drop_path_rate": NAN}}),
    (SegmentationTask, TASK, {"architecture_kwargs": {"decoder_dropout": NAN}}),
    (DetectionTask, DETECTOR, {"gamma": NAN}),
    (DetectionTask, DETECTOR, {"gamma": -0.1}),
    (DetectionTask, DETECTOR, {"std": [NAN, 1.0, 1.0]}),
    (DetectionTask, DETECTOR, {"architecture_kwargs": {"score_thresh": NAN}}),
    *((ADE20KDataModule, {}, {name: (0, 0)}) for name in ("base_size", "test_size", "crop_size")),
    *((ADE20KDataModule, {}, {name: (512, -1)}) for name in ("base_size", "test_size", "crop_size")),
    *((ADE20KDataModule, {}, {name: (512,)}) for name in ("base_size", "test_size")),
    (CityscapesDataModule, {}, {"scale_range": (0.5, INF)}),
    (CityscapesDataModule, {}, {"scale_range": (NAN, 2.0)}),
    (CityscapesDataModule, {}, {"crop_size": -5}),
    (CityscapesDataModule, {}, {"cat_max_ratio": NAN}),
    (CityscapesDataModule, {}, {"image_fill": (0.1, NAN, 0.1)}),
    (SegmentationFolderDataModule, {"root": "x"}, {"val_fraction": NAN}),
    (SegmentationFolderDataModule, {"root": "x"}, {"test_size": (-1, -1)}),
    (PictureFolderDataModule, {"folder": "x"}, {"test_size": (0, 5)}),
    (PictureFolderDataModule, {"folder": "x"}, {"batch_size": 0}),
    (PictureFolderDataModule, {"folder": "x"}, {"num_workers": -1}),
    (SyntheticScenesDataModule, {}, {"image_size": (0, 0)}),
    (SyntheticScenesDataModule, {}, {"image_size": (-64, 64)}),
    (SyntheticScenesDetectionDataModule, {}, {"image_size": (0, 0)}),
    (CocoDataModule, {}, {"crop_range": (0, 600)}),
    (CocoDataModule, {}, {"crop_range": (600, 384)}),
    (CocoDataModule, {}, {"crop_probability": NAN}),
    (CocoDataModule, {}, {"flip_probability": NAN}),
    (CocoDataModule, {}, {"sizes": [0]}),
    (CocoDataModule, {}, {"max_size": -1}),
]


@pytest.mark.parametrize(
    ("cls", "arguments", "wrong"), NUMBERS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_number_that_cannot_be_is_named(cls: type, arguments: dict[str, Any], wrong: dict[str, Any]) -> None:
    cls(**arguments)  # the control
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        cls(**(arguments | wrong))


def test_infinity_in_a_configuration(workspace: Any, refused: Refused) -> None:
    text = "model:\n  class_path: SegmentationTask\n  init_args:\n    lr: .inf\n"
    (workspace / "inf.yaml").write_text(text + "data:\n  class_path: SyntheticScenesDataModule\n")
    refused(["fit", "--config", "inf.yaml"], "lr=inf must be finite")
