"""Tensor operations: depthwise convolution with large kernels, fast without anything to compile."""

from lk_backbones.ops.depthwise import depthwise_conv2d, explain

__all__ = ["depthwise_conv2d", "explain"]
