"""SLaK: kernels of 51×51 and beyond, as the sum of two strips and a small kernel, in a wide and sparse ConvNeXt.

Paper: "More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity", ICLR 2023, arXiv 2207.03620.
Reference code and weights: VITA-Group/SLaK, MIT licence for both.

The layout differs from the reference in three points: the norm and convolution between two stages are part of the stage
that follows them, so that timm's feature extraction sees one module per level; the linear layers are 1×1 convolutions;
and the depthwise kernels of a block are the branches of one module. `checkpoint_filter_fn` renames the published keys.

The published networks are 1.3 times as wide as ConvNeXt, and 40 % of their weights are zero. The zeros are stored, and
computed with; the published counts of parameters and multiply-adds leave them out.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import (
    DropPath,
    LayerNorm2d,
    LayerScale2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs

from lk_backbones._private.timm import feature_take_indices
from lk_backbones.encoders._loading import build_pretrained
from lk_backbones.encoders._registry import register_encoder
from lk_backbones.layers.create import ActLayer, NormLayer, find_act, find_norm
from lk_backbones.layers.fold import fold_scale_into_previous
from lk_backbones.layers.reparam import ConvNorm, InputConvNorm, ReparamDepthwiseConv2d
from lk_backbones.weights.catalogue import timm_configurations

__all__ = ["SLaK"]

_KERNEL_SIZES = (51, 49, 47, 13)
# Strips of up to this many times their width fold into one square kernel, longer ones stay two: the map matters too,
# but is not known when a model is folded. Time of the square over that of the strips (AVX512, one core, float32): 13x13
# 0.73 to 1.1 on maps of 7 to 64 pixels; 15x15 1.1 on 56 pixels; 47x47, 49x49 and 51x51 1.2 to 4.5 on 14 to 64 pixels,
# where only larger maps, 0.7 to 0.9 from 96 pixels on, reward a square.
_SQUARE = 3


class SLaKBlock(nn.Module):
    """Residual block: depthwise convolutions side by side, layer norm, feed-forward part (paper, §3 and §4).

    Args:
        channels: Channels of input and output, ``(N, channels, H, W)``.
        kernel_size: Odd length of the strips, or size of the square kernel.
        small_kernel: Odd width of the strips and size of the kernel beside them, or ``None`` for no such kernel.
        strips: Whether there are a tall and a wide strip rather than a square kernel. A kernel that is not larger than
            ``small_kernel`` is square, and alone.
        dilation: Distance between the taps of the kernels, in pixels.
        ffn_ratio: Hidden channels of the feed-forward part as a multiple of ``channels``.
        layer_scale: Initial factor of the residual branch.
        drop_path: Probability of dropping the residual branch of a sample in training.
        act_layer: Class of the activation.
        norm_layer: Class of the depthwise convolutions' norms, called with the number of channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None = 5,
        strips: bool = True,
        dilation: int = 1,
        ffn_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        act_layer: ActLayer = nn.GELU,
        norm_layer: NormLayer = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(channels * ffn_ratio)
        kernels: list[tuple[int, int]] = [(kernel_size, kernel_size)]
        if small_kernel is not None and small_kernel < kernel_size:
            if strips:
                kernels = [(kernel_size, small_kernel), (small_kernel, kernel_size)]
            kernels.append((small_kernel, small_kernel))
        self._square_is_faster = small_kernel is not None and kernel_size <= _SQUARE * small_kernel
        self.dwconv = ReparamDepthwiseConv2d(
            channels, [(kernel, 1) for kernel in kernels], dilation, norm_layer=norm_layer, **dd
        )
        self.norm = LayerNorm2d(channels, **dd)
        self.pw1 = ConvNorm(channels, hidden, 1, act_layer=act_layer, norm_layer=None, bias=True, **dd)
        self.pw2 = ConvNorm(hidden, channels, 1, norm_layer=None, bias=True, **dd)
        self.layer_scale: nn.Module = LayerScale2d(channels, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        out = self.pw2(self.pw1(self.norm(self.dwconv(x))))
        return x + self.drop_path(self.layer_scale(out))

    def reparameterize(self) -> None:
        """Fold norms and layer scale, and merge the kernels as far as that is faster, in place."""
        self.dwconv.reparameterize(dense=self._square_is_faster)
        if isinstance(self.layer_scale, LayerScale2d):
            fold_scale_into_previous(self.pw2.conv, self.layer_scale.gamma)
            self.layer_scale = nn.Identity()


class SLaKDownsample(nn.Module):
    """Layer norm and 2×2 convolution between two stages.

    Args:
        in_channels: Channels of the input ``(N, in_channels, H, W)``.
        channels: Channels of the output ``(N, channels, H', W')``.
        stride: 2, or 1 for the same function at every pixel.
        dilation: Distance between the taps, in pixels; 1 with a stride of 2.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 2,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm2d(in_channels, device=device, dtype=dtype)
        # Taps lie at a pixel and to its right and below, strided or not: padding on both sides would shift the map.
        self.pad = nn.ZeroPad2d((0, dilation, 0, dilation)) if stride == 1 else nn.Identity()
        self.conv = nn.Conv2d(in_channels, channels, 2, stride=stride, dilation=dilation, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H // stride, W // stride)``."""
        return self.conv(self.pad(self.norm(x)))


class SLaKStage(nn.Module):
    """One resolution: an optional transition, then blocks.

    Args:
        in_channels: Channels of the input ``(N, in_channels, H, W)``.
        channels: Channels of the output ``(N, channels, H', W')``.
        depth: Number of blocks.
        kernel_size: Odd length of the blocks' strips, or size of their square kernels.
        small_kernel: Odd width of the strips and size of the kernel beside them, or ``None`` for no such kernel.
        strips: Whether there are strips rather than square kernels.
        transition: Whether the stage starts with a norm and a strided convolution (every stage but the first).
        stride: Stride of that.
        dilation: Dilation of that, and of the blocks' kernels.
        ffn_ratio: Hidden channels of the feed-forward parts as a multiple of ``channels``.
        layer_scale: Initial factor of the residual branches.
        drop_path_rates: One rate for each block.
        act_layer: Class of the activations.
        norm_layer: Class of the depthwise convolutions' norms, called with the number of channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        kernel_size: int,
        small_kernel: int | None = 5,
        strips: bool = True,
        transition: bool = True,
        stride: int = 2,
        dilation: tuple[int, int] = (1, 1),
        ffn_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        drop_path_rates: Sequence[float] = (),
        act_layer: ActLayer = nn.GELU,
        norm_layer: NormLayer = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if transition:
            self.downsample = SLaKDownsample(in_channels, channels, stride, dilation[0], **dd)
        self.blocks = nn.Sequential(
            *(
                SLaKBlock(
                    channels,
                    kernel_size,
                    small_kernel,
                    strips,
                    dilation=dilation[1],
                    ffn_ratio=ffn_ratio,
                    layer_scale=layer_scale,
                    drop_path=drop_path,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    **dd,
                )
                for drop_path in drop_path_rates or [0.0] * depth
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H // stride, W // stride)``."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class SLaK(nn.Module):
    """SLaK as a timm model (arXiv 2207.03620).

    Four feature levels, as of timm's ConvNeXt: ``out_indices`` 0, 1, 2, 3 are the stages, of strides 4, 8, 16, 32. The
    stem is a 4×4 convolution of stride 4, so that no map of half resolution exists: smp's decoders see one without
    channels at stride 2. Input ``(N, in_chans, H, W)`` of 32×32 pixels at least; sizes round down at each stride, so
    that up to 31 rows and columns at the bottom and on the right of other sizes than multiples of 32 are not seen.

    Args:
        in_chans: Channels of the input image.
        num_classes: Classes of the classifier, 0 for none.
        global_pool: Pooling in front of the classifier, ``"avg"`` as published, or ``""`` for none.
        output_stride: Stride of the last map: 8, 16 or 32. Below 32 the later strides turn into dilation.
        depths: Blocks in each of the four stages.
        channels: Channels of each stage, before ``width_factor``.
        width_factor: What the channels are multiplied by, rounded down: 1.3 as published.
        kernel_sizes: Odd length of the strips, one for all stages or one for each. The paper compares 31, 51 and 61.
        small_kernel: Odd width of the strips, and size of the square kernel beside them; ``None``, with
            ``strips=False``, for no such kernel. A stage whose kernels are not larger has a single square one.
        strips: Whether the large kernels are a tall and a wide strip, as published, or one square kernel.
        ffn_ratio: Hidden channels of the feed-forward parts as a multiple of the stage's.
        layer_scale: Initial factor of the residual branches.
        norm_features: Whether maps returned by `forward_intermediates` or ``features_only`` pass a layer norm of their
            own, as published for dense tasks (it touches only what is returned, not what flows on).
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth; grows linearly from 0 at the first block to this at the last.
        act_layer: Class or timm name of every activation; ``None`` for the published GELU.
        norm_layer: Class or timm name of the norms after the depthwise convolutions, ``None`` for the published batch
            norms. `lk_backbones.reparameterize` folds batch norms, also frozen and synchronised ones; others it leaves.
            All other norms are layer norms.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If ``output_stride``, a kernel size, the number of stages or of their channels makes no sense, or
            timm knows no such activation or norm.
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
        strips: bool = True,
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
        act_layer = nn.GELU if act_layer is None else find_act(act_layer)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        kernel_sizes = _check_kernels(kernel_sizes, small_kernel, strips, depths, channels)
        widths = _widen(channels, width_factor)

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem = nn.Sequential(
            InputConvNorm(in_chans, widths[0], 4, stride=4, norm_layer=LayerNorm2d, bias=True, **dd)
        )

        self.feature_info = []
        drop_path_rates = cast(
            list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        )
        stages = []
        stride, dilation, in_channels = 4, 1, widths[0]
        for i, depth in enumerate(depths):
            stage_stride, first_dilation = (2, 1) if i > 0 else (1, 1)
            if i > 0 and stride >= output_stride:
                # The strided convolution keeps the dilation that it was trained at; what follows it is spread further.
                stage_stride, first_dilation, dilation = 1, dilation, dilation * 2
            stride *= stage_stride
            stages.append(
                self._create_stage(
                    i,
                    in_channels,
                    widths[i],
                    depth,
                    kernel_sizes[i],
                    small_kernel,
                    strips=strips,
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
            self.feature_info.append({"num_chs": widths[i], "reduction": stride, "module": f"stages.{i}"})
            in_channels = widths[i]
        self.stages = nn.Sequential(*stages)
        self.feature_norms = None
        if norm_features:
            self.feature_norms = nn.ModuleList(LayerNorm2d(c, **dd) for c in widths)

        self.num_features = self.head_hidden_size = in_channels
        self.head = NormMlpClassifierHead(in_channels, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(_init_weights)

    def _create_stage(self, index: int, *args: Any, **kwargs: Any) -> nn.Module:
        """Build a stage; families of the same design build their own."""
        return SLaKStage(*args, **kwargs)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameter names into layers, for learning-rate decay by layers or stages.

        Both are as the published decay rates count, which is ConvNeXt's way. Layers: the stem, the first stage, the
        second, every three blocks of the third, the last stage; a transition belongs to the layer behind it, as does
        what the blocks of a stage share. Stages, with ``coarse``: the stem together with all transitions, then each
        stage. Norms of returned maps are new in a dense task and learn as the head does.
        """
        if coarse:
            return {"stem": r"^stem|^stages\.\d+\.downsample", "blocks": r"^stages\.(\d+)"}
        third: list[tuple[str, tuple[int, ...] | None]] = [(r"^stages\.(2)\.(?!blocks)", (0,))]
        blocks = cast(SLaKStage, self.stages[2]).blocks if len(self.stages) > 2 else ()
        for block in range(len(blocks)):
            third.append((rf"^stages\.(2)\.blocks\.{block}\.", (block // 3,)))
        return {"stem": r"^stem", "blocks": [*third, (r"^stages\.(\d+)", None)]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass rather than keep its activations."""
        for stage in self.stages:
            cast(SLaKStage, stage).grad_checkpointing = enable

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
        """Return feature maps of chosen levels (0 to 3 are the stages, of strides 4 to 32).

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
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []

        x = self.stem(x)
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        for level, stage in enumerate(stages):
            x = stage(x)
            if level in take_indices:
                if self.feature_norms is not None:
                    intermediates.append(self.feature_norms[level](x))
                elif norm and level == len(self.stages) - 1:
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
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1  # norm and classifier no longer fit what is left
        self.stages = self.stages[: max_index + 1]
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
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_kernels(
    kernel_sizes: int | Sequence[int],
    small_kernel: int | None,
    strips: bool,
    depths: Sequence[int],
    channels: Sequence[int],
) -> tuple[int, ...]:
    """Return the kernel size of every stage."""
    sizes = (kernel_sizes,) * len(depths) if isinstance(kernel_sizes, int) else tuple(kernel_sizes)
    if not len(sizes) == len(depths) == len(channels) == 4:
        raise ValueError(
            "depths, channels and kernel_sizes must name the same four stages, got "
            f"depths={tuple(depths)}, channels={tuple(channels)}, kernel_sizes={sizes}"
        )
    for name, size in (*(("kernel_sizes", size) for size in sizes), ("small_kernel", small_kernel)):
        if size is not None and (size < 1 or size % 2 == 0):
            raise ValueError(f"{name} must be positive and odd, got {size}")
    if strips and small_kernel is None:
        raise ValueError("strips need a width, small_kernel: pass one, or strips=False for square kernels")
    return sizes


def _widen(channels: Sequence[int], width_factor: float) -> tuple[int, ...]:
    widths = tuple(int(width * width_factor) for width in channels)
    if min(widths) < 1:
        raise ValueError(
            f"channels={tuple(channels)} times width_factor={width_factor} makes stages of {widths} channels; each "
            f"needs one at least"
        )
    return widths


# ---- published checkpoints ----

# Published name -> our name, tried in this order on every key.
_RENAMES = (
    (r"^downsample_layers\.0\.0\.", "stem.0.conv."),
    (r"^downsample_layers\.0\.1\.", "stem.0.bn."),
    (r"^downsample_layers\.(\d+)\.0\.", r"stages.\1.downsample.norm."),
    (r"^downsample_layers\.(\d+)\.1\.", r"stages.\1.downsample.conv."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.large_kernel\.(?:LoRA1|lkb_origin)\.", ".dwconv.branches.0."),
    (r"\.large_kernel\.LoRA2\.", ".dwconv.branches.1."),
    (r"\.pwconv(\d)\.", r".pw\1.conv."),
    (r"\.blocks\.(\d+)\.gamma$", r".blocks.\1.layer_scale.gamma"),
    (r"^norm(\d)\.", r"feature_norms.\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Rename a published checkpoint to our keys; leave one of ours alone.

    Understands the reference's classification and backbone checkpoints, with strips or square kernels.

    Args:
        state_dict: The checkpoint's tensors by key, without what is wrapped around them.
        model: The `SLaK` to load into.

    Returns:
        State dict with our keys. Loading it strictly reports whatever does not fit.
    """
    if "downsample_layers.0.0.weight" not in state_dict:
        return state_dict
    out = {}
    for key, value in state_dict.items():
        block, found, rest = key.partition(".large_kernel.small_conv.")
        if found:  # it comes after one branch or two
            strips = f"{block}.large_kernel.LoRA2.conv.weight" in state_dict
            key = f"{block}.dwconv.branches.{2 if strips else 1}.{rest}"
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        if re.search(r"\.pw[12]\.conv\.weight$", key) and value.ndim == 2:  # of a linear layer
            value = value[:, :, None, None]
        out[key] = value
    if not getattr(model, "num_classes", 0):
        out = {key: value for key, value in out.items() if not key.startswith("head.fc.")}
    return out


def checkpoint_arguments(state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tell the keyword arguments without which a model has no place for some tensors.

    Args:
        state_dict: Tensors by our keys, as `checkpoint_filter_fn` returns them.

    Returns:
        ``norm_features`` if they have norms of the returned maps; ``kernel_sizes`` and ``strips`` if their kernels are
        not the published 51-49-47-13 in strips.
    """
    arguments: dict[str, Any] = {}
    if any(key.startswith("feature_norms.") for key in state_dict):
        arguments["norm_features"] = True
    names = [f"stages.{i}.blocks.0.dwconv.branches.0.conv.weight" for i in range(4)]
    kernels = [tuple(state_dict[name].shape[2:]) for name in names if name in state_dict]
    if len(kernels) == 4:
        if (sizes := tuple(kernel[0] for kernel in kernels)) != _KERNEL_SIZES:
            arguments["kernel_sizes"] = sizes
        if all(rows == columns for rows, columns in kernels):
            arguments["strips"] = False
    return arguments


# ---- weights: lk_backbones/weights/catalogue.json ----

# The authors' files lie on file-sharing drives.
default_cfgs = generate_default_cfgs(
    timm_configurations("SLaK", untrained=("slak_n",), first_conv="stem.0.conv", classifier="head.fc")
)


# ---- models ----


def _create_slak(variant: str, pretrained: bool = False, **kwargs: Any) -> SLaK:
    feature_cfg: dict[str, Any] = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    if kwargs.get("norm_features"):
        # What is returned differs from what flows on, which only `forward_intermediates` can express.
        feature_cfg["feature_cls"] = "getter"
    return build_pretrained(SLaK, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_SMALL = {"depths": (3, 3, 27, 3), "channels": (96, 192, 384, 768), "width_factor": 1.3}


@register_encoder
def slak_n(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK nano, for laptops and CPUs, with the widths of ConvNeXt-Atto. Ours, no published weights."""
    args = {"depths": (2, 2, 6, 2), "channels": (40, 80, 160, 320)}
    return _create_slak("slak_n", pretrained, **(args | kwargs))


@register_encoder
def slak_tiny(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-T as published: ConvNeXt-T 1.3 times as wide, kernels 51-49-47-13 in strips.

    The weights ``in1k_120ep_k31`` and ``in1k_120ep_k61`` have other kernels, and need ``kernel_sizes`` that say so.
    """
    return _create_slak("slak_tiny", pretrained, **(_SMALL | {"depths": (3, 3, 9, 3)} | kwargs))


@register_encoder
def slak_small(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-S as published: ConvNeXt-S 1.3 times as wide, kernels 51-49-47-13 in strips."""
    return _create_slak("slak_small", pretrained, **(_SMALL | kwargs))


@register_encoder
def slak_base(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-B as published: ConvNeXt-B 1.3 times as wide, kernels 51-49-47-13 in strips."""
    return _create_slak("slak_base", pretrained, **(_SMALL | {"channels": (128, 256, 512, 1024)} | kwargs))
