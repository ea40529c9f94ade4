"""UniRepLKNet: few large depthwise kernels with dilated parallel branches among many small ones.

Paper: "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image
Recognition", CVPR 2024, arXiv 2311.15599.
Reference code and weights: AILab-CVC/UniRepLKNet, Apache-2.0 licence for both.

The layout differs from the reference in three points: the strided convolution between two stages is part of the stage
that follows it, so that timm's feature extraction sees one module per level; the linear layers are 1×1 convolutions;
and all depthwise kernels of a block are the branches of one module. `checkpoint_filter_fn` renames the published keys.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import (
    DropPath,
    LayerNorm2d,
    LayerScale2d,
    NormMlpClassifierHead,
    SqueezeExcite,
    calculate_drop_path_rates,
    create_act_layer,
)
from timm.layers.grn import GlobalResponseNorm
from timm.models import checkpoint_seq, generate_default_cfgs

from lk_backbones._private.timm import feature_take_indices
from lk_backbones.encoders._loading import build_pretrained
from lk_backbones.encoders._registry import register_encoder
from lk_backbones.layers.create import ActLayer, NormLayer, create_norm, find_act, find_norm
from lk_backbones.layers.fold import fold_scale_into_previous, fold_shift_into_next, is_foldable
from lk_backbones.layers.reparam import ConvNorm, InputConvNorm, ReparamDepthwiseConv2d
from lk_backbones.weights.catalogue import timm_configurations

__all__ = ["UniRepLKNet"]

KernelSizes = int | Sequence[int | Sequence[int]]
Branches = Mapping[int, Sequence[tuple[int, int]]]

# Size of a large kernel -> size and dilation of the kernels beside it (paper, Table 1, and the reference code).
_BRANCHES: Branches = {
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class ResponseNorm(GlobalResponseNorm):
    """timm's global response norm of maps ``(N, C, H, W)`` in fewer passes, whose bias can be folded away.

    Args:
        channels: Channels of the map.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(channels, channels_last=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, channels, H, W)`` to the same shape and dtype."""
        energy = x.norm(p=2, dim=(2, 3), keepdim=True)
        response = energy / (energy.mean(dim=1, keepdim=True) + self.eps)
        # one factor per channel, so that the large map is read and written once
        scale = (self.weight.view(1, -1, 1, 1) * response + 1).to(x.dtype)
        bias = self.bias
        if bias is None:
            return x * scale
        return torch.addcmul(bias.view(1, -1, 1, 1).to(x.dtype), x, scale)


class UniRepLKNetBlock(nn.Module):
    """Residual block: depthwise convolution, squeeze-and-excitation, feed-forward part (paper, Figure 3).

    Args:
        channels: Channels of input and output, ``(N, channels, H, W)``.
        kernel_size: Odd size of the depthwise kernel, or 0 for none.
        branches: Size and dilation of the kernels beside it.
        dilation: Distance between the taps of a kernel of dilation 1, in pixels.
        ffn_ratio: Hidden channels of the feed-forward part as a multiple of ``channels``.
        layer_scale: Initial factor of the residual branch.
        drop_path: Probability of dropping the residual branch of a sample in training.
        act_layer: Class of the activations, or ``None`` for GELU and, in squeeze-and-excitation, ReLU.
        norm_layer: Class of the norms, called with the number of channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        branches: Sequence[tuple[int, int]] = (),
        dilation: int = 1,
        ffn_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        act_layer: ActLayer | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(channels * ffn_ratio)
        self.dwconv: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        if kernel_size > 0:
            self.dwconv = ReparamDepthwiseConv2d(
                channels,
                [(kernel_size, 1), *branches],
                dilation,
                norm_layer=norm_layer if branches else None,
                **dd,
            )
            self.norm = create_norm(norm_layer, channels, device, dtype)
        self.se = SqueezeExcite(channels, rd_channels=channels // 4, **dd)
        self.se.act = create_act_layer(nn.ReLU if act_layer is None else act_layer)  # timm's works in place
        act = nn.GELU if act_layer is None else act_layer
        self.pw1 = ConvNorm(channels, hidden, 1, act_layer=act, norm_layer=None, bias=True, **dd)
        self.grn = ResponseNorm(hidden, **dd)
        self.pw2 = ConvNorm(hidden, channels, 1, norm_layer=norm_layer, **dd)
        self.layer_scale: nn.Module = LayerScale2d(channels, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        out = self.se(self.norm(self.dwconv(x)))
        out = self.pw2(self.grn(self.pw1(out)))
        return x + self.drop_path(self.layer_scale(out))

    def reparameterize(self) -> None:
        """Fold the branches, the norms, the response norm's bias and the layer scale, in place."""
        if isinstance(self.dwconv, ReparamDepthwiseConv2d):
            self.dwconv.reparameterize()
            if self.dwconv.fold_norm(self.norm):
                self.norm = nn.Identity()
        self.pw2.reparameterize()
        if self.grn.bias is not None:
            fold_shift_into_next(self.grn.bias, self.pw2.conv)
            self.grn.bias = None
        if isinstance(self.layer_scale, LayerScale2d) and isinstance(self.pw2.bn, nn.Identity):
            fold_scale_into_previous(self.pw2.conv, self.layer_scale.gamma)
            self.layer_scale = nn.Identity()


class UniRepLKNetStage(nn.Module):
    """One resolution: an optional strided convolution, then blocks.

    Args:
        in_channels: Channels of the input ``(N, in_channels, H, W)``.
        channels: Channels of the output ``(N, channels, H', W')``.
        kernel_sizes: Size of the depthwise kernel of each block.
        branches: Large kernel to the kernels beside it; kernels that it does not name have none.
        transition: Whether the stage starts with a strided convolution (every stage but the first).
        stride: Stride of that.
        dilation: Dilation of that, and of the blocks' kernels.
        ffn_ratio: Hidden channels of the feed-forward parts as a multiple of ``channels``.
        layer_scale: Initial factor of the residual branches.
        drop_path_rates: One rate for each block.
        act_layer: Class of the activations, or ``None`` for GELU and, in squeeze-and-excitation, ReLU.
        norm_layer: Class of the blocks' norms, called with the number of channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_sizes: Sequence[int],
        branches: Branches,
        transition: bool = True,
        stride: int = 2,
        dilation: tuple[int, int] = (1, 1),
        ffn_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        drop_path_rates: Sequence[float] = (),
        act_layer: ActLayer | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if transition:
            self.downsample = ConvNorm(
                in_channels,
                channels,
                3,
                stride=stride,
                dilation=dilation[0],
                norm_layer=LayerNorm2d,
                bias=True,
                **dd,
            )
        rates = drop_path_rates or [0.0] * len(kernel_sizes)
        self.blocks = nn.Sequential(
            *(
                UniRepLKNetBlock(
                    channels,
                    kernel_size,
                    branches.get(kernel_size, ()),
                    dilation=dilation[1],
                    ffn_ratio=ffn_ratio,
                    layer_scale=layer_scale,
                    drop_path=drop_path,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    **dd,
                )
                for kernel_size, drop_path in zip(kernel_sizes, rates, strict=True)
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, ceil(H / stride), ceil(W / stride))``."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class UniRepLKNet(nn.Module):
    """UniRepLKNet as a timm model (arXiv 2311.15599).

    Five feature levels of strides 2, 4, 8, 16, 32: level 0 is the stem's map at half resolution, levels 1 to 4 are the
    stages. Input ``(N, in_chans, H, W)`` of any size; sizes round up at each stride.

    Args:
        in_chans: Channels of the input image.
        num_classes: Classes of the classifier, 0 for none.
        global_pool: Pooling in front of the classifier, ``"avg"`` as published, or ``""`` for none.
        output_stride: Stride of the last map: 8, 16 or 32. Below 32 the later strides turn into dilation.
        depths: Blocks in each of the four stages.
        channels: Channels of each stage, 4 at least; the stem's first map has half of the first.
        kernel_sizes: Size of the depthwise kernels: one for all stages, or one entry for each, which is a size or the
            sizes that its blocks take in turn, such as ``(3, 13, (13, 3, 3), 13)``. 0 is no kernel, up to 5 a single
            one, from 7 on one with ``branches``.
        branches: Size and dilation of the kernels beside a large one, by its size, such as
            ``{31: [(5, 1), (7, 4), (3, 15)]}``; for other sizes than the published 7, 9, 11, 13, 15 and 17, or instead.
        ffn_ratio: Hidden channels of the feed-forward parts as a multiple of the stage's.
        layer_scale: Initial factor of the residual branches.
        norm_features: Whether maps 1 to 4 returned by `forward_intermediates` or ``features_only`` pass a layer norm of
            their own, as published for dense tasks (it touches only what is returned, not what flows on).
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth; grows linearly from 0 at the first block to this at the last.
        act_layer: Class or timm name of every activation; ``None`` for the published ones, GELU and, in
            squeeze-and-excitation, ReLU.
        norm_layer: Class or timm name of the blocks' norms, ``None`` for the published batch norms.
            `lk_backbones.reparameterize` folds batch norms, also frozen and synchronised ones; others it leaves. Stem,
            transitions, returned maps and classifier keep their layer norms.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If ``output_stride``, a kernel size, a branch or the number of stages makes no sense, or timm knows
            no such activation or norm.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        depths: Sequence[int] = (3, 3, 27, 3),
        channels: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: KernelSizes = (3, 13, (13, 3, 3), 13),
        branches: Branches | None = None,
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
        super().__init__()
        norm_layer = nn.BatchNorm2d if norm_layer is None else find_norm(norm_layer)
        act_layer = None if act_layer is None else find_act(act_layer)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        if len(depths) != 4 or len(channels) != 4 or min(channels) < 4:
            raise ValueError(
                "depths and channels must name the same four stages, of 4 channels at least, got "
                f"depths={tuple(depths)}, channels={tuple(channels)}"
            )
        sizes = _kernels_of_blocks(kernel_sizes, depths)
        table = _check_kernels({size for stage in sizes for size in stage}, branches or {})

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        width = channels[0]
        act = nn.GELU if act_layer is None else act_layer
        stem = {"stride": 2, "norm_layer": LayerNorm2d, "bias": True, **dd}
        self.stem = nn.Sequential(
            InputConvNorm(in_chans, width // 2, 3, act_layer=act, **stem),
            ConvNorm(width // 2, width, 3, **stem),
        )
        self.feature_info = [{"num_chs": width // 2, "reduction": 2, "module": "stem.0"}]

        drop_path_rates = cast(
            list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        )
        stages = []
        stride, dilation, in_channels = 4, 1, width
        for i in range(len(depths)):
            stage_stride, first_dilation = (2, 1) if i > 0 else (1, 1)
            if i > 0 and stride >= output_stride:
                # The strided convolution keeps the dilation that it was trained at; what follows it is spread further.
                stage_stride, first_dilation, dilation = 1, dilation, dilation * 2
            stride *= stage_stride
            stages.append(
                UniRepLKNetStage(
                    in_channels,
                    channels[i],
                    sizes[i],
                    table,
                    transition=i > 0,
                    stride=stage_stride,
                    dilation=(first_dilation, dilation),
                    ffn_ratio=ffn_ratio,
                    layer_scale=layer_scale,
                    drop_path_rates=drop_path_rates[i],
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    **dd,
                )
            )
            self.feature_info.append({"num_chs": channels[i], "reduction": stride, "module": f"stages.{i}"})
            in_channels = channels[i]
        self.stages = nn.Sequential(*stages)
        self.feature_norms = None
        if norm_features:
            self.feature_norms = nn.ModuleList(LayerNorm2d(c, **dd) for c in channels)

        self.num_features = self.head_hidden_size = in_channels
        self.head = NormMlpClassifierHead(in_channels, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(_init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameter names into layers, for layer-wise learning-rate decay.

        The layers are those that the published decay rates count: the stem, the first stage, the second, every three
        blocks of the third, the last stage; a transition belongs to the layer behind it. Norms of returned maps are new
        in a dense task and learn as the head does.
        """
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        stages: list[tuple[str, tuple[int, ...] | None]] = [(r"^stages\.(2)\.downsample", (0,))]
        third = cast(UniRepLKNetStage, self.stages[2]).blocks if len(self.stages) > 2 else ()
        for block in range(len(third)):
            stages.append((rf"^stages\.(2)\.blocks\.{block}\.", (block // 3,)))
        return {"stem": r"^stem", "blocks": [*stages, (r"^stages\.(\d+)", None)]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass rather than keep its activations."""
        for stage in self.stages:
            cast(UniRepLKNetStage, stage).grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier, a linear layer or, without classes, an identity."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes of the new classifier, 0 for none.
            global_pool: New pooling, or ``None`` to keep it.
        """
        self.num_classes = num_classes
        self.head.in_features = self.head.num_features = self.num_features  # which pruning changes
        self.head.reset(num_classes, global_pool)
        self.head.to(next(self.parameters()))  # older timm forgets device and dtype
        self.head_hidden_size = self.num_features

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return feature maps of chosen levels (0 is the stem, 1 to 4 the stages).

        Args:
            x: Images ``(N, in_chans, H, W)``.
            indices: Levels to return: the last n if an int, all if ``None``.
            norm: Whether the last level passes the classifier's norm.
            stop_early: Whether to stop after the last chosen level.
            output_fmt: ``"NCHW"``.
            intermediates_only: Whether to return the maps alone.

        Returns:
            The maps, ``(N, C, H / stride, W / stride)`` each, after the final features unless ``intermediates_only``.

        Raises:
            ValueError: If ``output_fmt`` is not ``"NCHW"``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        intermediates = []

        x = self.stem[0](x)
        if 0 in take_indices:
            intermediates.append(x)
        if len(self.stem) > 1:  # else pruned to level 0
            x = self.stem[1](x)
        stages = self.stages[:max_index] if stop_early else self.stages
        for level, stage in enumerate(stages, start=1):
            x = stage(x)
            if level in take_indices:
                if self.feature_norms is not None:
                    intermediates.append(self.feature_norms[level - 1](x))
                elif norm and level == len(self.stages):
                    intermediates.append(self.head.norm(x))
                else:
                    intermediates.append(x)

        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen levels do not need; without the last stage, that includes norm and classifier.

        Args:
            indices: Levels to keep, as in `forward_intermediates`.
            prune_norm: Whether to remove the classifier's norm.
            prune_head: Whether to remove the classifier.

        Returns:
            The levels kept.
        """
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        shortened = max_index < len(self.stages)  # norm and classifier no longer fit what is left
        self.stages = self.stages[:max_index]
        if max_index == 0:
            self.stem = self.stem[:1]
        if shortened:
            self.num_features = cast(int, self.feature_info[max_index]["num_chs"])
        if prune_norm or shortened:
            self.head.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``(N, in_chans, H, W)`` to the last map ``(N, num_features, H / 32, W / 32)``."""
        return self.stages(self.stem(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map the last map to logits ``(N, num_classes)`` or, with ``pre_logits``, pooled and normalised features."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``(N, in_chans, H, W)`` to logits ``(N, num_classes)``."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.is_meta:  # which costs time there
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _kernels_of_blocks(kernel_sizes: KernelSizes, depths: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the kernel size of every block, by stage."""
    stages = (kernel_sizes,) * len(depths) if isinstance(kernel_sizes, int) else tuple(kernel_sizes)
    turns = [(stage,) if isinstance(stage, int) else tuple(stage) for stage in stages]
    if len(turns) != len(depths) or any(
        not turn or depth % len(turn) for turn, depth in zip(turns, depths, strict=True)
    ):
        raise ValueError(
            "kernel_sizes must be one size, or for each stage one size or a row of sizes that repeats to its number of "
            f"blocks, got {kernel_sizes} for depths={tuple(depths)}"
        )
    return [turn * (depth // len(turn)) for turn, depth in zip(turns, depths, strict=True)]


def _check_kernels(sizes: set[int], branches: Mapping[Any, Sequence[Sequence[int]]]) -> Branches:
    """Return the branches of every large kernel; a configuration file has strings for numbers, and lists."""
    own = {int(size): tuple((int(k), int(spread)) for k, spread in rows) for size, rows in branches.items()}
    table = {**_BRANCHES, **own}
    for size in sorted(sizes):
        if size < 0 or (size % 2 == 0 and size > 0):
            raise ValueError(f"kernel_sizes must be odd, or 0 for no kernel, got {size}")
        if size > 5 and size not in table:
            raise ValueError(
                f"kernel_sizes: no branches are known for kernels of size {size}, only for "
                f"{', '.join(map(str, sorted(table)))}; branches={{{size}: [(5, 1), …]}} names some"
            )
        for k, spread in table.get(size, ()):
            if (k - 1) * spread + 1 > size:
                raise ValueError(
                    f"branches: a kernel of size {k} and dilation {spread} reaches over {(k - 1) * spread + 1} pixels, "
                    f"beyond the large kernel of size {size}"
                )
    return table


# ---- published checkpoints ----

# Published name -> our name, tried in this order on every key: of the reference, then of a port in timm's style.
_RENAMES = (
    (r"^downsample_layers\.0\.0\.", "stem.0.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.0.bn."),
    (r"^downsample_layers\.0\.3\.", "stem.1.conv."),
    (r"^downsample_layers\.0\.4\.", "stem.1.bn."),
    (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.conv."),
    (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.bn."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.se\.down\.", ".se.fc1."),
    (r"\.se\.up\.", ".se.fc2."),
    (r"\.pwconv1\.1\.", ".pw1.conv."),
    (r"\.act\.1\.gamma$", ".grn.weight"),
    (r"\.act\.1\.beta$", ".grn.bias"),
    (r"\.pwconv2\.0\.", ".pw2.conv."),
    (r"\.pwconv2\.2\.", ".pw2.bn."),
    (r"^norm(\d)\.", r"feature_norms.\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^stem\.conv1\.", "stem.0.conv."),
    (r"^stem\.norm1\.", "stem.0.bn."),
    (r"^stem\.conv2\.", "stem.1.conv."),
    (r"^stem\.norm2\.", "stem.1.bn."),
    (r"\.downsample\.norm\.", ".downsample.bn."),
    (r"\.pwconv1\.", ".pw1.conv."),
    (r"\.pwconv2\.", ".pw2.conv."),
    (r"\.blocks\.(\d+)\.bn\.", r".blocks.\1.pw2.bn."),
    (r"\.blocks\.(\d+)\.gamma$", r".blocks.\1.layer_scale.gamma"),
    (r"\.dwconv\.(weight|bias)$", r".dwconv.branches.0.conv.\1"),
    (r"\.dwconv\.lk_origin\.", ".dwconv.branches.0.conv."),
    (r"\.dwconv\.origin_bn\.", ".dwconv.branches.0.bn."),
    (r"\.dwconv\.dil_convs\.(\d+)\.", lambda m: f".dwconv.branches.{int(m[1]) + 1}.conv."),
    (r"\.dwconv\.dil_bns\.(\d+)\.", lambda m: f".dwconv.branches.{int(m[1]) + 1}.bn."),
)
_DILATED = re.compile(r"(.*\.dwconv)\.dil_(conv|bn)_k\d+_(\d+)\.(.*)")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Rename a published checkpoint to our keys; leave one of ours alone.

    Understands the reference's classification, backbone and deployed (branches and norms already folded) checkpoints,
    and those of a port in timm's style (``stem.conv1``, ``dwconv.dil_convs``).

    Args:
        state_dict: The checkpoint's tensors by key, without what is wrapped around them.
        model: The `UniRepLKNet` to load into.

    Returns:
        State dict with our keys. Loading it strictly reports whatever does not fit.
    """
    if not {"downsample_layers.0.0.weight", "stem.conv1.weight"} & state_dict.keys():
        return state_dict

    dilations: dict[str, set[int]] = {}
    for key in state_dict:
        if match := _DILATED.fullmatch(key):
            dilations.setdefault(match[1], set()).add(int(match[3]))
    out = {}
    for key, value in state_dict.items():
        if match := _DILATED.fullmatch(key):  # branches come in the order of their dilation
            index = 1 + sorted(dilations[match[1]]).index(int(match[3]))
            key = f"{match[1]}.branches.{index}.{match[2]}.{match[4]}"
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        if re.search(r"\.pw[12]\.conv\.weight$", key) and value.ndim == 2:  # of a linear layer
            value = value[:, :, None, None]
        elif re.search(r"\.grn\.(weight|bias)$", key):
            value = value.flatten()
        out[key] = value
    if not getattr(model, "num_classes", 0):
        out = {key: value for key, value in out.items() if not key.startswith("head.fc.")}
    return _unfold_deployed(out, model)


def checkpoint_arguments(state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tell the keyword arguments without which a model has no place for some tensors.

    Args:
        state_dict: Tensors by our keys, as `checkpoint_filter_fn` returns them.

    Returns:
        ``{"norm_features": True}`` if they have norms of the returned maps, else nothing.
    """
    return {"norm_features": True} if any(key.startswith("feature_norms.") for key in state_dict) else {}


def _unfold_deployed(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Express deployed blocks, whose branches and norms are folded into biased convolutions, in the keys of ``model``.

    A model with branches and norms gets the same function: norms that only add a bias, and branches that add zero.
    """
    target, modules = model.state_dict(), dict(model.named_modules())
    out = dict(state_dict)
    for key in state_dict:
        block, found, _ = key.partition(".pw2.conv.bias")
        norm = modules.get(f"{block}.pw2.bn")
        if not found or key in target or norm is None or not is_foldable(norm):
            continue
        dtype = state_dict[key].dtype
        for name, tensor in target.items():
            if name.startswith(f"{block}.") and name not in out:
                parent, _, kind = name.rpartition(".")
                value = torch.zeros(tensor.shape, dtype=torch.int64 if kind == "num_batches_tracked" else dtype)
                if kind == "running_var":
                    value += 1 - cast(nn.BatchNorm2d, model.get_submodule(parent)).eps
                elif kind == "gamma" or (kind == "weight" and not parent.endswith(".conv")):
                    value += 1
                out[name] = value
        out[f"{block}.pw2.bn.bias"] = out.pop(key)
        depthwise = f"{block}.dwconv.branches.0"
        if f"{depthwise}.conv.bias" in out:
            into = f"{depthwise}.bn" if f"{depthwise}.bn.bias" in target else f"{block}.norm"
            out[f"{into}.bias"] = out.pop(f"{depthwise}.conv.bias")
    return out


# ---- weights: lk_backbones/weights/catalogue.json ----

default_cfgs = generate_default_cfgs(timm_configurations("UniRepLKNet", first_conv="stem.0.conv", classifier="head.fc"))


# ---- models ----


def _create_unireplknet(variant: str, pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    feature_cfg: dict[str, Any] = {"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True}
    if kwargs.get("norm_features"):
        # What is returned differs from what flows on, which only `forward_intermediates` can express.
        feature_cfg["feature_cls"] = "getter"
    return build_pretrained(UniRepLKNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_SMALLEST = {"depths": (2, 2, 6, 2), "kernel_sizes": (3, 13, 13, 13)}
_TINY = {"depths": (3, 3, 18, 3), "kernel_sizes": (3, 13, (13, 3), 13)}
_SMALL = {"depths": (3, 3, 27, 3), "kernel_sizes": (3, 13, (13, 3, 3), 13)}


@register_encoder
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-A (atto) as published, for laptops and CPUs."""
    return _create_unireplknet("unireplknet_a", pretrained, **(_SMALLEST | {"channels": (40, 80, 160, 320)} | kwargs))


@register_encoder
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-F (femto) as published."""
    return _create_unireplknet("unireplknet_f", pretrained, **(_SMALLEST | {"channels": (48, 96, 192, 384)} | kwargs))


@register_encoder
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-P (pico) as published."""
    return _create_unireplknet("unireplknet_p", pretrained, **(_SMALLEST | {"channels": (64, 128, 256, 512)} | kwargs))


@register_encoder
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-N (nano) as published."""
    args = {"depths": (2, 2, 8, 2), "channels": (80, 160, 320, 640)}
    return _create_unireplknet("unireplknet_n", pretrained, **(_SMALLEST | args | kwargs))


@register_encoder
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-T as published: every second block of the third stage has a large kernel."""
    return _create_unireplknet("unireplknet_t", pretrained, **(_TINY | {"channels": (80, 160, 320, 640)} | kwargs))


@register_encoder
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-S as published: every third block of the third stage has a large kernel."""
    return _create_unireplknet("unireplknet_s", pretrained, **(_SMALL | {"channels": (96, 192, 384, 768)} | kwargs))


@register_encoder
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-B as published."""
    return _create_unireplknet("unireplknet_b", pretrained, **(_SMALL | {"channels": (128, 256, 512, 1024)} | kwargs))


@register_encoder
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-L as published."""
    return _create_unireplknet("unireplknet_l", pretrained, **(_SMALL | {"channels": (192, 384, 768, 1536)} | kwargs))


@register_encoder
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-XL as published."""
    return _create_unireplknet("unireplknet_xl", pretrained, **(_SMALL | {"channels": (256, 512, 1024, 2048)} | kwargs))
