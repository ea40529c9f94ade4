"""LightningModules that train, measure and apply networks on any encoder, and callbacks that show what they do."""

from lk_backbones.tasks.base import BaseTask, without_encoder_weights
from lk_backbones.tasks.callbacks import IoUTable, ReproducibleSteps, SamplesSeen, SegmentationOverlays
from lk_backbones.tasks.openmmlab import openmmlab_state_dict
from lk_backbones.tasks.segmentation import SegmentationTask

__all__ = [
    "BaseTask",
    "IoUTable",
    "ReproducibleSteps",
    "SamplesSeen",
    "SegmentationOverlays",
    "SegmentationTask",
    "openmmlab_state_dict",
    "without_encoder_weights",
]
