"""Modules made of ops."""

from lk_backbones.layers.depthwise import DepthwiseConv2d, replace_depthwise
from lk_backbones.layers.pointwise import PointwiseConv2d
from lk_backbones.layers.reparam import ConvNorm, InputConvNorm, ReparamLargeKernelConv2d, reparameterize

__all__ = [
    "ConvNorm",
    "DepthwiseConv2d",
    "InputConvNorm",
    "PointwiseConv2d",
    "ReparamLargeKernelConv2d",
    "reparameterize",
    "replace_depthwise",
]
