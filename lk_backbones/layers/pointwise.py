"""Pointwise convolution layer: a drop-in for a 1×1 ``nn.Conv2d`` that is a matrix product where that is faster."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn as nn
from torch import Tensor

from lk_backbones.ops import pointwise_conv2d

__all__ = ["PointwiseConv2d"]

# torch.fx records the op as one call, as it does torch's own convolution.
torch.fx.wrap("pointwise_conv2d")


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` restricted to dense 1×1 kernels, computed by `lk_backbones.ops.pointwise_conv2d`.

    Same constructor, parameters and state dict as ``nn.Conv2d``. With a stride, padding or groups it is ``nn.Conv2d``;
    under TorchScript and in exported models it is always.

    Args:
        *args: As ``nn.Conv2d``.
        **kwargs: As ``nn.Conv2d``; ``kernel_size`` must be 1.

    Raises:
        ValueError: If the kernel is not 1×1.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.kernel_size != (1, 1):
            raise ValueError(f"PointwiseConv2d needs kernel_size=1, got {self.kernel_size}")

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` or ``(C, H, W)`` to what ``nn.Conv2d`` would."""
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        else:  # the else keeps TorchScript's compiler from looking inside
            return self._fast_forward(input)

    @torch.jit.unused
    def _fast_forward(self, input: Tensor) -> Tensor:
        unpadded = self.padding in ((0, 0), "valid", "same")
        # Attributes alone decide: what depends on the input is inside the op, where torch.fx does not look.
        if self.groups != 1 or self.stride != (1, 1) or not unpadded:
            return self._conv_forward(input, self.weight, self.bias)
        return pointwise_conv2d(input, self.weight, self.bias)
