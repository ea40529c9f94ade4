"""Modules made of ops."""

from lk_backbones.layers.depthwise import DepthwiseConv2d, replace_depthwise
from lk_backbones.layers.packed import PackedConv2d
from lk_backbones.layers.pointwise import PointwiseConv2d
from lk_backbones.layers.reparam import (
    ConvNorm,
    InputConvNorm,
    ReparamLargeKernelConv2d,
    prepack_weights,
    reparameterize,
)
from lk_backbones.layers.restore import restore_conv2d

__all__ = [
    "ConvNorm",
    "DepthwiseConv2d",
    "InputConvNorm",
    "PackedConv2d",
    "PointwiseConv2d",
    "ReparamLargeKernelConv2d",
    "prepack_weights",
    "reparameterize",
    "replace_depthwise",
    "restore_conv2d",
]
