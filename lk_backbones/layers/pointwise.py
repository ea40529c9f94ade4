"""Pointwise convolution layer: a drop-in for a 1×1 ``nn.Conv2d`` that is a matrix product where that is faster."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.fx
import torch.nn as nn
from torch import Tensor

from lk_backbones.ops import (
    pack_pointwise_weight,
    packed_pointwise_conv2d,
    pointwise_conv2d,
    takes_packed_weight,
)

__all__ = ["PackedPointwiseConv2d", "PointwiseConv2d"]

# torch.fx records the op as one call, as it does torch's own convolution.
torch.fx.wrap("pointwise_conv2d")


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` restricted to dense 1×1 kernels, computed by :func:`lk_backbones.ops.pointwise_conv2d`.

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
        if not self._is_product(input):
            return self._conv_forward(input, self.weight, self.bias)
        return pointwise_conv2d(input, self.weight, self.bias)

    @torch.jit.unused
    def _is_product(self, input: Tensor) -> bool:
        """Whether every output pixel is a matrix times the input pixel; read anew, as users change attributes."""
        unpadded = self.padding in ((0, 0), "valid", "same")
        return input.dim() == 4 and self.groups == 1 and self.stride == (1, 1) and unpadded


class PackedPointwiseConv2d(PointwiseConv2d):
    """:class:`PointwiseConv2d` and the activation after it, for inference on CPUs: keeps a packed copy of its weight.

    The copy takes as much memory as the weight, is made at the first call that can use it (float32, channels_last, no
    gradient wanted) and made anew when the weight has changed, but for a change through ``weight.data``, which PyTorch
    does not count. State dict, copies and pickles are as without it. Where the copy cannot be used, the layer computes
    what its parts would.

    Args:
        *args: As ``nn.Conv2d``.
        act: The activation, or ``None`` for none.
        **kwargs: As ``nn.Conv2d``; ``kernel_size`` must be 1.
    """

    __jit_ignored_attributes__ = ("_packed",)

    def __init__(self, *args: Any, act: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._follow_with(nn.Identity() if act is None else act)

    def _follow_with(self, act: nn.Module) -> None:
        self.act: nn.Module = act
        # The weight's address and version that it was made from, and the packed weight.
        self._packed: tuple[int, int, Tensor] | None = None

    @classmethod
    def from_layer(cls, conv: PointwiseConv2d, act: nn.Module) -> PackedPointwiseConv2d:
        """Turn ``conv`` itself, hooks and all, into a packed layer followed by ``act``."""
        conv.__class__ = cls
        packed = cast(PackedPointwiseConv2d, conv)
        packed._follow_with(act)
        return packed

    @staticmethod
    def fuses(act: nn.Module) -> bool:
        """Whether oneDNN computes ``act`` along with the product."""
        return _onednn_activation(act) is not None

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` or ``(C, H, W)`` to what ``nn.Conv2d`` and the activation would."""
        if torch.jit.is_scripting():
            return self.act(self._conv_forward(input, self.weight, self.bias))
        else:
            return self._packed_forward(input)

    @torch.jit.unused
    def _packed_forward(self, input: Tensor) -> Tensor:
        activation, weight = _onednn_activation(self.act), self.weight
        usable = activation is not None and self._is_product(input) and takes_packed_weight(input, weight)
        if activation is None or not usable or weight.is_inference():  # whose changes are not counted
            return self.act(self._fast_forward(input))
        source = weight.data_ptr(), weight._version
        if self._packed is None or self._packed[:2] != source:
            self._packed = (*source, pack_pointwise_weight(weight))
        return packed_pointwise_conv2d(input, self._packed[2], self.bias, activation)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a packed weight can be neither copied nor pickled

    def _apply(self, *args: Any, **kwargs: Any) -> PackedPointwiseConv2d:
        self._packed = None
        return super()._apply(*args, **kwargs)


def _onednn_activation(act: nn.Module) -> tuple[str, str] | None:
    """oneDNN's name for ``act`` and its variant, or ``None`` where it has none or hooks want to see its input."""
    if act._forward_hooks or act._forward_pre_hooks:
        return None
    if type(act) is nn.GELU:
        return "gelu", act.approximate
    return {nn.Identity: ("none", ""), nn.ReLU: ("relu", "")}.get(type(act))
