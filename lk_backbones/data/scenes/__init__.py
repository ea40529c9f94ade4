"""Street scenes that are drawn on the fly: a data set that needs no download."""

from lk_backbones.data.scenes.datamodules import (
    SyntheticScenesDataModule,
    SyntheticScenesDataset,
    SyntheticScenesDetectionDataModule,
)

__all__ = ["SyntheticScenesDataModule", "SyntheticScenesDataset", "SyntheticScenesDetectionDataModule"]
