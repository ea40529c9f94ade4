"""Structural re-parameterisation: train with parallel branches and norms, deploy one convolution.

Every foldable module here has ``reparameterize()``, the hook that ``timm.utils.reparameterize_model`` calls, so timm's
function and `reparameterize` below do the same. It is made of the folds in `lk_backbones.layers.fold`, and never
changes the function that the module computes in ``eval()`` mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
from timm.layers import create_act_layer
from timm.utils.model import reparameterize_model

from lk_backbones._private.torch import hooks_see_input, hooks_see_output
from lk_backbones.layers.create import ActLayer, NormLayer, create_norm
from lk_backbones.layers.depthwise import DepthwiseConv2d
from lk_backbones.layers.fold import (
    embed_kernel,
    fold_norm_into_previous,
    fold_scale_into_previous,
    is_foldable,
    merge_kernels,
    norm_scale,
)
from lk_backbones.layers.memory_format import PreferredMemoryFormat
from lk_backbones.layers.packed import PackedDepthwiseConv2d, called_in_a_row, pack_inside
from lk_backbones.layers.pointwise import PointwiseConv2d

__all__ = [
    "ConvNorm",
    "InputConvNorm",
    "ReparamDepthwiseConv2d",
    "ReparamLargeKernelConv2d",
    "merge_branches",
    "prepack_weights",
    "reparameterize",
]

ModuleType = TypeVar("ModuleType", bound=nn.Module)
Size = int | tuple[int, int]


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _padding(size: int, dilation: int) -> int:
    return dilation * (size // 2) if size % 2 else 0


@called_in_a_row("conv", "bn", "act")
class ConvNorm(nn.Module):
    """Convolution, norm and, optionally, an activation; with a batch norm it folds into one convolution.

    timm's ``ConvNormAct`` keeps its activation inside the norm, where ``SyncBatchNorm.convert_sync_batchnorm`` (which
    Lightning's ``sync_batchnorm=True`` calls) loses it; here the three stay separate modules.

    Args:
        in_channels: Channels of the input ``(N, in_channels, H, W)``.
        out_channels: Channels of the output ``(N, out_channels, H', W')``.
        kernel_size: Odd kernel size, for both axes or for ``(rows, columns)``; the padding keeps the map's size at
            stride 1. An even size has no padding: as large as the stride, it cuts the map into patches.
        stride: Stride; sizes round up, with an even kernel down.
        dilation: Distance between the kernel's taps in pixels, for both axes or for ``(rows, columns)``.
        groups: ``1``, or ``in_channels == out_channels`` for a depthwise convolution.
        act_layer: Class or timm name of the activation that follows, or ``None`` for none.
        norm_layer: Class of the norm, called with the number of channels, or ``None`` for none. One that is no batch
            norm is not folded.
        bias: Whether the convolution has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: int = 1,
        dilation: Size = 1,
        groups: int = 1,
        act_layer: ActLayer | None = None,
        norm_layer: NormLayer | None = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        size, dilation = _pair(kernel_size), _pair(dilation)
        conv_type: type[nn.Conv2d] = nn.Conv2d
        if groups == in_channels == out_channels and groups > 1:
            conv_type = DepthwiseConv2d
        elif size == (1, 1) and groups == stride == 1:
            conv_type = PointwiseConv2d
        self.conv = conv_type(
            in_channels,
            out_channels,
            size,
            stride=stride,
            padding=(_padding(size[0], dilation[0]), _padding(size[1], dilation[1])),
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.bn: nn.Module = nn.Identity()
        if norm_layer is not None:
            self.bn = create_norm(norm_layer, out_channels, device, dtype)
        self.act = nn.Identity() if act_layer is None else create_act_layer(act_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``."""
        return self.act(self.bn(self.conv(x)))

    def reparameterize(self) -> None:
        """Fold a batch norm into the convolution, in place; a second call changes nothing."""
        if is_foldable(self.bn):
            fold_norm_into_previous(self.conv, self.bn)
            self.bn = nn.Identity()


@called_in_a_row("conv", "bn", "act")
class InputConvNorm(ConvNorm):
    """The `ConvNorm` that an encoder starts with: it decides the memory format of the whole network.

    Args:
        *args: As `ConvNorm`.
        **kwargs: As `ConvNorm`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory_format = PreferredMemoryFormat()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, in_channels, H, W)`` as `ConvNorm` does, to channels_last on CPUs."""
        return self.act(self.bn(self.conv(self.memory_format(x))))


class ReparamDepthwiseConv2d(nn.Module):
    """Sum of parallel depthwise convolutions of one map, each with its own norm, that folds into as few as possible.

    The branches only ease training. `reparameterize` folds their norms and adds every kernel to one that it fits
    inside, a dilated kernel with zeros between its taps; what fits inside no other stays a convolution of its own. So
    parallel dilated kernels (UniRepLKNet, arXiv 2311.15599) leave the large one, and of the strips 51×5 and 5×51 with a
    5×5 kernel (SLaK, arXiv 2207.03620) the two strips are left.

    Args:
        channels: Channels of input and output, ``(N, channels, H, W)``.
        branches: Kernel and dilation of every branch, such as ``[(13, 1), (5, 1), (3, 3)]``. A kernel is an odd size or
            ``(rows, columns)``; it may exceed the map.
        dilation: Distance between the taps of a kernel of dilation 1, in pixels: that of all branches is a multiple.
        bias: Whether the convolutions have biases.
        norm_layer: Class of the norm after every convolution, called with the number of channels, or ``None`` for none.
            Only branches with batch norms are folded.
        identity: Whether the input itself is added too, through a norm of its own if there are norms.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        stride: Stride of all branches; sizes round up.

    Raises:
        ValueError: If there is no branch, a kernel size is even or not positive, a dilated kernel reaches beyond every
            kernel of dilation 1, or the input itself is to be added to strided branches.
    """

    def __init__(
        self,
        channels: int,
        branches: Sequence[tuple[Size, int]],
        dilation: int = 1,
        bias: bool = False,
        norm_layer: NormLayer | None = nn.BatchNorm2d,
        identity: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stride: int = 1,
    ) -> None:
        super().__init__()
        _check_branches(branches)
        if identity and stride != 1:
            raise ValueError(f"stride must be 1 where the input itself is added (identity=True), got {stride}")
        self.branches = nn.ModuleList(
            ConvNorm(
                channels,
                channels,
                kernel_size,
                stride=stride,
                dilation=spread * dilation,
                groups=channels,
                norm_layer=norm_layer,
                device=device,
                dtype=dtype,
                bias=bias,
            )
            for kernel_size, spread in branches
        )
        self.identity: nn.Module | None = None
        if identity:
            self.identity = nn.Identity() if norm_layer is None else create_norm(norm_layer, channels, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, channels, H, W)`` to ``(N, channels, ceil(H / stride), ceil(W / stride))``."""
        out = self.branches[0](x)
        for index, branch in enumerate(self.branches):  # TorchScript cannot call what it slices off
            if index > 0:
                if torch.jit.is_scripting():
                    out = out + branch(x)
                else:
                    out = _plus_branch(out, branch, x)
        if self.identity is not None:
            out = out + self.identity(x)
        return out

    def reparameterize(self, dense: bool = False) -> None:
        """Fold the norms and merge what fits together, in place; a second call changes nothing.

        Args:
            dense: Whether to merge strips too, into one kernel as large as all of them together. It computes the same
                and has more taps.
        """
        branches = [cast(ConvNorm, branch) for branch in self.branches]
        if self.identity is None:
            left = merge_branches(branches, dense)
        else:
            identity = _as_branch(self.identity, branches[0].conv)
            left = merge_branches([*branches, identity], dense)
            if identity in left:
                left.remove(identity)
            else:
                self.identity = None
        self.branches = nn.ModuleList(left)

    def fold_norm(self, norm: nn.Module) -> bool:
        """Fold the batch norm that follows the sum into the convolutions, in place; call `reparameterize` first.

        Args:
            norm: The norm, over ``channels`` channels.

        Returns:
            Whether it is folded: not if it is no batch norm with running statistics, or a branch has such a one.
        """
        convs = [cast(ConvNorm, branch).conv for branch in self.branches if isinstance(branch.bn, nn.Identity)]
        if not is_foldable(norm) or self.identity is not None or len(convs) < len(self.branches):
            return False
        fold_norm_into_previous(convs[0], norm)  # the shift goes to one of them, the scale to all
        for conv in convs[1:]:
            fold_scale_into_previous(conv, norm_scale(norm))
        return True


@torch.jit.ignore
def _plus_branch(total: torch.Tensor, branch: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Add what a branch makes of ``x``, along with its convolution where that is folded and the device can."""
    if isinstance(branch, ConvNorm) and isinstance(branch.conv, DepthwiseConv2d) and _is_bare(branch):
        output = branch.conv.plus(x, total)
        if output is not None:
            return output
    added: torch.Tensor = total + branch(x)
    return added


def _is_bare(branch: ConvNorm) -> bool:
    """Return whether a branch is its convolution and nothing else, also to hooks."""
    followed_by = (branch.bn, branch.act, getattr(branch.conv, "act", branch.act))  # a packed one has its own
    parts: tuple[nn.Module, ...] = (branch, branch.conv, *followed_by)
    return (
        type(branch.conv) in (DepthwiseConv2d, PackedDepthwiseConv2d)
        and all(type(part) is nn.Identity for part in followed_by)
        and not any(hooks_see_input(part) or hooks_see_output(part) for part in parts)
    )


def merge_branches(branches: Sequence[ConvNorm], dense: bool = False) -> list[ConvNorm]:
    """Fold parallel depthwise branches of one sum, in place, and merge those that fit inside another one.

    Args:
        branches: Their modules, all of one stride.
        dense: Whether to enlarge the first so that all others fit.

    Returns:
        Those that are left, in their order: the ones that fit inside no other, and the ones that keep a norm because it
        is no batch norm with running statistics.
    """
    for branch in branches:
        branch.reparameterize()
    plain = [b for b in branches if isinstance(b.bn, nn.Identity) and isinstance(b.act, nn.Identity)]
    if dense and plain:
        plain[0].conv = _enlarge([branch.conv for branch in plain])
    left = merge_kernels(branch.conv for branch in plain)
    return [branch for branch in branches if branch not in plain or branch.conv in left]


def _enlarge(convs: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """Write the first of some depthwise convolutions as one whose kernel the others fit inside."""
    first = convs[0]
    axes = [[(conv.kernel_size[axis], conv.dilation[axis]) for conv in convs] for axis in (0, 1)]
    steps = [math.gcd(*(dilation for size, dilation in axis if size > 1)) or 1 for axis in axes]
    sizes = [max((k - 1) * d // step + 1 for k, d in axis) for axis, step in zip(axes, steps, strict=True)]
    weight = embed_kernel(first.weight, _pair(first.dilation), (sizes[0], sizes[1]), (steps[0], steps[1]))
    assert weight is not None
    large = DepthwiseConv2d(
        first.in_channels,
        first.out_channels,
        (sizes[0], sizes[1]),
        stride=_pair(first.stride),
        padding=tuple(step * (size // 2) for step, size in zip(steps, sizes, strict=True)),
        dilation=(steps[0], steps[1]),
        groups=first.groups,
        bias=first.bias is not None,
        device="meta",
    )
    large.weight, large.bias = nn.Parameter(weight.detach(), first.weight.requires_grad), first.bias
    return large.train(first.training)


def _as_branch(norm: nn.Module, like: nn.Conv2d) -> ConvNorm:
    """Write an identity, or the norm of one, as a depthwise convolution and a norm."""
    branch = ConvNorm(like.in_channels, like.in_channels, 1, groups=like.groups, norm_layer=None, dtype=torch.float64)
    nn.init.ones_(branch.conv.weight)
    branch.bn = norm
    return branch.to("meta") if like.weight.is_meta else branch


def _check_branches(branches: Sequence[tuple[Size, int]]) -> None:
    if not branches:
        raise ValueError("branches must name one kernel and its dilation at least, got none")
    kernels = [(_pair(kernel_size), spread) for kernel_size, spread in branches]
    for size, spread in kernels:
        if any(k < 1 or k % 2 == 0 for k in size) or spread < 1:
            raise ValueError(
                f"branches must have positive odd kernel sizes and dilations, got {size}, dilation {spread}"
            )
    for size, spread in kernels:
        others = [other for other, theirs in kernels if theirs == 1]
        reach = tuple((k - 1) * spread + 1 for k in size)
        if spread > 1 and not any(reach[0] <= other[0] and reach[1] <= other[1] for other in others):
            raise ValueError(
                f"a branch with kernel {size} and dilation {spread} reaches over {reach} pixels, which no kernel of "
                f"dilation 1 ({others}) covers, so that it could not be merged"
            )


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
        branches = [self.large] if self.small is None else [self.large, self.small]
        if self.small not in merge_branches(branches):
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

    Every ``nn.Conv2d`` and ``nn.Linear`` takes part, our own layers and those of a decoder around them, but for
    subclasses, whose forward may differ. Otherwise weights are arranged anew on every call. The arranged copies lie
    beside the weights (twice the memory), and activations are computed along with the layers before them where a module
    tells of them (`lk_backbones.layers.called_in_a_row`). It works under ``torch.inference_mode()`` or
    ``torch.no_grad()`` for float32 and, on processors with AVX512-BF16 or AMX, for bfloat16: of a model that is
    ``.bfloat16()``, or of a float32 model under ``torch.autocast``, which otherwise converts every weight on every
    call. In every other situation, other devices included, the model computes what the folded one does. State dict and
    outputs stay the folded model's, up to float rounding. With AMX the first call in bfloat16 lays large kernels out as
    band matrices (`lk_backbones.layers.packed.PackedDepthwiseConv2d`), which take some more memory.

    `lk_backbones.layers.restore_conv2d` undoes the packing.

    Args:
        model: Anything that contains our encoders, folded or not.
        inplace: Whether to change ``model`` itself rather than a copy.

    Returns:
        The model, folded, in ``eval()`` mode.
    """
    model = reparameterize(model, inplace=inplace)
    pack_inside(model)
    return model
