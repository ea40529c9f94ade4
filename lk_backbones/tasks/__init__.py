"""LightningModules that train, measure and apply networks on any encoder, and callbacks that show what they do."""

from lk_backbones.callbacks.checkpoints import AtomicCheckpointIO, SafeCheckpoints
from lk_backbones.callbacks.classification_results import ClassificationResults
from lk_backbones.callbacks.closing import ClosingLines
from lk_backbones.callbacks.coco_results import CocoResults
from lk_backbones.callbacks.overlays import Overlays
from lk_backbones.callbacks.shape_decisions import ShapeDecisions
from lk_backbones.callbacks.sparsity import DynamicSparsity
from lk_backbones.callbacks.tables import MetricsTable
from lk_backbones.callbacks.training import ReproducibleSteps, SamplesSeen
from lk_backbones.tasks.base import BaseTask, without_encoder_weights
from lk_backbones.tasks.classification import ClassificationTask
from lk_backbones.tasks.detection import DetectionTask
from lk_backbones.tasks.openmmlab import openmmlab_state_dict
from lk_backbones.tasks.segmentation import SegmentationTask
from lk_backbones.tasks.sync_batchnorm import SyncBatchNorm

__all__ = [
    "AtomicCheckpointIO",
    "BaseTask",
    "ClassificationResults",
    "ClassificationTask",
    "ClosingLines",
    "CocoResults",
    "DetectionTask",
    "DynamicSparsity",
    "MetricsTable",
    "Overlays",
    "ReproducibleSteps",
    "SafeCheckpoints",
    "SamplesSeen",
    "SegmentationTask",
    "ShapeDecisions",
    "SyncBatchNorm",
    "openmmlab_state_dict",
    "without_encoder_weights",
]
