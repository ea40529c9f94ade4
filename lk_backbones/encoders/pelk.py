"""PeLK: kernels up to 101×101 and beyond whose outer weights are shared, in the wide and sparse ConvNeXt of SLaK.

Paper: "PeLK: Parameter-efficient Large Kernel ConvNets with Peripheral Convolution", CVPR 2024, arXiv 2403.07589.
The authors published neither code nor weights: there is nothing to load, and nothing that this file could be compared
with. It is written from the paper, under this package's licence, and its published results are targets.

The paper builds on SLaK, and so does this file: stem, transitions, feed-forward parts, width and head are SLaK's, only
the depthwise layer differs. What the paper leaves open, and how it is here:

- The outermost cells of the grids: `lk_backbones.layers.peripheral_grid`.
- The channels that pass by the large kernel pass by its norms too; the block's layer norm sees all of them.
- Each kernel, large and small, has a batch norm of its own, as in SLaK. The position embedding's bias joins behind
  them: a batch norm in between would subtract it (`lk_backbones.layers.ReparamPeripheralConv2d`).
- The position embedding is also added under the zeros that pad a map.
- The centre of PeLK-101 has 7×7 weights of its own in every stage, 5×5 otherwise.

The published networks are 1.3 times as wide as ConvNeXt, and 40 % of the weights of their convolutions and linear
layers are zero, which is a matter of training. Here all are stored, shared ones once. The published counts leave the
zeros out, and what is folded for inference: the position embedding and the small kernels.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import DropPath, LayerNorm2d, LayerScale2d
from timm.models import checkpoint, generate_default_cfgs

from lk_backbones.encoders._loading import build_pretrained
from lk_backbones.encoders._registry import register_encoder
from lk_backbones.encoders.slak import SLaK, SLaKDownsample
from lk_backbones.layers.create import ActLayer, NormLayer
from lk_backbones.layers.fold import fold_scale_into_previous
from lk_backbones.layers.peripheral import KernelPositionEmbedding, ReparamPeripheralConv2d, peripheral_grid
from lk_backbones.layers.reparam import ConvNorm
from lk_backbones.weights.catalogue import timm_configurations

__all__ = ["PeLK"]

_KERNEL_SIZES = (51, 49, 47, 13)


class PartialPeripheralConv2d(nn.Module):
    """Peripheral convolution of the first channels, which the other channels pass by (paper, §4).

    Args:
        channels: Channels of input and output, ``(N, channels, H, W)``.
        conv_channels: How many of them are convolved.
        kernel_size: Odd size of the dense kernel.
        **kwargs: As `lk_backbones.layers.ReparamPeripheralConv2d`.
    """

    def __init__(self, channels: int, conv_channels: int, kernel_size: int, **kwargs: Any) -> None:
        super().__init__()
        self.split = [conv_channels, channels - conv_channels]
        self.conv = ReparamPeripheralConv2d(conv_channels, kernel_size, **kwargs)

    def forward(self, x: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(N, channels, H, W)`` to the same shape, given the stage's position embedding."""
        first, others = x.split(self.split, dim=1)
        return torch.cat([self.conv(first, position), others], dim=1)


