"""Modules made of ops."""

from lk_backbones.layers.depthwise import DepthwiseConv2d, replace_depthwise
from lk_backbones.layers.reparam import ConvNorm, ReparamLargeKernelConv2d, reparameterize

__all__ = ["ConvNorm", "DepthwiseConv2d", "ReparamLargeKernelConv2d", "reparameterize", "replace_depthwise"]
