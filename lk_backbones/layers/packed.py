"""Convolutions and linear layers that keep a packed copy of their weight, for inference on CPUs.

What may be packed is decided by exact class: a subclass's ``forward`` may differ. What comes after it in a module is
told by `called_in_a_row`, so that the activation can be computed along.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
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
from lk_backbones.ops import (
    bands_conv2d,
    direct_conv2d,
    ordinary_state,
    pack_bands,
    pack_direct,
    pack_weight,
    packed_conv2d,
    packed_dtype,
    packed_linear,
)
from lk_backbones.ops._paths import plan_for
from lk_backbones.ops._plan import ENVIRONMENT_VARIABLE

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


_Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # padding, stride, dilation, groups

_READ_GEOMETRY = operator.itemgetter("padding", "stride", "dilation", "groups", "padding_mode", "kernel_size")

# A weight, all else that the packed one was made from, and the packed one. Holding the weight keeps another one from
# coming to lie at its address.
_Copy = tuple[Tensor, tuple[Any, ...], Tensor]


@dataclass
class _Copies:
    """Packed copies of a layer's weight: as it is, for the paths of large kernels; and what the last input was like."""

    plain: _Copy | None = None
    direct: _Copy | None = None
    bands: _Copy | None = None
    shape: tuple[int, ...] = ()
    shortcut: _Shortcut | None = None


class _Shortcut:
    """How the last input was computed, for the next one if nothing that counts has changed.

    Between large matrices Python runs from cold caches, where deciding anew takes as long as a small product.
    """

    __slots__ = ("_act", "_approximate", "_attributes", "_bias", "_compute", "_input", "_state", "_values", "_weight")

    def __init__(self, layer: _Packed, input: Tensor, state: object, compute: Callable[[Tensor], Tensor]) -> None:
        weight, bias, act = layer.weight, layer.bias, layer.act
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        self._input = input.dtype, input.shape, input.stride()
        self._weight, self._bias, self._act = weight, bias, act
        self._values = _values(weight, bias)
        self._attributes = layer._attributes(layer.__dict__)
        self._approximate = act.__dict__.get("approximate")
        self._state, self._compute = state, compute

    def take(self, layer: _Packed, input: Tensor) -> Tensor | None:
        """Return the layer's output, or ``None`` if it must be decided anew how to compute it."""
        parameters = layer._parameters
        weight, bias, act = parameters.get("weight"), parameters.get("bias"), self._act
        if (
            weight is self._weight
            and bias is self._bias
            and layer._modules["act"] is act
            and ordinary_state() == self._state
            and type(input) is Tensor
            and input.layout is torch.strided
            and not input.is_nested
            and (input.dtype, input.shape, input.stride()) == self._input
            and input.is_cpu
            and _values(weight, bias) == self._values
            and layer._attributes(layer.__dict__) == self._attributes
            and not (act._forward_hooks or act._forward_pre_hooks)
            and act.__dict__.get("approximate") == self._approximate
        ):
            return self._compute(input)
        return None


