"""Depthwise convolution layer: a drop-in for ``nn.Conv2d(groups=channels)`` that stays fast at large kernels."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.fx
import torch.nn as nn
from torch import Tensor

from lk_backbones.ops import depthwise_conv2d, depthwise_conv2d_and_more, has_fused_depthwise

__all__ = ["DepthwiseConv2d", "replace_depthwise"]

ModuleType = TypeVar("ModuleType", bound=nn.Module)

# torch.fx records the op as one call, as it does torch's own convolution.
torch.fx.wrap("depthwise_conv2d")


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` restricted to depthwise convolutions, computed by `lk_backbones.ops.depthwise_conv2d`.

    Same constructor, parameters and state dict as ``nn.Conv2d``. Where the op does not apply (a stride, padding that
    changes the map's size, padding with other than zeros, an even kernel) it is ``nn.Conv2d``; under TorchScript and
    in exported models it is always.

    Args:
        *args: As ``nn.Conv2d``.
        **kwargs: As ``nn.Conv2d``; ``groups`` must equal ``in_channels`` and ``out_channels``.

    Raises:
        ValueError: If the convolution is not depthwise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.groups == self.in_channels == self.out_channels:
            raise ValueError(
                "DepthwiseConv2d needs groups == in_channels == out_channels, got "
                f"groups={self.groups}, in_channels={self.in_channels}, out_channels={self.out_channels}"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` or ``(C, H, W)`` to what ``nn.Conv2d`` would, of the same shape unless strided."""
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        else:  # the else keeps TorchScript's compiler from looking inside
            return self._fast_forward(input)

    @torch.jit.unused
    def _fast_forward(self, input: Tensor) -> Tensor:
        if self.stride != (1, 1) or self.padding_mode != "zeros" or not self._keeps_size():
            return self._conv_forward(input, self.weight, self.bias)
        return depthwise_conv2d(input, self.weight, self.bias, (self.dilation[0], self.dilation[1]))

    @torch.jit.unused
    def plus(self, input: Tensor, addend: Tensor | None = None, relu: bool = False) -> Tensor | None:
        """Compute the convolution, a sum and a ReLU in one pass, for inference where the device saves time by it.

        Args:
            input: ``(N, C, H, W)``.
            addend: ``(N, C, H, W)`` to be added, or ``None``.
            relu: Whether negative values become zero at last.

        Returns:
            The result, or ``None`` where there is nothing to save or somebody must see the parts: then compute these.
        """
        if isinstance(input, torch.fx.Proxy) or not has_fused_depthwise(input, self.weight, self.bias, addend):
            return None
        if self.stride != (1, 1) or self.padding_mode != "zeros" or not self._keeps_size():
            return None
        dilation = self.dilation[0], self.dilation[1]
        return depthwise_conv2d_and_more(input, self.weight, self.bias, addend, relu, dilation)

    @torch.jit.unused
    def _keeps_size(self) -> bool:
        """Return whether padding centres odd kernels; read anew each time, as users change attributes."""
        if any(size % 2 == 0 for size in self.kernel_size):
            return False
        same = tuple(step * (size // 2) for step, size in zip(self.dilation, self.kernel_size, strict=True))
        return self.padding == "same" or self.padding == same


def replace_depthwise(model: ModuleType) -> ModuleType:
    """Make every depthwise ``nn.Conv2d`` of ``model`` a `DepthwiseConv2d`, in place.

    Parameters, hooks, state dict and outputs stay the same. Subclasses of ``nn.Conv2d`` are left alone, as their
    forward may differ.

    Args:
        model: Any module, such as one of timm's ConvNeXt models.

    Returns:
        ``model``.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == module.in_channels == module.out_channels:
            # The class alone is what differs; a new module would lose hooks and whatever refers to the old one.
            module.__class__ = DepthwiseConv2d
    return model
