"""What watches, draws and writes while a task runs."""

from lk_backbones.callbacks.checkpoints import AtomicCheckpointIO, SafeCheckpoints
from lk_backbones.callbacks.classification_results import ClassificationResults
from lk_backbones.callbacks.closing import ClosingLines, WritingCallback
from lk_backbones.callbacks.coco_results import CocoResults
from lk_backbones.callbacks.metrics_file import MetricsFile
from lk_backbones.callbacks.overlays import Overlays
from lk_backbones.callbacks.shape_decisions import ShapeDecisions
from lk_backbones.callbacks.sparsity import DynamicSparsity
from lk_backbones.callbacks.tables import MetricsTable
from lk_backbones.callbacks.training import ReproducibleSteps, SamplesSeen

__all__ = [
    "AtomicCheckpointIO",
    "ClassificationResults",
    "ClosingLines",
    "CocoResults",
    "DynamicSparsity",
    "MetricsFile",
    "MetricsTable",
    "Overlays",
    "ReproducibleSteps",
    "SafeCheckpoints",
    "SamplesSeen",
    "ShapeDecisions",
    "WritingCallback",
]
