"""An smp encoder under a feature pyramid, in the protocol of torchvision's detectors.

Source: Lin et al., "Feature Pyramid Networks for Object Detection" (CVPR 2017). The pyramid itself is torchvision's;
what is written here is the way from an smp encoder into it, which torchvision's ``BackboneWithFPN`` (children of a
torchvision classifier only) lacks.
"""

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

__all__ = ["EncoderPyramid"]


class EncoderPyramid(nn.Module):
    """Feature pyramid over an encoder's maps: strides 4 to 64, or 8 to 128 for dense detectors.

    Args:
        encoder: An smp encoder of depth 5 (maps at strides 1, 2, 4, … 32) with an output stride of 32.
        out_channels: Width of every map of the pyramid.
        dense: Strides 8 to 128, where 64 and 128 come from stride-2 convolutions on the map of stride 32 (RetinaNet,
            FCOS), instead of 4 to 64, where 64 is every other value of the map of stride 32 (Faster R-CNN and its
            like).
        batch_norm: Whether every convolution of the pyramid, except those for strides 64 and 128, is followed by a
            batch norm. The published models have none.

    Attributes:
        encoder: The encoder.
        fpn: torchvision's pyramid.
        out_channels: Width of every map, as torchvision's detectors ask for it.
        strides: Stride of every map.

    Raises:
        ValueError: If the encoder does not have the maps of stride 4 to 32.
    """

    def __init__(
        self, encoder: nn.Module, out_channels: int = 256, dense: bool = False, batch_norm: bool = False
    ) -> None:
        super().__init__()
        widths: list[int] = list(cast(Any, encoder).out_channels)
        if len(widths) != 6 or getattr(encoder, "output_stride", 32) != 32 or 0 in widths[2:]:
            raise ValueError(
                f"a pyramid needs an encoder with maps at strides 4, 8, 16 and 32 (depth=5, output_stride=32); "
                f"{type(encoder).__name__} has output_stride={getattr(encoder, 'output_stride', 32)} and maps of "
                f"{widths} channels at strides 1, 2, 4, …"
            )
        self.encoder = encoder
        self.first_level = 3 if dense else 2
        self.fpn = FeaturePyramidNetwork(
            widths[self.first_level :],
            out_channels,
            LastLevelP6P7(out_channels, out_channels) if dense else LastLevelMaxPool(),
            nn.BatchNorm2d if batch_norm else None,
        )
        self.out_channels = out_channels
        self.strides = (8, 16, 32, 64, 128) if dense else (4, 8, 16, 32, 64)

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Map images to the maps of the pyramid.

        Args:
            x: Normalised images ``(N, C, H, W)``, H and W divisible by 32.

        Returns:
            Maps ``(N, out_channels, H / stride, W / stride)`` (rounded up), finest first, under torchvision's names:
            ``"0"``, ``"1"``, … and ``"pool"``, or ``"p6"`` and ``"p7"``.
        """
        features = self.encoder(x)
        maps = features[self.first_level :]
        if self.training and self.first_level > 2:
            # An encoder may have modules for a map that is left out here (a norm, say). This keeps them in the graph,
            # with zero gradients, so that DistributedDataParallel finds every parameter in use.
            maps = [maps[0] + 0 * features[2].mean(), *maps[1:]]
        return self.fpn(OrderedDict((str(i), feature) for i, feature in enumerate(maps)))
