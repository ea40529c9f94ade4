"""Convolution layers that keep a packed copy of their weight, for inference on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn as nn
from torch import Tensor

from lk_backbones.layers.depthwise import DepthwiseConv2d
from lk_backbones.layers.pointwise import PointwiseConv2d
from lk_backbones.ops import explain, pack_weight, packed_conv2d, takes_packed_weight

__all__ = ["PackedConv2d", "PackedDepthwiseConv2d", "PackedPointwiseConv2d", "fuses", "pack", "unpack"]


class PackedConv2d(nn.Conv2d):
    """``nn.Conv2d`` and the activation after it, with a packed copy of the weight.

    The copy takes as much memory as the weight, is made at the first call that can use it (float32, channels_last, no
    gradient wanted) and made anew when the weight has changed, but for a change through ``weight.data``, which PyTorch
    does not count. State dict, copies and pickles are as without it. Where the copy cannot be used, the layer computes
    what its parts would. `pack` makes one of an existing layer.

    Args:
        *args: As ``nn.Conv2d``.
        act: The activation, or ``None`` for none.
        **kwargs: As ``nn.Conv2d``.
    """

    __jit_ignored_attributes__ = ("_packed",)

    def __init__(self, *args: Any, act: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._follow_with(act)

    def _follow_with(self, act: nn.Module | None) -> None:
        self.act: nn.Module = nn.Identity() if act is None else act
        # A weight, all else that the packed one was made from, and the packed one. Holding the weight keeps another one
        # from coming to lie at its address.
        self._packed: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` or ``(C, H, W)`` to what ``nn.Conv2d`` and the activation would."""
        if torch.jit.is_scripting():
            return self.act(self._conv_forward(input, self.weight, self.bias))
        else:
            return self._packed_forward(input)

    @torch.jit.unused
    def _packed_forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):  # a graph holds what others can read
            return self.act(self._unpacked(input))
        activation, weight, padding = _onednn_activation(self.act), self.weight, self.padding
        simple = input.dim() == 4 and self.padding_mode == "zeros" and takes_packed_weight(input, weight)
        if activation is None or isinstance(padding, str) or not simple or not self._is_native(input):
            return self.act(self._unpacked(input))
        geometry = padding, self.stride, self.dilation, self.groups  # read anew, as users change attributes
        source = weight.data_ptr(), weight._version, geometry
        packed = self._packed
        if packed is None or packed[0] is not weight or packed[1] != source:
            self._packed = packed = weight, source, pack_weight(weight, input.shape, *geometry)
        return packed_conv2d(input, packed[2], self.bias, *geometry, activation)

    @torch.jit.unused
    def _unpacked(self, input: Tensor) -> Tensor:
        """The convolution by other means."""
        return self._conv_forward(input, self.weight, self.bias)

    @torch.jit.unused
    def _is_native(self, input: Tensor) -> bool:
        """Whether oneDNN is the best way to compute it."""
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a packed weight can be neither copied nor pickled

    def _apply(self, *args: Any, **kwargs: Any) -> PackedConv2d:
        self._packed = None
        return super()._apply(*args, **kwargs)


class PackedPointwiseConv2d(PackedConv2d, PointwiseConv2d):
    """`PackedConv2d` for `PointwiseConv2d`."""

    @torch.jit.unused
    def _unpacked(self, input: Tensor) -> Tensor:
        return self._fast_forward(input)


class PackedDepthwiseConv2d(PackedConv2d, DepthwiseConv2d):
    """`PackedConv2d` for `DepthwiseConv2d`, but for what runs through transforms."""

    @torch.jit.unused
    def _unpacked(self, input: Tensor) -> Tensor:
        return self._fast_forward(input)

    @torch.jit.unused
    def _is_native(self, input: Tensor) -> bool:
        if self.stride != (1, 1) or not self._keeps_size():
            return True
        return explain(input, self.weight, (self.dilation[0], self.dilation[1])).forward == "native"


_PACKED: dict[type[nn.Module], type[PackedConv2d]] = {
    nn.Conv2d: PackedConv2d,
    PointwiseConv2d: PackedPointwiseConv2d,
    DepthwiseConv2d: PackedDepthwiseConv2d,
}
_UNPACKED: dict[type[nn.Module], type[nn.Module]] = {packed: plain for plain, packed in _PACKED.items()}


def pack(conv: nn.Module, act: nn.Module | None = None) -> bool:
    """Turn ``conv`` itself, hooks and all, into a packed layer followed by ``act``.

    Args:
        conv: A convolution.
        act: An activation that `fuses` takes, or ``None`` for none.

    Returns:
        Whether there is a packed layer for it; subclasses, whose forward may differ, are left alone.
    """
    packed = _PACKED.get(type(conv))
    if packed is None:
        return False
    conv.__class__ = packed
    assert isinstance(conv, PackedConv2d)
    conv._follow_with(act)
    return True


def unpack(conv: nn.Module) -> nn.Module:
    """Undo `pack`: turn ``conv`` itself, hooks and all, into the layer that it was before.

    Args:
        conv: A convolution; one that is not packed stays as it is.

    Returns:
        The activation that followed it, an identity if there was none.
    """
    plain = _UNPACKED.get(type(conv))
    if plain is None:
        return nn.Identity()
    act = conv.act
    assert isinstance(act, nn.Module)
    del conv.act, conv._packed
    conv.__class__ = plain
    return act


def fuses(act: nn.Module) -> bool:
    """Whether oneDNN computes ``act`` along with the convolution."""
    return _onednn_activation(act) is not None


def _onednn_activation(act: nn.Module) -> tuple[str, str] | None:
    """oneDNN's name for ``act`` and its variant, or ``None`` where it has none or hooks want to see its input."""
    if act._forward_hooks or act._forward_pre_hooks:
        return None
    if type(act) is nn.GELU:
        return "gelu", act.approximate
    return {nn.Identity: ("none", ""), nn.ReLU: ("relu", "")}.get(type(act))
