"""Structural re-parameterisation: train with parallel branches and norms, deploy one convolution.

Every foldable module here has ``reparameterize()``, the hook that ``timm.utils.reparameterize_model`` calls, so timm's
function and `reparameterize` below do the same. A fold computes in float64, on the CPU whatever the device, and
never changes the function that the module computes in ``eval()`` mode.
"""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_act_layer
from timm.utils.model import reparameterize_model
from torchvision.ops import FrozenBatchNorm2d

from lk_backbones.layers.create import ActLayer, NormLayer, create_norm
from lk_backbones.layers.depthwise import DepthwiseConv2d
from lk_backbones.layers.packed import fuses, pack, unpack
from lk_backbones.layers.pointwise import PointwiseConv2d
from lk_backbones.ops import to_preferred_memory_format

__all__ = [
    "ConvNorm",
    "InputConvNorm",
    "ReparamLargeKernelConv2d",
    "fold_norm_into_next",
    "fold_norm_into_previous",
    "is_foldable",
    "prepack_weights",
    "reparameterize",
]

# torch.fx records it as one call.
torch.fx.wrap("to_preferred_memory_format")

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """The values in float64, on the CPU: some accelerators (Apple's) have no float64."""
    tensor = tensor.detach()
    return (tensor if tensor.is_meta else tensor.cpu()).double()


def is_foldable(norm: nn.Module) -> bool:
    """Whether ``norm`` is, in ``eval()``, a scale and a shift per channel: a batch norm, be it synchronised or frozen.

    A subclass may compute something more, such as an activation; then it has a ``forward`` of its own.
    """
    known = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
    return type(norm).forward in [cls.forward for cls in known] and isinstance(norm.running_mean, torch.Tensor)


