"""RepLKNet: ConvNets with depthwise kernels up to 31×31.

Paper: "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", CVPR 2022, arXiv 2203.06717.
Reference code and weights: DingXiaoH/RepLKNet-pytorch, MIT licence for both. MegData73M, on which the XL weights were
trained, is not public.

The layout differs from the reference in one point: the transition (1×1 and strided depthwise 3×3 convolution) is part
of the stage that follows it, so that timm's feature extraction sees one module per level; `checkpoint_filter_fn`
renames the published keys.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, create_act_layer
from timm.models import checkpoint_seq, generate_default_cfgs

from lk_backbones._private.timm import feature_take_indices
from lk_backbones._private.torch import hooks_see_output
from lk_backbones.encoders._loading import build_pretrained
from lk_backbones.encoders._registry import register_encoder
from lk_backbones.layers.create import ActLayer, NormLayer, create_norm, find_act, find_norm
from lk_backbones.layers.fold import fold_norm_into_next, is_foldable
from lk_backbones.layers.reparam import ConvNorm, InputConvNorm, ReparamLargeKernelConv2d
from lk_backbones.weights.catalogue import timm_configurations

__all__ = ["RepLKNet"]


class RepLKBlock(nn.Module):
    """Pre-norm residual block around one large depthwise convolution (paper, Figure 4).

    Args:
        channels: Channels of input and output, ``(N, channels, H, W)``.
        depthwise_channels: Channels that the large kernel works on.
        kernel_size: Odd size of the large kernel.
        small_kernel: Odd size of the parallel kernel, or ``None``.
        dilation: Distance between the taps of the depthwise kernels, in pixels.
        drop_path: Probability of dropping the residual branch of a sample in training.
        act_layer: Class of the activations.
        norm_layer: Class of the norms, called with the number of channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        channels: int,
        depthwise_channels: int,
        kernel_size: int,
        small_kernel: int | None = 5,
        dilation: int = 1,
        drop_path: float = 0.0,
        act_layer: ActLayer = nn.ReLU,
        norm_layer: NormLayer = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm: nn.Module = create_norm(norm_layer, channels, device, dtype)
        dd["norm_layer"] = norm_layer
        self.pw1 = ConvNorm(channels, depthwise_channels, 1, act_layer=act_layer, **dd)
        self.large_kernel = ReparamLargeKernelConv2d(depthwise_channels, kernel_size, small_kernel, dilation, **dd)
        self.act = create_act_layer(act_layer)
        self.pw2 = ConvNorm(depthwise_channels, channels, 1, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        out = self.pw1(self.norm(x))
        out = self.act(self.large_kernel(out))
        return x + self.drop_path(self.pw2(out))

    def reparameterize(self) -> None:
        """Fold the leading norm into the 1×1 convolution after it, in place, and the branches into one convolution.

        The activation moves right behind that one, where it can be computed along once weights are packed.
        """
        _fold_leading_norm(self)
        self.large_kernel.reparameterize()
        large = self.large_kernel.large
        hooked = hooks_see_output(self.large_kernel) or hooks_see_output(large)
        if self.large_kernel.small is None and type(large.act) is nn.Identity and not hooked:
            large.act, self.act = self.act, nn.Identity()


class ConvFFN(nn.Module):
    """Pre-norm residual feed-forward block of two 1×1 convolutions (paper, Figure 4).

    Args:
        channels: Channels of input and output, ``(N, channels, H, W)``.
        hidden_channels: Channels between the two convolutions.
        drop_path: Probability of dropping the residual branch of a sample in training.
        act_layer: Class of the activations.
        norm_layer: Class of the norms, called with the number of channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        drop_path: float = 0.0,
        act_layer: ActLayer = nn.GELU,
        norm_layer: NormLayer = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm: nn.Module = create_norm(norm_layer, channels, device, dtype)
        dd["norm_layer"] = norm_layer
        self.pw1 = ConvNorm(channels, hidden_channels, 1, act_layer=act_layer, **dd)
        self.pw2 = ConvNorm(hidden_channels, channels, 1, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        return x + self.drop_path(self.pw2(self.pw1(self.norm(x))))

    def reparameterize(self) -> None:
        """Fold the leading norm into the 1×1 convolution after it, in place."""
        _fold_leading_norm(self)


def _fold_leading_norm(block: RepLKBlock | ConvFFN) -> None:
    if is_foldable(block.norm):
        block.pw1.reparameterize()
        fold_norm_into_next(block.norm, block.pw1.conv)
        block.norm = nn.Identity()


class RepLKNetStage(nn.Module):
    """One resolution: an optional transition, then pairs of `RepLKBlock` and `ConvFFN`.

    Args:
        in_channels: Channels of the input ``(N, in_channels, H, W)``.
        channels: Channels of the output ``(N, channels, H', W')``.
        depth: Number of block pairs.
        kernel_size: Odd size of the large kernels.
        small_kernel: Odd size of the parallel kernels, or ``None``.
        transition: Whether the stage starts with a transition (every stage but the first).
        stride: Stride of the transition.
        dilation: Dilation of the transition's depthwise convolution and of the blocks' kernels.
        dw_ratio: Depthwise channels as a multiple of ``channels``.
        ffn_ratio: Hidden channels of the feed-forward blocks as a multiple of ``channels``.
        drop_path_rates: One rate for each block pair.
        act_layer: Class of every activation, or ``None`` for ReLU and, in feed-forward blocks, GELU.
        norm_layer: Class of the norms, called with the number of channels.
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
        transition: bool = True,
        stride: int = 2,
        dilation: tuple[int, int] = (1, 1),
        dw_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
        drop_path_rates: Sequence[float] = (),
        act_layer: ActLayer | None = None,
        norm_layer: NormLayer = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"norm_layer": norm_layer, "device": device, "dtype": dtype}
        act = nn.ReLU if act_layer is None else act_layer
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if transition:
            self.downsample = nn.Sequential(
                ConvNorm(in_channels, channels, 1, act_layer=act, **dd),
                ConvNorm(
                    channels, channels, 3, stride=stride, dilation=dilation[0], groups=channels, act_layer=act, **dd
                ),
            )
        blocks: list[nn.Module] = []
        for drop_path in drop_path_rates or [0.0] * depth:
            blocks.append(
                RepLKBlock(
                    channels,
                    int(channels * dw_ratio),
                    kernel_size,
                    small_kernel,
                    dilation=dilation[1],
                    drop_path=drop_path,
                    act_layer=act,
                    **dd,
                )
            )
            ffn_act = nn.GELU if act_layer is None else act_layer
            blocks.append(ConvFFN(channels, int(channels * ffn_ratio), drop_path=drop_path, act_layer=ffn_act, **dd))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, ceil(H / stride), ceil(W / stride))``."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class RepLKNet(nn.Module):
    """RepLKNet as a timm model (arXiv 2203.06717).

    Five feature levels of strides 2, 4, 8, 16, 32: level 0 is the stem's map at half resolution, levels 1 to 4 are the
    stages. Input ``(N, in_chans, H, W)`` of any size; sizes round up at each stride.

    Args:
        in_chans: Channels of the input image.
        num_classes: Classes of the classifier, 0 for none.
        global_pool: Pooling in front of the classifier, ``"avg"`` as published, or ``""`` for none.
        output_stride: Stride of the last map: 8, 16 or 32. Below 32 the later strides turn into dilation.
        depths: Pairs of large-kernel block and feed-forward block in each of the four stages.
        channels: Channels of each stage.
        kernel_sizes: Odd size of the large kernels, one for all stages or one for each. The paper's ablation compares
            3, 7, 13, (25, 25, 25, 13) and (31, 29, 27, 13).
        small_kernel: Odd size of the parallel kernels, ``None`` for none (XL). Left out of a stage whose
            ``kernel_size`` is not larger.
        dw_ratio: Channels of the large kernels as a multiple of the stage's.
        ffn_ratio: Hidden channels of the feed-forward blocks as a multiple of the stage's.
        norm_features: Whether maps 1 to 4 returned by `forward_intermediates` or ``features_only`` pass a batch norm of
            their own, as XL's do in dense tasks (it touches only what is returned, not what flows on).
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth; grows linearly from 0 at the first block pair to this at the last.
        act_layer: Class or timm name of every activation; ``None`` for the published ones, ReLU and, in feed-forward
            blocks, GELU.
        norm_layer: Class or timm name of every norm, ``None`` for the published batch norms.
            `lk_backbones.reparameterize` folds batch norms, also frozen and synchronised ones; others it leaves.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If ``output_stride``, a kernel size or the number of stages makes no sense, or timm knows no such
            activation or norm.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        depths: Sequence[int] = (2, 2, 18, 2),
        channels: Sequence[int] = (128, 256, 512, 1024),
        kernel_sizes: int | Sequence[int] = (31, 29, 27, 13),
        small_kernel: int | None = 5,
        dw_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
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
        dd: dict[str, Any] = {"norm_layer": norm_layer, "device": device, "dtype": dtype}
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        if isinstance(kernel_sizes, int):
            kernel_sizes = (kernel_sizes,) * len(depths)
        if not len(kernel_sizes) == len(depths) == len(channels) == 4:
            raise ValueError(
                "depths, channels and kernel_sizes must name the same four stages, got "
                f"depths={tuple(depths)}, channels={tuple(channels)}, kernel_sizes={tuple(kernel_sizes)}"
            )

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        width = channels[0]
        act = nn.ReLU if act_layer is None else act_layer
        self.stem = nn.Sequential(
            InputConvNorm(in_chans, width, 3, stride=2, act_layer=act, **dd),
            ConvNorm(width, width, 3, groups=width, act_layer=act, **dd),
            ConvNorm(width, width, 1, act_layer=act, **dd),
            ConvNorm(width, width, 3, stride=2, groups=width, act_layer=act, **dd),
        )
        self.feature_info = [{"num_chs": width, "reduction": 2, "module": "stem.2"}]

        drop_path_rates = cast(
            list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        )
        stages = []
        stride, dilation, in_channels = 4, 1, width
        for i, depth in enumerate(depths):
            stage_stride, first_dilation = (2, 1) if i > 0 else (1, 1)
            if i > 0 and stride >= output_stride:
                # The strided convolution keeps the dilation that it was trained at; what follows it is spread further.
                stage_stride, first_dilation, dilation = 1, dilation, dilation * 2
            stride *= stage_stride
            stages.append(
                RepLKNetStage(
                    in_channels,
                    channels[i],
                    depth,
                    kernel_sizes[i],
                    small_kernel,
                    transition=i > 0,
                    stride=stage_stride,
                    dilation=(first_dilation, dilation),
                    dw_ratio=dw_ratio,
                    ffn_ratio=ffn_ratio,
                    drop_path_rates=drop_path_rates[i],
                    act_layer=act_layer,
                    **dd,
                )
            )
            self.feature_info.append({"num_chs": channels[i], "reduction": stride, "module": f"stages.{i}"})
            in_channels = channels[i]
        self.stages = nn.Sequential(*stages)
        self.feature_norms = None
        if norm_features:
            self.feature_norms = nn.ModuleList(create_norm(norm_layer, c, device, dtype) for c in channels)

        self.num_features = self.head_hidden_size = in_channels
        self.norm: nn.Module = create_norm(norm_layer, in_channels, device, dtype)
        factory = _given({"device": device, "dtype": dtype})
        self.head = ClassifierHead(in_channels, num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameter names into layers, for layer-wise learning-rate decay."""
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm|^feature_norms", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass rather than keep its activations."""
        for stage in self.stages:
            cast(RepLKNetStage, stage).grad_checkpointing = enable

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
        self.head.in_features = self.num_features  # which pruning changes
        self.head.reset(num_classes, global_pool)
        self.head.to(next(self.parameters()))  # older timm forgets device and dtype
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

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

        x = self.stem[:3](x)
        if 0 in take_indices:
            intermediates.append(x)
        if len(self.stem) > 3:  # else pruned to level 0
            x = self.stem[3](x)
        stages = self.stages[:max_index] if stop_early else self.stages
        for level, stage in enumerate(stages, start=1):
            x = stage(x)
            if level in take_indices:
                if self.feature_norms is not None:
                    intermediates.append(self.feature_norms[level - 1](x))
                elif norm and level == len(self.stages):
                    intermediates.append(self.norm(x))
                else:
                    intermediates.append(x)

        if intermediates_only:
            return intermediates
        if len(stages) == len(self.stages):
            x = self.norm(x)
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
            self.stem = self.stem[:3]
        if shortened:
            self.num_features = cast(int, self.feature_info[max_index]["num_chs"])
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``(N, in_chans, H, W)`` to the normalised last map ``(N, num_features, H / 32, W / 32)``."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map the last map to logits ``(N, num_classes)`` or, with ``pre_logits``, pooled features."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``(N, in_chans, H, W)`` to logits ``(N, num_classes)``."""
        return self.forward_head(self.forward_features(x))


def _given(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leave out unset factory arguments, which timm's head takes only in newer releases."""
    return {key: value for key, value in kwargs.items() if value is not None}


