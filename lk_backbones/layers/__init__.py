"""Modules made of ops."""

from lk_backbones.layers.depthwise import DepthwiseConv2d

__all__ = ["DepthwiseConv2d"]
