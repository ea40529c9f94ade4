"""What measures: torchmetrics that give the papers' numbers."""

from lk_backbones.metrics.classification import ClassificationMetrics
from lk_backbones.metrics.detection import DetectionMetrics
from lk_backbones.metrics.segmentation import SegmentationMetrics

__all__ = ["ClassificationMetrics", "DetectionMetrics", "SegmentationMetrics"]
