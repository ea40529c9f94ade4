"""Tensor operations: depthwise convolution with large kernels, fast without anything to compile."""

from lk_backbones.ops.depthwise import depthwise_conv2d, depthwise_conv2d_and_more, explain, has_fused_depthwise
from lk_backbones.ops.measured import Choice, choices_file, is_measured, measured_choices, recorded_choices
from lk_backbones.ops.memory_format import to_preferred_memory_format
from lk_backbones.ops.packed import pack_weight, packed_conv2d, packed_linear, takes_packed_weight
from lk_backbones.ops.pointwise import pointwise_conv2d

__all__ = [
    "Choice",
    "choices_file",
    "depthwise_conv2d",
    "depthwise_conv2d_and_more",
    "explain",
    "has_fused_depthwise",
    "is_measured",
    "measured_choices",
    "pack_weight",
    "packed_conv2d",
    "packed_linear",
    "pointwise_conv2d",
    "recorded_choices",
    "takes_packed_weight",
    "to_preferred_memory_format",
]
