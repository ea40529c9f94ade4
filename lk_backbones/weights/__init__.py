"""Where weight files come from, and how they are read: catalogue, download, safe reading. Knows no model of ours."""

from lk_backbones.weights.catalogue import PublishedWeights, list_published
from lk_backbones.weights.errors import DownloadError, WeightMismatchError, WeightsError
from lk_backbones.weights.report import LoadReport
from lk_backbones.weights.sources import Weights, is_source, pull

__all__ = [
    "DownloadError",
    "LoadReport",
    "PublishedWeights",
    "WeightMismatchError",
    "Weights",
    "WeightsError",
    "is_source",
    "list_published",
    "pull",
]
