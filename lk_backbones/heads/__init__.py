"""Heads that segmentation-models-pytorch and torchvision lack."""

from lk_backbones.heads.fcn import FCNHead
from lk_backbones.heads.upernet import OpenMMLabUPerNet

__all__ = ["FCNHead", "OpenMMLabUPerNet"]