class PeLKBlock(nn.Module):
    """Residual block: partial peripheral convolution, layer norm, feed-forward part.

    Args:
        channels: Channels of input and output, ``(N, channels, H, W)``.
        conv_channels: How many of them are convolved.
        kernel_size: Odd size of the dense kernel.
        ffn_ratio: Hidden channels of the feed-forward part as a multiple of ``channels``.
        layer_scale: Initial factor of the residual branch.
        drop_path: Probability of dropping the residual branch of a sample in training.
        act_layer: Class of the activation.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **kwargs: As `lk_backbones.layers.ReparamPeripheralConv2d`.
    """

    def __init__(
        self,
        channels: int,
        conv_channels: int,
        kernel_size: int,
        ffn_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        act_layer: ActLayer = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(channels * ffn_ratio)
        self.dwconv = PartialPeripheralConv2d(channels, conv_channels, kernel_size, **kwargs, **dd)
        self.norm = LayerNorm2d(channels, **dd)
        self.pw1 = ConvNorm(channels, hidden, 1, act_layer=act_layer, norm_layer=None, bias=True, **dd)
        self.pw2 = ConvNorm(hidden, channels, 1, norm_layer=None, bias=True, **dd)
        self.layer_scale: nn.Module = LayerScale2d(channels, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor, position: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``(N, channels, H, W)`` to the same shape.

        Args:
            x: The map.
            position: What the stage's `KernelPositionEmbedding` returns, or ``None`` for no embedding.
        """
        out = self.pw2(self.pw1(self.norm(self.dwconv(x, position))))
        return x + self.drop_path(self.layer_scale(out))

    def reparameterize(self) -> None:
        """Fold the depthwise convolutions and the layer scale, in place; the stage folds its position embedding."""
        self.dwconv.conv.reparameterize()
        if isinstance(self.layer_scale, LayerScale2d):
            fold_scale_into_previous(self.pw2.conv, self.layer_scale.gamma)
            self.layer_scale = nn.Identity()


class PeLKStage(nn.Module):
    """One resolution: an optional transition, then blocks, which share a position embedding.

    Args:
        in_channels: Channels of the input ``(N, in_channels, H, W)``.
        channels: Channels of the output ``(N, channels, H', W')``.
        depth: Number of blocks.
        kernel_size: Odd size of the blocks' dense kernels.
        small_kernel: Odd size of the kernel beside each, or ``None`` for none.
        center_radius: As `lk_backbones.layers.peripheral_grid`.
        base: As `lk_backbones.layers.peripheral_grid`.
        grid_size: As `lk_backbones.layers.peripheral_grid`.
        conv_channels: Channels that are convolved.
        position_embedding: Whether there is a position embedding.
        transition: Whether the stage starts with a norm and a strided convolution (every stage but the first).
        stride: Stride of that.
        dilation: Dilation of that, and of the blocks' kernels.
        drop_path_rates: One rate for each block.
        norm_layer: Class of the depthwise convolutions' norms, called with the number of channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **kwargs: As `PeLKBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        kernel_size: int,
        small_kernel: int | None,
        center_radius: int,
        base: int,
        grid_size: int | None,
        conv_channels: int,
        position_embedding: bool,
        transition: bool = True,
        stride: int = 2,
        dilation: tuple[int, int] = (1, 1),
        drop_path_rates: Sequence[float] = (),
        norm_layer: NormLayer = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if transition:
            self.downsample = SLaKDownsample(in_channels, channels, stride, dilation[0], **dd)
        self.position: nn.Module | None = None
        if position_embedding:
            grid = peripheral_grid(kernel_size, center_radius, base, grid_size)
            self.position = KernelPositionEmbedding(conv_channels, kernel_size, grid, **dd)
        self.blocks = nn.Sequential(
            *(
                PeLKBlock(
                    channels,
                    conv_channels,
                    kernel_size,
                    small_kernel=small_kernel,
                    center_radius=center_radius,
                    base=base,
                    grid_size=grid_size,
                    dilation=dilation[1],
                    drop_path=drop_path,
                    norm_layer=norm_layer,
                    position_embedding=position_embedding,
                    **kwargs,
                    **dd,
                )
                for drop_path in drop_path_rates or [0.0] * depth
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H // stride, W // stride)``."""
        x = self.downsample(x)
        position: torch.Tensor | None = None
        if self.position is not None:
            position = self.position()
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, position)
            else:
                x = block(x, position)
        return x

    def reparameterize(self) -> None:
        """Fold the blocks, and the position embedding into them, in place."""
        blocks = [cast(PeLKBlock, block) for block in self.blocks]
        for block in blocks:
            block.reparameterize()
        if self.position is not None:
            position = self.position()
            folded = [block.dwconv.conv.fold_position(position) for block in blocks]
            if all(folded):
                self.position = None


class PeLK(SLaK):
    """PeLK as a timm model (arXiv 2403.07589).

    Feature levels and sizes of the input are as in `lk_backbones.encoders.slak.SLaK`: four levels of strides 4, 8, 16
    and 32. Parameters are counted as they are stored: once for all taps that share one.

    Args:
        in_chans: Channels of the input image.
        num_classes: Classes of the classifier, 0 for none.
        global_pool: Pooling in front of the classifier, ``"avg"`` as published, or ``""`` for none.
        output_stride: Stride of the last map: 8, 16 or 32. Below 32 the later strides turn into dilation.
        depths: Blocks in each of the four stages.
        channels: Channels of each stage, before ``width_factor``.
        width_factor: What the channels are multiplied by, rounded down: 1.3 as published.
        kernel_sizes: Odd size of the dense large kernels, one for all stages or one for each. The paper has
            51-49-47-13, 101-69-67-13 and 151-89-87-13.
        small_kernel: Odd size of the kernel beside the large one, ``None`` for none.
        center_radius: Offsets on each side of the centre that share their weight with none, for all stages or one for
            each: 2 as published, 3 with kernels of 101.
        base: Width of the innermost shared cell, and what each is wider by than the one inside it.
        grid_size: Cells along an axis of the large kernels, for all stages or one for each; ``None`` for as many as
            `lk_backbones.layers.peripheral_grid` makes.
        partial_ratio: Share of the channels that are convolved, rounded down: 3/8 as published; 1 for all.
        position_embedding: Whether every stage has a kernel-wise position embedding.
        ffn_ratio: Hidden channels of the feed-forward parts as a multiple of the stage's.
        layer_scale: Initial factor of the residual branches.
        norm_features: Whether maps returned by `forward_intermediates` or ``features_only`` pass a layer norm of their
            own, as SLaK's do for dense tasks (it touches only what is returned, not what flows on).
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth; grows linearly from 0 at the first block to this at the last.
        act_layer: Class or timm name of every activation; ``None`` for GELU.
        norm_layer: Class or timm name of the norms after the depthwise convolutions, ``None`` for batch norms.
            `lk_backbones.reparameterize` folds batch norms, also frozen and synchronised ones; others it leaves. All
            other norms are layer norms.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If ``output_stride``, a kernel size, a grid, the number of stages or of their channels makes no
            sense, or timm knows no such activation or norm.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        depths: Sequence[int] = (3, 3, 9, 3),
        channels: Sequence[int] = (96, 192, 384, 768),
        width_factor: float = 1.0,
        kernel_sizes: int | Sequence[int] = _KERNEL_SIZES,
        small_kernel: int | None = 5,
        center_radius: int | Sequence[int] = 2,
        base: int = 2,
        grid_size: int | Sequence[int | None] | None = None,
        partial_ratio: float = 3 / 8,
        position_embedding: bool = True,
        ffn_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        norm_features: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: ActLayer | None = None,
        norm_layer: str | NormLayer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < partial_ratio <= 1:
            raise ValueError(f"partial_ratio must be above 0 and at most 1, got {partial_ratio}")
        self.partial_ratio = partial_ratio
        # What the stages of a SLaK do not have; `_create_stage` takes it while SLaK's constructor runs.
        self._peripheral: list[dict[str, Any]] = [
            {"center_radius": radius, "base": base, "grid_size": size, "position_embedding": position_embedding}
            for radius, size in zip(
                _for_each_stage("center_radius", center_radius), _for_each_stage("grid_size", grid_size), strict=True
            )
        ]
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            output_stride=output_stride,
            depths=depths,
            channels=channels,
            width_factor=width_factor,
            kernel_sizes=kernel_sizes,
            small_kernel=small_kernel,
            strips=False,
            ffn_ratio=ffn_ratio,
            layer_scale=layer_scale,
            norm_features=norm_features,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            act_layer=act_layer,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
        )

    def _create_stage(self, index: int, in_channels: int, channels: int, *args: Any, **kwargs: Any) -> nn.Module:
        conv_channels = int(channels * self.partial_ratio)
        if conv_channels < 1:
            raise ValueError(
                f"partial_ratio={self.partial_ratio} of the {channels} channels of stage {index} is less than one "
                "channel: the stage must be wider, or the ratio larger"
            )
        settings = {**kwargs, **self._peripheral[index], "conv_channels": conv_channels}
        del settings["strips"]
        return PeLKStage(in_channels, channels, *args, **settings)


def _for_each_stage(name: str, value: int | Sequence[int | None] | None) -> tuple[int | None, ...]:
    values = (value,) * 4 if value is None or isinstance(value, int) else tuple(value)
    if len(values) != 4:
        raise ValueError(f"{name} must be one number, or one for each of the four stages, got {values}")
    return values


# ---- weights: nobody published any ----

_VARIANTS = ("n", "tiny", "small", "base", "tiny_101", "small_101", "base_101")

default_cfgs = generate_default_cfgs(
    timm_configurations(
        "PeLK",
        untrained=[f"pelk_{variant}" for variant in _VARIANTS],
        first_conv="stem.0.conv",
        classifier="head.fc",
    )
)


# ---- models ----


def _create_pelk(variant: str, pretrained: bool = False, **kwargs: Any) -> PeLK:
    feature_cfg: dict[str, Any] = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    if kwargs.get("norm_features"):
        # What is returned differs from what flows on, which only `forward_intermediates` can express.
        feature_cfg["feature_cls"] = "getter"
    return build_pretrained(PeLK, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_NANO = {"depths": (2, 2, 6, 2), "channels": (32, 64, 160, 320)}
_TINY = {"depths": (3, 3, 9, 3), "channels": (96, 192, 384, 768), "width_factor": 1.3}
_SMALL = {"depths": (3, 3, 27, 3), "channels": (96, 192, 384, 768), "width_factor": 1.3}
_BASE = {"depths": (3, 3, 27, 3), "channels": (128, 256, 512, 1024), "width_factor": 1.3}
_101 = {"kernel_sizes": (101, 69, 67, 13), "center_radius": 3}


@register_encoder
def pelk_n(pretrained: bool = False, **kwargs: Any) -> PeLK:
    """PeLK nano, for laptops and CPUs, with the published kernels. Ours, no published weights.

    ``kernel_sizes=(101, 69, 67, 13), center_radius=3`` make a PeLK-101 of it.
    """
    return _create_pelk("pelk_n", pretrained, **(_NANO | kwargs))


@register_encoder
def pelk_tiny(pretrained: bool = False, **kwargs: Any) -> PeLK:
    """PeLK-T as the paper describes it: kernels 51-49-47-13. No weights were published."""
    return _create_pelk("pelk_tiny", pretrained, **(_TINY | kwargs))


@register_encoder
def pelk_small(pretrained: bool = False, **kwargs: Any) -> PeLK:
    """PeLK-S as the paper describes it: kernels 51-49-47-13. No weights were published."""
    return _create_pelk("pelk_small", pretrained, **(_SMALL | kwargs))


@register_encoder
def pelk_base(pretrained: bool = False, **kwargs: Any) -> PeLK:
    """PeLK-B as the paper describes it: kernels 51-49-47-13. No weights were published."""
    return _create_pelk("pelk_base", pretrained, **(_BASE | kwargs))


@register_encoder
def pelk_tiny_101(pretrained: bool = False, **kwargs: Any) -> PeLK:
    """PeLK-T-101 as the paper describes it: kernels 101-69-67-13, best at 384 pixels. No weights were published."""
    return _create_pelk("pelk_tiny_101", pretrained, **(_TINY | _101 | kwargs))


@register_encoder
def pelk_small_101(pretrained: bool = False, **kwargs: Any) -> PeLK:
    """PeLK-S with the kernels of PeLK-101, for 384 pixels and more. No weights were published."""
    return _create_pelk("pelk_small_101", pretrained, **(_SMALL | _101 | kwargs))


@register_encoder
def pelk_base_101(pretrained: bool = False, **kwargs: Any) -> PeLK:
    """PeLK-B-101 as the paper describes it: kernels 101-69-67-13, for 384 pixels. No weights were published."""
    return _create_pelk("pelk_base_101", pretrained, **(_BASE | _101 | kwargs))
