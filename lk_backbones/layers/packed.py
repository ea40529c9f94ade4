"""Convolutions and linear layers that keep a packed copy of their weight, for inference on CPUs.

What may be packed is decided by exact class: a subclass's ``forward`` may differ. What comes after it in a module is
told by `called_in_a_row`, so that the activation can be computed along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import GELU, ConvMlp, GELUTanh, GlobalResponseNormMlp, Mlp
from torch import Tensor

from lk_backbones._private.torch import hooks_see_input, hooks_see_output
from lk_backbones.layers.depthwise import DepthwiseConv2d
from lk_backbones.layers.pointwise import PointwiseConv2d
from lk_backbones.ops import explain, pack_weight, packed_conv2d, packed_linear, takes_packed_weight
from lk_backbones.ops._plan import operand_dtype

__all__ = [
    "PackedConv2d",
    "PackedDepthwiseConv2d",
    "PackedLinear",
    "PackedPointwiseConv2d",
    "called_in_a_row",
    "fuses",
    "pack",
    "pack_inside",
    "unpack",
    "unpack_inside",
]

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])


class _Packed(nn.Module):
    """What a packed convolution and a packed linear layer share."""

    __jit_ignored_attributes__ = ("_packed",)

    def _follow_with(self, act: nn.Module | None) -> None:
        self.act: nn.Module = nn.Identity() if act is None else act
        # A weight, all else that the packed one was made from, and the packed one. Holding the weight keeps another one
        # from coming to lie at its address.
        self._packed: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    @torch.jit.unused
    def _takes(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Return whether the packed copy can be used; drop it where the weight is being trained.

        PyTorch does not count what its fused optimisers change.
        """
        if weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._packed = None
        return takes_packed_weight(input, weight, bias)

    @torch.jit.unused
    def _packed_weight(self, weight: Tensor, *arguments: Any) -> Tensor:
        """Return the packed copy, made anew if the weight or what it is packed for has changed."""
        dtype = operand_dtype(weight)
        source = weight.data_ptr(), weight._version, dtype, arguments[1:]  # without the shape of the input
        packed = self._packed
        if packed is None or packed[0] is not weight or packed[1] != source:
            self._packed = packed = weight, source, pack_weight(weight, *arguments, dtype=dtype)
        return packed[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a packed weight can be neither copied nor pickled

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = None
        return super()._apply(*args, **kwargs)


class PackedConv2d(_Packed, nn.Conv2d):
    """``nn.Conv2d`` and the activation after it, with a packed copy of the weight.

    The copy takes as much memory as the weight (half of a float32 weight's under autocast), is made at the first call
    that can use it and made anew when the weight has changed or was trained, but for a change through ``weight.data``,
    which PyTorch does not count, and when autocast is turned on or off. Calls can use it in float32, and in bfloat16 or
    under its autocast where the processor has AVX512-BF16 or AMX; channels_last, no gradient wanted. State dict, copies
    and pickles are as without it. Where the copy cannot be used, the layer computes what its parts would. `pack` makes
    one of an existing layer.

    Args:
        *args: As ``nn.Conv2d``.
        act: The activation, or ``None`` for none.
        **kwargs: As ``nn.Conv2d``.
    """

    def __init__(self, *args: Any, act: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._follow_with(act)

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
        simple = self._takes(input, weight, self.bias) and self.padding_mode == "zeros"
        if activation is None or isinstance(padding, str) or not simple or not self._is_native(input):
            return self.act(self._unpacked(input))
        geometry = padding, self.stride, self.dilation, self.groups  # read anew, as users change attributes
        packed = self._packed_weight(weight, input.shape, *geometry)
        return packed_conv2d(input, packed, self.bias, *geometry, activation)

    @torch.jit.unused
    def _unpacked(self, input: Tensor) -> Tensor:
        """Compute it by other means."""
        return self._conv_forward(input, self.weight, self.bias)

    @torch.jit.unused
    def _is_native(self, input: Tensor) -> bool:
        """Return whether oneDNN is the best way to compute it."""
        return True


class PackedLinear(_Packed, nn.Linear):
    """``nn.Linear`` and the activation after it, with a packed copy of the weight, as `PackedConv2d`.

    Args:
        *args: As ``nn.Linear``.
        act: The activation, or ``None`` for none.
        **kwargs: As ``nn.Linear``.
    """

    def __init__(self, *args: Any, act: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._follow_with(act)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(*, in_features)`` to what ``nn.Linear`` and the activation would, ``(*, out_features)``."""
        if torch.jit.is_scripting():
            return self.act(F.linear(input, self.weight, self.bias))
        else:
            return self._packed_forward(input)

    @torch.jit.unused
    def _packed_forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):  # a graph holds what others can read
            return self.act(F.linear(input, self.weight, self.bias))
        activation, weight = _onednn_activation(self.act), self.weight
        if not self._takes(input, weight, self.bias) or activation is None:
            return self.act(F.linear(input, weight, self.bias))
        return packed_linear(input, self._packed_weight(weight), self.bias, activation)


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


_PACKED: dict[type[nn.Module], type[_Packed]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    PointwiseConv2d: PackedPointwiseConv2d,
    DepthwiseConv2d: PackedDepthwiseConv2d,
}
_UNPACKED: dict[type[nn.Module], type[nn.Module]] = {packed: plain for plain, packed in _PACKED.items()}

_ONEDNN_ACTIVATIONS: dict[type[nn.Module], tuple[str, str]] = {
    nn.Identity: ("none", ""),
    nn.ReLU: ("relu", ""),
    GELU: ("gelu", "none"),  # timm's, of the name "gelu"
    GELUTanh: ("gelu", "tanh"),
}

# Class to names of children, a layer first and an activation last.
_IN_A_ROW: dict[type[nn.Module], tuple[str, ...]] = {}


def called_in_a_row(*names: str) -> Callable[[ModuleClass], ModuleClass]:
    """Declare that a module's ``forward`` calls these children one right after the other, for class decoration.

    Where all between the first and the last are identities (a norm that was folded), `pack_inside` lets the first
    compute the last along. Subclasses are not meant: their ``forward`` may differ.

    Args:
        *names: Of a convolution or linear layer, of what may come between, and of an activation.

    Returns:
        The decorator; it returns the class unchanged.
    """

    def declare(module_class: ModuleClass) -> ModuleClass:
        _IN_A_ROW[module_class] = names
        return module_class

    return declare


# timm's blocks of two layers
called_in_a_row("fc1", "act")(Mlp)
called_in_a_row("fc1", "act")(GlobalResponseNormMlp)
called_in_a_row("fc1", "norm", "act")(ConvMlp)


def pack_inside(model: nn.Module) -> None:
    """`pack` every layer inside ``model`` along with the activations that `called_in_a_row` tells of, in place.

    Args:
        model: Any module, in ``eval()`` mode.
    """
    parents: dict[nn.Module, int] = {}
    for module in model.modules():
        for child in set(module.children()):
            parents[child] = parents.get(child, 0) + 1
    for module in model.modules():
        names = _IN_A_ROW.get(type(module))
        if names is None or _is_patched(module):
            continue
        row = [part for part in (getattr(module, name, None) for name in names) if isinstance(part, nn.Module)]
        if len(row) < len(names):
            continue  # someone took a part out
        first, *between, last = row
        plain = all(type(m) is nn.Identity and not hooks_see_input(m) for m in between)
        # a layer that others call too has no activation there
        if plain and not hooks_see_output(first) and parents[first] == 1 and fuses(last) and pack(first, last):
            setattr(module, names[-1], nn.Identity())
    for module in list(model.modules()):
        pack(module)


def unpack_inside(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Undo `pack_inside`, in place.

    Args:
        model: Any module.

    Returns:
        Activations without a place of their own, by the layer that they follow.
    """
    for module in model.modules():
        names = _IN_A_ROW.get(type(module))
        if names is not None and isinstance(getattr(module, names[-1], None), nn.Identity):
            act = unpack(getattr(module, names[0]))
            if not isinstance(act, nn.Identity):
                setattr(module, names[-1], act)
    followed = {module: unpack(module) for module in list(model.modules())}
    return {module: act for module, act in followed.items() if not isinstance(act, nn.Identity)}


def pack(layer: nn.Module, act: nn.Module | None = None) -> bool:
    """Turn ``layer`` itself, hooks and all, into a packed layer followed by ``act``.

    Args:
        layer: A convolution or linear layer.
        act: An activation that `fuses` takes, or ``None`` for none.

    Returns:
        Whether there is a packed layer for it. Left alone are subclasses, and layers with a ``forward`` of their own or
        with a weight that something computes anew for every call (pruning, weight normalisation).
    """
    packed = _PACKED.get(type(layer))
    if packed is None or _is_patched(layer) or "weight" not in dict(layer.named_parameters(recurse=False)):
        return False
    layer.__class__ = packed
    assert isinstance(layer, _Packed)
    layer._follow_with(act)
    return True


def unpack(layer: nn.Module) -> nn.Module:
    """Undo `pack`: turn ``layer`` itself, hooks and all, into the layer that it was before.

    Args:
        layer: A convolution or linear layer; one that is not packed stays as it is.

    Returns:
        The activation that followed it, an identity if there was none.
    """
    plain = _UNPACKED.get(type(layer))
    if plain is None:
        return nn.Identity()
    act = layer.act
    assert isinstance(act, nn.Module)
    del layer.act, layer._packed
    layer.__class__ = plain
    return act


def fuses(act: nn.Module) -> bool:
    """Return whether oneDNN computes ``act`` along with the layer before it."""
    return _onednn_activation(act) is not None


def _is_patched(module: nn.Module) -> bool:
    """Return whether the module itself, not its class, has a ``forward``."""
    return "forward" in module.__dict__


def _onednn_activation(act: nn.Module) -> tuple[str, str] | None:
    """oneDNN's name for ``act`` and its variant, or ``None`` where it has none or hooks want to see its input."""
    if hooks_see_input(act):
        return None
    if type(act) is nn.GELU:
        return "gelu", act.approximate
    return _ONEDNN_ACTIVATIONS.get(type(act))