# ---- published checkpoints ----

# Reference name -> our name, tried in this order on every key.
_RENAMES = (
    (r"^transitions\.(\d+)\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^stages\.(\d+)\.norm\.", r"feature_norms.\1."),
    (r"\.prelkb_bn\.", ".norm."),
    (r"\.preffn_bn\.", ".norm."),
    (r"\.large_kernel\.lkb_origin\.", ".large_kernel.large."),
    (r"\.large_kernel\.small_conv\.", ".large_kernel.small."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Rename a published checkpoint to our keys; leave one of ours alone.

    Understands the reference's classification, backbone and merged (small kernel already folded) checkpoints, and
    OpenMMLab's conversion of the classifiers, where the last norm is called ``stages.3.norm``.

    Args:
        state_dict: The checkpoint's tensors by key, without what is wrapped around them.
        model: The `RepLKNet` to load into.

    Returns:
        State dict with our keys. Loading it strictly reports whatever does not fit.
    """
    if "stages.0.blocks.0.prelkb_bn.weight" not in state_dict:
        return state_dict

    # Only XL's dense-task checkpoints have a norm per stage; a lone one is OpenMMLab's name for the classifier's.
    if "stages.0.norm.weight" not in state_dict:
        state_dict = {re.sub(r"^stages\.3\.norm\.", "norm.", key): value for key, value in state_dict.items()}
    out = {}
    for key, value in state_dict.items():
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        out[key] = value
    if not getattr(model, "num_classes", 0):
        out = {key: value for key, value in out.items() if not key.startswith("head.fc.")}
    return _unfold_merged(out, model)


def checkpoint_arguments(state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tell the keyword arguments without which a model has no place for some tensors.

    Args:
        state_dict: Tensors by our keys, as `checkpoint_filter_fn` returns them.

    Returns:
        ``{"norm_features": True}`` if they have norms of the returned maps, else nothing.
    """
    return {"norm_features": True} if any(key.startswith("feature_norms.") for key in state_dict) else {}


def _unfold_merged(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Express merged large kernels (``lkb_reparam``, with bias) in the keys that ``model`` has.

    A model with branches gets the same function: the merged kernel in the large branch, its bias in that branch's norm,
    and a small branch that adds zero.
    """
    target = model.state_dict()
    out = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r"(.*\.large_kernel)\.lkb_reparam\.(weight|bias)", key)
        if match is None:
            out[key] = value
            continue
        prefix, kind = match.groups()
        if f"{prefix}.large.conv.{kind}" in target or kind == "weight":
            out[f"{prefix}.large.conv.{kind}"] = value
            continue
        if f"{prefix}.large.bn.bias" not in target:  # of a block that the model does not have
            out[key] = value
            continue
        eps = cast(nn.BatchNorm2d, model.get_submodule(f"{prefix}.large.bn")).eps
        for branch in ("large", "small"):
            for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
                branch_key = f"{prefix}.{branch}.{name}"
                if branch_key in target and (branch, name) != ("large", "conv.weight"):
                    out[branch_key] = torch.zeros(target[branch_key].shape, dtype=value.dtype)
            if f"{prefix}.{branch}.bn.num_batches_tracked" in target:
                out[f"{prefix}.{branch}.bn.running_var"] += 1 - eps
                out[f"{prefix}.{branch}.bn.num_batches_tracked"] = torch.tensor(0)
        out[f"{prefix}.large.bn.weight"] += 1
        out[f"{prefix}.large.bn.bias"] = value
    return out


# ---- weights: lk_backbones/weights/catalogue.json ----

# The authors' files lie on file-sharing drives; six classifiers are mirrored over HTTP. How many classes MegData73M has
# is not stated: it loads without a classifier.
default_cfgs = generate_default_cfgs(
    timm_configurations(
        "RepLKNet",
        untrained=("replknet_31n", "replknet_31t", "replknet_3b", "replknet_7b", "replknet_25b"),
        first_conv="stem.0.conv",
        classifier="head.fc",
    )
)


# ---- models ----


def _create_replknet(variant: str, pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    feature_cfg: dict[str, Any] = {"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True}
    if kwargs.get("norm_features"):
        # What is returned differs from what flows on, which only `forward_intermediates` can express.
        feature_cfg["feature_cls"] = "getter"
    return build_pretrained(RepLKNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_NANO = {"depths": (2, 2, 6, 2), "channels": (32, 64, 128, 256)}
_TINY = {"depths": (2, 2, 18, 2), "channels": (64, 128, 256, 512)}
_BASE = {"depths": (2, 2, 18, 2), "channels": (128, 256, 512, 1024)}


@register_encoder
def replknet_31n(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-31 nano, for laptops and CPUs. Ours, no published weights."""
    return _create_replknet("replknet_31n", pretrained, **(_NANO | kwargs))


@register_encoder
def replknet_31t(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-31 tiny: half the widths of 31B. Ours, no published weights."""
    return _create_replknet("replknet_31t", pretrained, **(_TINY | kwargs))


@register_encoder
def replknet_31b(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-31B as published: kernels 31-29-27-13, 5×5 parallel branches."""
    return _create_replknet("replknet_31b", pretrained, **(_BASE | kwargs))


@register_encoder
def replknet_31l(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-31L as published: 31B one and a half times as wide."""
    return _create_replknet("replknet_31l", pretrained, **({"channels": (192, 384, 768, 1536)} | kwargs))


@register_encoder
def replknet_xl(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-XL as published: kernels 27-27-27-13 on 1.5 times the channels, no parallel branch."""
    args = {
        "channels": (256, 512, 1024, 2048),
        "kernel_sizes": (27, 27, 27, 13),
        "small_kernel": None,
        "dw_ratio": 1.5,
    }
    return _create_replknet("replknet_xl", pretrained, **(args | kwargs))


@register_encoder
def replknet_3b(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """Kernels 3-3-3-3 at 31B's widths (paper, kernel-size ablation)."""
    return _create_replknet("replknet_3b", pretrained, **(_BASE | {"kernel_sizes": 3} | kwargs))


@register_encoder
def replknet_7b(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """Kernels 7-7-7-7 at 31B's widths (paper, kernel-size ablation)."""
    return _create_replknet("replknet_7b", pretrained, **(_BASE | {"kernel_sizes": 7} | kwargs))


@register_encoder
def replknet_13b(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """Kernels 13-13-13-13 at 31B's widths (paper, kernel-size ablation)."""
    return _create_replknet("replknet_13b", pretrained, **(_BASE | {"kernel_sizes": 13} | kwargs))


@register_encoder
def replknet_25b(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """Kernels 25-25-25-13 at 31B's widths (paper, kernel-size ablation)."""
    return _create_replknet("replknet_25b", pretrained, **(_BASE | {"kernel_sizes": (25, 25, 25, 13)} | kwargs))
