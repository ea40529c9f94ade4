"""MobileNetV2 with large depthwise kernels: the network that RepLKNet's guidelines were found with.

Paper: "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", CVPR 2022, arXiv 2203.06717, section
3; MobileNetV2 itself is timm's (Apache-2.0). The authors published neither code nor weights of it.

The networks are there to repeat the experiments of `recipes/guidelines`, not to be used: they stand in timm's registry,
by the names ``mobilenetv2_lk_050``, ``_075`` and ``_100`` (width in percent), and not in `list_encoders`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn as nn
from timm.models import generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.efficientnet import mobilenetv2_050, mobilenetv2_075, mobilenetv2_100

from lk_backbones.layers.depthwise import DepthwiseConv2d
from lk_backbones.layers.reparam import ReparamDepthwiseConv2d

__all__ = ["mobilenetv2_lk_050", "mobilenetv2_lk_075", "mobilenetv2_lk_100"]

_STAGES = 7  # rows of bottlenecks in MobileNetV2's table (arXiv 1801.04381, Table 2)


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv_stem",
        "classifier": "classifier",
    }


default_cfgs = generate_default_cfgs(
    {f"mobilenetv2_lk_{width}.untrained": _cfg() for width in ("050", "075", "100")},
)


def _create_mobilenetv2_lk(
    name: str,
    base: Callable[..., Any],
    pretrained: bool,
    kernel_sizes: int | Sequence[int] = 3,
    small_kernel: int | None = None,
    dilation: int = 1,
    shortcut: bool = True,
    **kwargs: Any,
) -> Any:
    """Build timm's MobileNetV2 and replace its depthwise convolutions, the strided ones too.

    Args:
        name: Name of the variant.
        base: What builds timm's.
        pretrained: Must be false.
        kernel_sizes: Odd size of the depthwise kernels, or one for each of the seven rows of MobileNetV2's table.
            The paper's "last stage" is the last row: so its parameters agree with those printed (arXiv 2410.08049,
            Table 2).
        small_kernel: Odd size of a kernel parallel to those that are larger, each with a norm of its own; ``None``
            for none. Re-parameterisation merges the two.
        dilation: Distance between the taps of all depthwise kernels, in pixels.
        shortcut: Whether blocks that keep the map's size and channels add their input.
        **kwargs: As timm's MobileNetV2.

    Returns:
        The model, a `timm.models.EfficientNet`; its features with ``features_only=True``.

    Raises:
        ValueError: If weights are asked for, or a size is impossible.
    """
    if pretrained:
        raise ValueError(f"nobody published weights of {name}: use pretrained=False")
    sizes = [kernel_sizes] * _STAGES if isinstance(kernel_sizes, int) else list(kernel_sizes)
    if len(sizes) != _STAGES:
        raise ValueError(f"kernel_sizes must be one size or {_STAGES}, got {len(sizes)}: {sizes}")
    for key, value in [("kernel_sizes", size) for size in sizes] + [("small_kernel", small_kernel)]:
        if value is not None and not (value > 0 and value % 2):
            raise ValueError(f"{key} must be odd and positive, got {value}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or get_pretrained_cfg(name)  # else that of timm's own
    model = base(pretrained=False, **kwargs)
    for stage, size in zip(model.blocks, sizes, strict=True):
        for block in stage:
            block.has_skip = block.has_skip and shortcut
            _enlarge(block, size, small_kernel, dilation)
    return model


def _enlarge(block: Any, size: int, small_kernel: int | None, dilation: int) -> None:
    """Replace the depthwise convolution of one of timm's blocks, and with a parallel kernel its norm too."""
    conv = block.conv_dw
    norm = "bn2" if hasattr(block, "conv_pwl") else "bn1"  # a block without expansion has no norm before it
    has_small = small_kernel is not None and small_kernel < size
    if (size, size) == conv.kernel_size and dilation == 1 and not has_small:
        return
    channels, stride, step = conv.in_channels, conv.stride[0], conv.dilation[0] * dilation
    like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    if has_small:
        assert small_kernel is not None
        old = getattr(block, norm)
        block.conv_dw = ReparamDepthwiseConv2d(
            channels,
            [(size, 1), (small_kernel, 1)],
            dilation=step,
            norm_layer=partial(nn.BatchNorm2d, eps=old.eps, momentum=old.momentum),
            stride=stride,
            **like,
        )
        setattr(block, norm, old.act)  # the branches have norms
    else:
        block.conv_dw = DepthwiseConv2d(
            channels, channels, size, stride, step * (size // 2), step, groups=channels, bias=False, **like
        )
    for module in block.conv_dw.modules():
        if isinstance(module, nn.Conv2d):  # as timm initialises the others
            nn.init.normal_(module.weight, 0, math.sqrt(2 / math.prod(module.kernel_size)))


@register_model
def mobilenetv2_lk_050(pretrained: bool = False, **kwargs: Any) -> Any:
    """MobileNetV2 of half the width with large kernels, for small experiments."""
    return _create_mobilenetv2_lk("mobilenetv2_lk_050", mobilenetv2_050, pretrained, **kwargs)


@register_model
def mobilenetv2_lk_075(pretrained: bool = False, **kwargs: Any) -> Any:
    """MobileNetV2 of three quarters of the width with large kernels."""
    return _create_mobilenetv2_lk("mobilenetv2_lk_075", mobilenetv2_075, pretrained, **kwargs)


@register_model
def mobilenetv2_lk_100(pretrained: bool = False, **kwargs: Any) -> Any:
    """MobileNetV2 with large kernels, as the paper's guidelines compare it."""
    return _create_mobilenetv2_lk("mobilenetv2_lk_100", mobilenetv2_100, pretrained, **kwargs)
