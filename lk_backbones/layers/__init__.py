"""Modules made of ops."""

from lk_backbones.layers.depthwise import DepthwiseConv2d, replace_depthwise
from lk_backbones.layers.fold import (
    embed_kernel,
    fold_norm_into_next,
    fold_norm_into_previous,
    fold_scale_into_previous,
    fold_shift_into_next,
    fold_shift_into_previous,
    is_foldable,
    merge_kernels,
)
from lk_backbones.layers.memory_format import PreferredMemoryFormat
from lk_backbones.layers.packed import PackedConv2d, PackedLinear, called_in_a_row
from lk_backbones.layers.peripheral import (
    KernelPositionEmbedding,
    PeripheralDepthwiseConv2d,
    ReparamPeripheralConv2d,
    peripheral_grid,
)
from lk_backbones.layers.pointwise import PointwiseConv2d
from lk_backbones.layers.reparam import (
    ConvNorm,
    InputConvNorm,
    ReparamDepthwiseConv2d,
    ReparamLargeKernelConv2d,
    prepack_weights,
    reparameterize,
)
from lk_backbones.layers.restore import restore_conv2d

__all__ = [
    "ConvNorm",
    "DepthwiseConv2d",
    "InputConvNorm",
    "KernelPositionEmbedding",
    "PackedConv2d",
    "PackedLinear",
    "PeripheralDepthwiseConv2d",
    "PointwiseConv2d",
    "PreferredMemoryFormat",
    "ReparamDepthwiseConv2d",
    "ReparamLargeKernelConv2d",
    "ReparamPeripheralConv2d",
    "called_in_a_row",
    "embed_kernel",
    "fold_norm_into_next",
    "fold_norm_into_previous",
    "fold_scale_into_previous",
    "fold_shift_into_next",
    "fold_shift_into_previous",
    "is_foldable",
    "merge_kernels",
    "peripheral_grid",
    "prepack_weights",
    "reparameterize",
    "replace_depthwise",
    "restore_conv2d",
]
