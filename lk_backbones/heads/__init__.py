"""Heads that segmentation-models-pytorch and torchvision lack, and detectors by name."""

from lk_backbones.heads.detection import DETECTORS, build_detector
from lk_backbones.heads.fcn import FCNHead
from lk_backbones.heads.upernet import OpenMMLabUPerNet

__all__ = ["DETECTORS", "FCNHead", "OpenMMLabUPerNet", "build_detector"]
