"""Tensor operations: depthwise convolution with large kernels, fast without anything to compile."""

from lk_backbones.ops.bands import bands_conv2d, pack_bands
from lk_backbones.ops.depthwise import depthwise_conv2d, depthwise_conv2d_and_more, explain, has_fused_depthwise
from lk_backbones.ops.measured import (
    Choice,
    choices_file,
    is_measured,
    measure_again,
    measured_choices,
    recorded_choices,
)
from lk_backbones.ops.memory_format import to_preferred_memory_format
from lk_backbones.ops.packed import (
    direct_conv2d,
    ordinary_state,
    pack_direct,
    pack_weight,
    packed_conv2d,
    packed_dtype,
    packed_linear,
)
from lk_backbones.ops.pointwise import pointwise_conv2d

__all__ = [
    "Choice",
    "bands_conv2d",
    "choices_file",
    "depthwise_conv2d",
    "depthwise_conv2d_and_more",
    "direct_conv2d",
    "explain",
    "has_fused_depthwise",
    "is_measured",
    "measure_again",
    "measured_choices",
    "ordinary_state",
    "pack_bands",
    "pack_direct",
    "pack_weight",
    "packed_conv2d",
    "packed_dtype",
    "packed_linear",
    "pointwise_conv2d",
    "recorded_choices",
    "to_preferred_memory_format",
]
