"""Depthwise convolution layer: a drop-in for ``nn.Conv2d(groups=channels)`` that stays fast at large kernels."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from lk_backbones.ops import depthwise_conv2d

__all__ = ["DepthwiseConv2d"]

# Graph tracers see one call, as they do for torch's own convolution.
torch.fx.wrap("depthwise_conv2d")


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` restricted to depthwise convolutions, computed by :func:`lk_backbones.ops.depthwise_conv2d`.

    Same constructor, parameters and state dict as ``nn.Conv2d``. Where the op does not apply (a stride, padding that
    changes the map's size, a padding mode other than zeros, an even kernel), and under TorchScript, it computes
    exactly what ``nn.Conv2d`` does.

    Args:
        *args: As ``nn.Conv2d``.
        **kwargs: As ``nn.Conv2d``; ``groups`` must equal ``in_channels`` and ``out_channels``.

    Raises:
        ValueError: If the convolution is not depthwise.
    """

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **kwargs)
        if not self.groups == self.in_channels == self.out_channels:
            raise ValueError(
                f"DepthwiseConv2d needs in_channels == out_channels == groups, got in_channels={self.in_channels}, "
                f"out_channels={self.out_channels}, groups={self.groups}"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` or ``(C, H, W)`` as ``nn.Conv2d`` would."""
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        else:
            return self._forward(input)

    @torch.jit.unused
    def _forward(self, input: Tensor) -> Tensor:
        same = self.padding == "same" or self.padding == tuple(
            d * (k // 2) for d, k in zip(self.dilation, self.kernel_size, strict=True)
        )
        if (
            self.stride != (1, 1)
            or not same
            or self.padding_mode != "zeros"
            or any(k % 2 == 0 for k in self.kernel_size)
        ):
            return self._conv_forward(input, self.weight, self.bias)
        return depthwise_conv2d(input, self.weight, self.bias, self.dilation)
