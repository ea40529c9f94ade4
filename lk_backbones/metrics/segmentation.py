"""The papers' segmentation metrics from one confusion matrix."""

from typing import Any

import torch
from torchmetrics.classification import MulticlassConfusionMatrix

__all__ = ["SegmentationMetrics"]


class SegmentationMetrics(MulticlassConfusionMatrix):
    """Mean IoU, IoU per class and pixel accuracy over a whole data set.

    Counts are summed over all pictures (and processes) before anything is divided, as the papers do;
    ``torchmetrics.segmentation.MeanIoU`` averages per picture instead. ``mean_iou`` equals
    ``MulticlassJaccardIndex(average="macro")``; one confusion matrix serves all three numbers, and classes that
    occur in neither labels nor predictions are NaN rather than 0.

    Args:
        num_classes: Number of classes.
        ignore_index: Label of pixels that do not count, or ``None``.
        **kwargs: As every torchmetrics metric.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, ignore_index=ignore_index, validate_args=False, **kwargs)

    def compute(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Compute the metrics of everything seen since the last reset.

        Returns:
            ``mean_iou`` and ``pixel_accuracy`` (scalars in [0, 1], NaN if nothing was seen) and ``iou``
            ``(num_classes,)``, NaN for classes that occur nowhere.
        """
        matrix = self.confmat.cpu().double()  # exact for any count; some accelerators have no float64
        hits = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - hits
        iou = hits / union  # 0 / 0 is NaN: the class occurs nowhere
        if self.ignore_index is not None and 0 <= self.ignore_index < len(iou):
            iou[self.ignore_index] = torch.nan
        metrics = {"mean_iou": iou.nanmean(), "pixel_accuracy": hits.sum() / matrix.sum(), "iou": iou}
        return {name: value.float().to(self.device) for name, value in metrics.items()}
