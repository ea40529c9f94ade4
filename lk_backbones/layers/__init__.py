"""Modules made of ops."""

from lk_backbones.layers.depthwise import DepthwiseConv2d, replace_depthwise

__all__ = ["DepthwiseConv2d", "replace_depthwise"]