def _affine(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, float64 ``(C,)``, of a batch norm (of any class: plain, synchronised, frozen) in ``eval()``.

    Raises:
        ValueError: If it is no batch norm, or has no running statistics.
    """
    if not is_foldable(norm):
        raise ValueError(f"only a batch norm with running statistics can be folded, got {norm}")
    mean, variance = _exact(cast(torch.Tensor, norm.running_mean)), _exact(cast(torch.Tensor, norm.running_var))
    weight = torch.ones_like(mean) if norm.weight is None else _exact(cast(torch.Tensor, norm.weight))
    bias = torch.zeros_like(mean) if norm.bias is None else _exact(cast(torch.Tensor, norm.bias))
    scale = weight / (variance + cast(float, norm.eps)).sqrt()
    return scale, bias - mean * scale


def _set_folded(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Replace the parameters of ``conv`` by folded ones, keeping its dtype, device and memory format."""
    like = conv.weight
    requires_grad = like.requires_grad
    # The dtype first: the device may not have the one that they were computed in.
    conv.weight = nn.Parameter(weight.to(like.dtype).to(like.device), requires_grad=requires_grad)
    conv.bias = nn.Parameter(bias.to(like.dtype).to(like.device), requires_grad=requires_grad)


def _weight_and_bias(conv: nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
    weight = _exact(conv.weight)
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else _exact(conv.bias)
    return weight, bias


def fold_norm_into_previous(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Fold the batch norm that follows ``conv`` into it, in place.

    Args:
        conv: Convolution with weight ``(O, I, kH, kW)``.
        norm: Batch norm over its ``O`` output channels, read in ``eval()`` sense (running statistics).

    Raises:
        ValueError: If ``norm`` is no batch norm with running statistics.
    """
    weight, bias = _weight_and_bias(conv)
    scale, shift = _affine(norm)
    _set_folded(conv, weight * scale[:, None, None, None], bias * scale + shift)


def fold_norm_into_next(norm: nn.Module, conv: nn.Conv2d) -> None:
    """Fold the batch norm in front of a 1×1 convolution into that convolution, in place.

    Args:
        norm: Batch norm over the ``I`` input channels of ``conv``.
        conv: Dense convolution with weight ``(O, I, 1, 1)`` and no padding. With padding the fold would be wrong at the
            border, where the convolution sees zeros rather than normalised zeros.

    Raises:
        ValueError: If ``conv`` is padded, grouped or larger than 1×1, or ``norm`` is no batch norm with running
            statistics.
    """
    if conv.kernel_size != (1, 1) or conv.groups != 1 or conv.padding not in ((0, 0), 0):
        raise ValueError(f"a norm folds only into a following dense 1x1 convolution without padding, got {conv}")
    weight, bias = _weight_and_bias(conv)
    scale, shift = _affine(norm)
    _set_folded(conv, weight * scale[None, :, None, None], bias + weight[:, :, 0, 0] @ shift)


class ConvNorm(nn.Module):
    """Convolution, norm and, optionally, an activation; with a batch norm it folds into one convolution.

    timm's ``ConvNormAct`` keeps its activation inside the norm, where ``SyncBatchNorm.convert_sync_batchnorm`` (which
    Lightning's ``sync_batchnorm=True`` calls) loses it; here the three stay separate modules.

    Args:
        in_channels: Channels of the input ``(N, in_channels, H, W)``.
        out_channels: Channels of the output ``(N, out_channels, H', W')``.
        kernel_size: Odd kernel size; the padding keeps the map's size at stride 1.
        stride: Stride; sizes round up.
        dilation: Distance between the kernel's taps, in pixels.
        groups: ``1``, or ``in_channels == out_channels`` for a depthwise convolution.
        act_layer: Class or timm name of the activation that follows, or ``None`` for none.
        norm_layer: Class of the norm, called with the number of channels. One that is no batch norm is not folded.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        act_layer: ActLayer | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        conv_type: type[nn.Conv2d] = nn.Conv2d
        if groups == in_channels == out_channels and groups > 1:
            conv_type = DepthwiseConv2d
        elif kernel_size == groups == stride == 1:
            conv_type = PointwiseConv2d
        self.conv = conv_type(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.bn: nn.Module = create_norm(norm_layer, out_channels, device, dtype)
        self.act = nn.Identity() if act_layer is None else create_act_layer(act_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``."""
        return self.act(self.bn(self.conv(x)))

    def reparameterize(self) -> None:
        """Fold a batch norm into the convolution, in place; a second call changes nothing."""
        if is_foldable(self.bn):
            fold_norm_into_previous(self.conv, self.bn)
            self.bn = nn.Identity()

    def prepack(self) -> None:
        """Let the convolution keep a packed weight and compute the activation, in place; folds the norm first."""
        self.reparameterize()
        fused = isinstance(self.bn, nn.Identity) and fuses(self.act)  # else the norm comes between them
        if pack(self.conv, self.act if fused else None) and fused:
            self.act = nn.Identity()

    def unpack(self) -> None:
        """Undo the packing, not the folding, of `prepack`, in place."""
        act = unpack(self.conv)
        if not isinstance(act, nn.Identity):
            self.act = act


class InputConvNorm(ConvNorm):
    """The `ConvNorm` that an encoder starts with: it decides the memory format of the whole network.

    PyTorch's operators keep a map's memory format, so no layer after this one copies back and forth.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, in_channels, H, W)`` as `ConvNorm` does, to channels_last on CPUs."""
        if not torch.jit.is_scripting():
            x = self._lay_out(x)
        return self.act(self.bn(self.conv(x)))

    @torch.jit.unused
    def _lay_out(self, x: torch.Tensor) -> torch.Tensor:
        return to_preferred_memory_format(x)


class ReparamLargeKernelConv2d(nn.Module):
    """Large depthwise convolution with a parallel small one, each with its own norm (RepLKNet, arXiv 2203.06717, §3).

    The small branch only eases training: it catches the local detail that a large kernel learns slowly. After
    `reparameterize` a single convolution with a bias remains.

    Args:
        channels: Channels of input and output, ``(N, channels, H, W)``.
        kernel_size: Odd size of the large kernel; it may exceed the map.
        small_kernel: Odd size of the parallel kernel, or ``None`` for none. It is also left out where it is not
            smaller than ``kernel_size`` (so that a 3×3 ablation keeps one branch).
        dilation: Distance between the taps of both kernels, in pixels.
        norm_layer: Class of the norms, called with the number of channels. Only branches with batch norms are folded.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a kernel size is even or not positive.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None = 5,
        dilation: int = 1,
        norm_layer: NormLayer = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("kernel_size", kernel_size), ("small_kernel", small_kernel)):
            if size is not None and (size < 1 or size % 2 == 0):
                raise ValueError(f"{name} must be a positive odd number, got {size}")

        def branch(size: int) -> ConvNorm:
            return ConvNorm(
                channels,
                channels,
                size,
                dilation=dilation,
                groups=channels,
                norm_layer=norm_layer,
                device=device,
                dtype=dtype,
            )

        self.large = branch(kernel_size)
        self.small = branch(small_kernel) if small_kernel is not None and small_kernel < kernel_size else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        out = self.large(x)
        if self.small is not None:
            out = out + self.small(x)
        return out

    def reparameterize(self) -> None:
        """Fold both norms and add the small kernel to the centre of the large one, in place."""
        self.large.reparameterize()
        if self.small is None:
            return
        self.small.reparameterize()
        if not (isinstance(self.large.bn, nn.Identity) and isinstance(self.small.bn, nn.Identity)):
            return  # a norm that depends on the map stands between the two kernels
        margin = (self.large.conv.kernel_size[0] - self.small.conv.kernel_size[0]) // 2
        large_weight, large_bias = _weight_and_bias(self.large.conv)
        small_weight, small_bias = _weight_and_bias(self.small.conv)
        _set_folded(self.large.conv, large_weight + F.pad(small_weight, [margin] * 4), large_bias + small_bias)
        self.small = None


def reparameterize(model: ModuleType, inplace: bool = False) -> ModuleType:
    """Fold every foldable module inside ``model`` for inference.

    Norms other than batch norms, which encoders get through ``norm_layer``, are no part of a convolution and stay.

    Takes anything that contains our encoders: an encoder, an smp model, a detector, a LightningModule. Call it once
    training is over: the folded model has no batch norms left to train and cannot be unfolded.

    Args:
        model: The model; its outputs in ``eval()`` mode stay the same up to float rounding.
        inplace: Whether to change ``model`` itself rather than a copy.

    Returns:
        The folded model, in ``eval()`` mode.
    """
    # The wrapper lets a foldable module be the root too: timm's function only looks at children.
    folded: nn.Module = reparameterize_model(nn.Sequential(model), inplace=inplace)
    return cast(ModuleType, folded.get_submodule("0").eval())


def prepack_weights(model: ModuleType, inplace: bool = False) -> ModuleType:
    """Fold a model and keep its weights in the blocks that oneDNN computes with, for inference on CPUs.

    Otherwise weights are arranged anew on every call. The arranged copies lie beside the weights (twice the memory),
    and activations are computed along with the convolutions before them. It works for float32 under
    ``torch.inference_mode()`` or ``torch.no_grad()``; in every other situation, other devices included, the model
    computes what the folded one does. State dict and outputs stay the folded model's, up to float rounding.

    Args:
        model: Anything that contains our encoders, folded or not.
        inplace: Whether to change ``model`` itself rather than a copy.

    Returns:
        The model, folded, in ``eval()`` mode.
    """
    model = reparameterize(model, inplace=inplace)
    for module in model.modules():
        if isinstance(module, ConvNorm):
            module.prepack()
    return model
