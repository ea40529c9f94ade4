"""Accuracy over a whole data set, from one pass."""

from typing import Any

import torch
from torchmetrics import Metric

__all__ = ["ClassificationMetrics"]

#: Above this many classes there is no confusion matrix: it would need more memory than the model.
MOST_CONFUSED = 1000


class ClassificationMetrics(Metric):
    """Top-1 and top-5 accuracy, accuracy per class and the confusion matrix of what was seen since the last reset.

    It counts what `timm.utils.accuracy` counts, from one ``topk``: torchmetrics' ``MulticlassAccuracy`` and
    ``MulticlassConfusionMatrix`` take an ``argmax`` for top-1, which can break ties of low precision another way.
    Counts are summed over all processes before anything is divided.

    Args:
        num_classes: Number of classes.
        **kwargs: As every torchmetrics metric.
    """

    hits: torch.Tensor
    counts: torch.Tensor
    top5_hits: torch.Tensor
    matrix: torch.Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.has_matrix = num_classes <= MOST_CONFUSED
        for name in ("hits", "counts"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("top5_hits", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        if self.has_matrix:
            self.add_state("matrix", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, best: torch.Tensor, label: torch.Tensor) -> None:
        """Add a batch.

        Args:
            best: int64 ``(N, k)``, the k best classes of each picture, the best first; k is 5, or the number of classes
                if that is smaller.
            label: int64 ``(N,)``.
        """
        classes = self.num_classes
        hit = best == label[:, None]
        self.counts += torch.bincount(label, minlength=classes)
        self.hits += torch.bincount(label[hit[:, 0]], minlength=classes)
        self.top5_hits += hit.any(dim=1).sum()
        if self.has_matrix:
            pairs = torch.bincount(label * classes + best[:, 0], minlength=classes**2)
            self.matrix += pairs.view(classes, classes)

    def compute(self) -> dict[str, torch.Tensor]:
        """Compute the metrics.

        Returns:
            ``top1``, ``top5`` (float64 scalars in [0, 1], NaN if nothing was seen), ``per_class`` float64
            ``(num_classes,)``, NaN for classes without pictures, and ``confusion`` int64
            ``(num_classes, num_classes)``, truth by prediction; ``(0, 0)`` above 1000 classes. All on the CPU.
        """
        hits, counts = self.hits.cpu().double(), self.counts.cpu().double()
        return {
            "top1": hits.sum() / counts.sum(),
            "top5": self.top5_hits.cpu().double() / counts.sum(),
            "per_class": hits / counts,
            "confusion": self.matrix.cpu() if self.has_matrix else torch.zeros(0, 0, dtype=torch.long),
        }
