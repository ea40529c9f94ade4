"""Data modules: data sets on disk and made up, as Lightning feeds them to a task."""

import os

# albumentations asks the package index for its newest version when it is imported; an import must not use the network.
# Set here, as every way to a module of this package leads through this file first.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from lk_backbones.data.ade20k import ADE20KDataModule
from lk_backbones.data.cityscapes import CityscapesDataModule
from lk_backbones.data.classes import IGNORE_INDEX, ClassTable
from lk_backbones.data.classification import ClassificationDataModule, ClassificationDataset
from lk_backbones.data.coco import CocoDataModule
from lk_backbones.data.detection import DetectionDataModule, DetectionDataset
from lk_backbones.data.image_folder import ImageFolderDataModule
from lk_backbones.data.imagenet import ImageNetDataModule
from lk_backbones.data.picture_folder import PictureFolderDataModule
from lk_backbones.data.scenes.datamodules import SyntheticScenesDataModule, SyntheticScenesDetectionDataModule
from lk_backbones.data.scenes.shapes import SyntheticShapesDataModule
from lk_backbones.data.segmentation import SegmentationDataModule, SegmentationDataset
from lk_backbones.data.segmentation_folder import SegmentationFolderDataModule

__all__ = [
    "IGNORE_INDEX",
    "ADE20KDataModule",
    "CityscapesDataModule",
    "ClassTable",
    "ClassificationDataModule",
    "ClassificationDataset",
    "CocoDataModule",
    "DetectionDataModule",
    "DetectionDataset",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "PictureFolderDataModule",
    "SegmentationDataModule",
    "SegmentationDataset",
    "SegmentationFolderDataModule",
    "SyntheticScenesDataModule",
    "SyntheticScenesDetectionDataModule",
    "SyntheticShapesDataModule",
]