def _values(weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """Return what differs when the values of a layer may."""
    if bias is None:
        return weight._version, weight.data_ptr()
    return weight._version, weight.data_ptr(), bias._version, bias.data_ptr()


class _Packed(nn.Module):
    """What a packed convolution and a packed linear layer share."""

    __jit_ignored_attributes__ = ("_packed",)

    def _follow_with(self, act: nn.Module | None) -> None:
        self.act: nn.Module = nn.Identity() if act is None else act
        self._packed = _Copies()

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)``, or ``(*, C)`` in a linear layer, to what the plain layer and the activation would."""
        if torch.jit.is_scripting():
            return self._plain_forward(input)
        else:  # the else keeps TorchScript's compiler from looking inside
            if not torch.compiler.is_dynamo_compiling():
                shortcut = self._packed.shortcut
                output = None if shortcut is None else shortcut.take(self, input)
                if output is not None:
                    return output
            return self._packed_forward(input)

    def _plain_forward(self, input: Tensor) -> Tensor:
        """Compute it as TorchScript can."""
        raise NotImplementedError

    @torch.jit.unused
    def _packed_forward(self, input: Tensor) -> Tensor:
        """Decide how to compute it."""
        raise NotImplementedError

    @torch.jit.unused
    def _attributes(self, attributes: dict[str, Any]) -> tuple[Any, ...]:
        """Return those attributes of the layer that how it is computed depends on, but for tensors."""
        return ()

    @torch.jit.unused
    def _begin(self, input: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute it, as the next calls may too once an input of that shape comes again."""
        copies, state, bias = self._packed, ordinary_state(), self.bias
        lasting = copies.shape == input.shape and state is not None
        lasting = lasting and not (isinstance(bias, Tensor) and bias.is_inference())  # which count no changes
        copies.shape, copies.shortcut = input.shape, _Shortcut(self, input, state, compute) if lasting else None
        return compute(input)

    @torch.jit.unused
    def _packed_dtype(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
        """Return the dtype of a packed copy that can be used; drop all copies where the weight is being trained.

        PyTorch does not count what its fused optimisers change.
        """
        if torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling():
            self._packed = _Copies()
        return packed_dtype(input, weight, bias)

    @torch.jit.unused
    def _packed_weight(
        self,
        weight: Tensor,
        dtype: torch.dtype,
        input_shape: tuple[int, ...] = (),
        geometry: _Geometry = ((0, 0), (1, 1), (1, 1), 1),
    ) -> Tensor:
        """Return the packed copy, made anew if the weight or what it is packed for has changed."""
        source = weight.data_ptr(), weight._version, dtype, geometry
        copy = self._packed.plain
        if copy is None or copy[0] is not weight or copy[1] != source:
            self._packed.plain = copy = weight, source, pack_weight(weight, input_shape, *geometry, dtype=dtype)
        return copy[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": _Copies()}  # a packed weight can be neither copied nor pickled

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = _Copies()
        return super()._apply(*args, **kwargs)


class PackedConv2d(_Packed, nn.Conv2d):
    """``nn.Conv2d`` and the activation after it, with a packed copy of the weight.

    The copy takes as much memory as the weight (half of a float32 weight's under autocast), is made at the first call
    that can use it and made anew when the weight has changed or was trained, but for a change through ``weight.data``,
    which PyTorch does not count, and when autocast is turned on or off. Calls can use it in float32, and in bfloat16 or
    under its autocast where the processor has AVX512-BF16 or AMX; channels_last, no gradient wanted. State dict, copies
    and pickles are as without it. Where the copy cannot be used, the layer computes what its parts would. How an input
    is computed is decided anew when anything differs from the last one. `pack` makes one of an existing layer.

    Args:
        *args: As ``nn.Conv2d``.
        act: The activation, or ``None`` for none.
        **kwargs: As ``nn.Conv2d``.
    """

    def __init__(self, *args: Any, act: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._follow_with(act)

    def _plain_forward(self, input: Tensor) -> Tensor:
        return self.act(self._conv_forward(input, self.weight, self.bias))

    @torch.jit.unused
    def _packed_forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):  # a graph holds what others can read
            return self.act(self._unpacked(input))
        weight, bias, act, padding = self.weight, self.bias, self.act, self.padding  # modules look them up slowly
        activation, dtype = _onednn_activation(act), self._packed_dtype(input, weight, bias)
        compute = None
        if dtype and activation and not isinstance(padding, str) and self.padding_mode == "zeros":
            geometry = padding, self.stride, self.dilation, self.groups  # read anew, as users change attributes
            compute = self._way(input, weight, bias, dtype, activation, geometry)
        if compute is None:
            return self._compute_unpacked(input, act, activation)
        return self._begin(input, compute)

    @torch.jit.unused
    def _attributes(self, attributes: dict[str, Any]) -> tuple[Any, ...]:
        return _READ_GEOMETRY(attributes)

    @torch.jit.unused
    def _way(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        activation: tuple[str, str],
        geometry: _Geometry,
    ) -> Callable[[Tensor], Tensor] | None:
        """Return how to compute it with a packed weight, or ``None`` where that is not the best way."""
        packed = self._packed_weight(weight, dtype, input.shape, geometry)
        return lambda input: packed_conv2d(input, packed, bias, *geometry, activation)

    @torch.jit.unused
    def _compute_unpacked(self, input: Tensor, act: nn.Module, activation: tuple[str, str] | None) -> Tensor:
        """Compute it and the activation without a packed weight."""
        output: Tensor = act(self._unpacked(input))
        return output

    @torch.jit.unused
    def _unpacked(self, input: Tensor) -> Tensor:
        """Compute it by other means."""
        return self._conv_forward(input, self.weight, self.bias)


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

    def _plain_forward(self, input: Tensor) -> Tensor:
        return self.act(F.linear(input, self.weight, self.bias))

    @torch.jit.unused
    def _packed_forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):  # a graph holds what others can read
            return self.act(F.linear(input, self.weight, self.bias))
        weight, bias, act = self.weight, self.bias, self.act
        activation, dtype = _onednn_activation(act), self._packed_dtype(input, weight, bias)
        if dtype is None or activation is None:
            output: Tensor = act(F.linear(input, weight, bias))
            return output
        packed = self._packed_weight(weight, dtype)
        return self._begin(input, lambda input: packed_linear(input, packed, bias, activation))


class PackedPointwiseConv2d(PackedConv2d, PointwiseConv2d):
    """`PackedConv2d` for `PointwiseConv2d`."""

    @torch.jit.unused
    def _unpacked(self, input: Tensor) -> Tensor:
        return self._fast_forward(input)


class PackedDepthwiseConv2d(PackedConv2d, DepthwiseConv2d):
    """`PackedConv2d` for `DepthwiseConv2d`, but for what runs through transforms or is dilated.

    On CUDA devices nothing is packed, but a ReLU is computed along where tensor cores do the convolution.

    In bfloat16 on processors with AMX a large kernel is packed as band matrices (`lk_backbones.ops.pack_bands`), which
    fit one width of maps: that of the first call, and another one when two calls in a row have it. Their memory is
    ``2 * C * kH * W * W`` bytes.
    """

    @torch.jit.unused
    def _compute_unpacked(self, input: Tensor, act: nn.Module, activation: tuple[str, str] | None) -> Tensor:
        if activation == ("relu", "") and (output := self.plus(input, relu=True)) is not None:
            return output
        return super()._compute_unpacked(input, act, activation)

    @torch.jit.unused
    def _unpacked(self, input: Tensor) -> Tensor:
        return self._fast_forward(input)

    @torch.jit.unused
    def _attributes(self, attributes: dict[str, Any]) -> tuple[Any, ...]:
        return *super()._attributes(attributes), os.environ.get(ENVIRONMENT_VARIABLE)

    @torch.jit.unused
    def _way(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        activation: tuple[str, str],
        geometry: _Geometry,
    ) -> Callable[[Tensor], Tensor] | None:
        dilation, path = (self.dilation[0], self.dilation[1]), "native"
        if self.stride == (1, 1) and self._keeps_size():
            path = plan_for(input, weight, dilation, "auto", "cpu", packed=True, dtype=dtype).forward
        if path == "native":
            return super()._way(input, weight, bias, dtype, activation, geometry)
        bands = self._packed_bands(weight, input.shape) if path == "bands" else None
        if bands is not None:
            return lambda input: bands_conv2d(input, bands, bias, activation)
        if path == "fft" or dilation != (1, 1):
            return None
        direct = self._packed_direct(weight, input.shape)
        return lambda input: direct_conv2d(input, direct, bias, activation)

    @torch.jit.unused
    def _packed_direct(self, weight: Tensor, shape: torch.Size) -> Tensor:
        """Return the packed copy for the path ``"direct"``, made anew if the weight has changed."""
        copy, source = self._packed.direct, (weight.data_ptr(), weight._version)
        if copy is None or copy[0] is not weight or copy[1] != source:
            self._packed.direct = copy = weight, source, pack_direct(weight, shape)
        return copy[2]

    @torch.jit.unused
    def _packed_bands(self, weight: Tensor, shape: torch.Size) -> Tensor | None:
        """Return the band matrices for maps of that width, or ``None`` if they are for another one."""
        width, copies = shape[3], self._packed
        source, copy = (weight.data_ptr(), weight._version, width), copies.bands
        if copy is not None and copy[1][2] != width and copies.shape[3:] != (width,):
            return None
        if copy is None or copy[0] is not weight or copy[1] != source:
            copies.bands = copy = weight, source, pack_bands(weight, shape)
        return copy[2]


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
