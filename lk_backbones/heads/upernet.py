"""UPerNet exactly as the published large-kernel segmentation results use it.

Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding" (ECCV 2018), in OpenMMLab's form: 512
channels, pyramid pooling 1-2-3-6, no normalisation of the encoder's maps (``UPerHead``).

smp has a UPerNet too. It cannot be bent into this one from outside: it normalises every encoder map, has no dropout,
upsamples by a fixed factor of 4 (a 769 pixel crop would come back as 772), and its interpolations have
``align_corners=False`` written into them, whereas the published Cityscapes models were trained with ``True``. Hence a
decoder of our own in an otherwise ordinary smp model: every smp encoder works, and so do ``save_pretrained`` and
``smp.create_model("upernet_openmmlab", ...)``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import ClassificationHead, SegmentationHead, SegmentationModel
from segmentation_models_pytorch.base.hub_mixin import supports_config_loading
from segmentation_models_pytorch.encoders import get_encoder
from torch import nn
from torchvision.ops import Conv2dNormActivation

__all__ = ["OpenMMLabUPerNet", "UPerNetDecoder"]

# In place, the ReLU would change what a hook on the norm has kept.
_ConvNormReLU = partial(Conv2dNormActivation, inplace=False)


class PyramidPooling(nn.Module):
    """Average pooling to several grids; each is projected, upsampled and joined with the input by a 3x3 convolution.

    Source: Zhao et al., "Pyramid Scene Parsing Network" (CVPR 2017), section 3.2.
    """

    def __init__(self, in_channels: int, channels: int, pool_scales: Sequence[int], align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), _ConvNormReLU(in_channels, channels, 1)) for scale in pool_scales
        )
        self.bottleneck = _ConvNormReLU(in_channels + len(pool_scales) * channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = [x]
        for branch in self.branches:
            pooled.append(F.interpolate(branch(x), x.shape[2:], mode="bilinear", align_corners=self.align_corners))
        return self.bottleneck(torch.cat(pooled, dim=1))


class UPerNetDecoder(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid below it, and the fusion of all levels.

    Args:
        encoder_channels: Channels of every encoder map, finest first, as smp counts them (the image itself and the
            stride-2 map come first and are not used).
        channels: Width of every convolution.
        pool_scales: Grid sizes of the pyramid pooling.
        align_corners: How every bilinear interpolation treats the borders; ``True`` in the published Cityscapes models.
        dropout: Probability of dropping a whole channel of the fused map.

    Raises:
        ValueError: If fewer than two maps of stride 4 or more are given (``encoder_depth`` below 3).
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        align_corners: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        *lateral_channels, top_channels = encoder_channels[2:] or [0]
        if not lateral_channels:
            raise ValueError(f"UPerNet needs encoder_depth >= 3, got {len(encoder_channels) - 1}")
        self.align_corners = align_corners
        self.pyramid_pooling = PyramidPooling(top_channels, channels, pool_scales, align_corners)
        self.lateral_convs = nn.ModuleList(_ConvNormReLU(c, channels, 1) for c in lateral_channels)
        self.fpn_convs = nn.ModuleList(_ConvNormReLU(channels, channels, 3) for _ in lateral_channels)
        self.fusion = _ConvNormReLU(channels * (len(lateral_channels) + 1), channels, 3)
        self.dropout = nn.Dropout2d(dropout)

    def _resize(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=self.align_corners)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Fuse the encoder's maps.

        Args:
            features: The encoder's maps, finest first, each ``(N, C_i, H_i, W_i)``; the first is the image itself.

        Returns:
            One map ``(N, channels, H_2, W_2)`` at the resolution of the stride-4 feature.
        """
        top = self.pyramid_pooling(features[-1])
        levels = [top]
        for i, lateral in enumerate(self.lateral_convs):
            levels.insert(i, lateral(features[i + 2]))
        # Top-down: every level adds what the coarser one has gathered; the 3x3 convolutions come after all sums.
        for i in range(len(levels) - 2, -1, -1):
            levels[i] = levels[i] + self._resize(levels[i + 1], levels[i])
        for i, conv in enumerate(self.fpn_convs):
            levels[i] = conv(levels[i])
        for i in range(1, len(levels)):
            levels[i] = self._resize(levels[i], levels[0])
        return self.dropout(self.fusion(torch.cat(levels, dim=1)))


class OpenMMLabUPerNet(SegmentationModel):
    """UPerNet as published by OpenMMLab, on any smp encoder. Takes images of any size.

    In training mode the pyramid pooling normalises a 1x1 map over the batch, so every process needs at least two images
    (or several processes with ``SyncBatchNorm``); PyTorch raises ``ValueError`` otherwise.

    Args:
        encoder_name: An smp encoder, by its own name or ``tu-`` and a timm name.
        encoder_depth: Number of encoder stages, 3 to 5.
        encoder_weights: As in every smp model; ``None`` for random initialisation.
        decoder_channels: Width of every decoder convolution (512 in the published models).
        decoder_pool_scales: Grid sizes of the pyramid pooling.
        decoder_dropout: Probability of dropping a channel before the classifier.
        align_corners: How every interpolation treats the borders. ``False`` for the published ADE20K models, ``True``
            for Cityscapes.
        in_channels: Channels of the image.
        classes: Number of classes.
        activation: Applied to the logits, as in every smp model.
        aux_params: Parameters of smp's optional image classifier.
        **kwargs: Passed to timm, for ``tu-`` encoders.

    Raises:
        ValueError: If ``encoder_depth`` is below 3.
    """

    # every interpolation is to the size of another map, never by a factor
    requires_divisible_input_shape = False

    @supports_config_loading
    def __init__(
        self,
        encoder_name: str = "resnet34",
        encoder_depth: int = 5,
        encoder_weights: str | None = "imagenet",
        decoder_channels: int = 512,
        decoder_pool_scales: Sequence[int] = (1, 2, 3, 6),
        decoder_dropout: float = 0.1,
        align_corners: bool = False,
        in_channels: int = 3,
        classes: int = 1,
        activation: Any = None,
        aux_params: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.encoder = get_encoder(
            encoder_name, in_channels=in_channels, depth=encoder_depth, weights=encoder_weights, **kwargs
        )
        self.decoder = UPerNetDecoder(
            self.encoder.out_channels, decoder_channels, decoder_pool_scales, align_corners, decoder_dropout
        )
        self.segmentation_head = SegmentationHead(decoder_channels, classes, kernel_size=1, activation=activation)
        self.classification_head = (
            None if aux_params is None else ClassificationHead(self.encoder.out_channels[-1], **aux_params)
        )
        self.name = f"upernet_openmmlab-{encoder_name}"
        self.initialize()

    def forward(self, x: torch.Tensor) -> Any:
        """Segment a batch of images.

        Args:
            x: Normalised images ``(N, in_channels, H, W)`` of any size.

        Returns:
            Logits ``(N, classes, H, W)``, with the image classifier's output beside them if there is one.
        """
        features = self.encoder(x)
        logits = self.segmentation_head(self.decoder(features))
        logits = F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=self.align_corners)
        if self.classification_head is not None:
            return logits, self.classification_head(features[-1])
        return logits


# `smp.create_model("upernet_openmmlab", ...)` and `smp.from_pretrained`, which looks for the class in smp; a name that
# smp may use one day stays smp's
smp.MODEL_ARCHITECTURES_MAPPING.setdefault("upernet_openmmlab", OpenMMLabUPerNet)
if not hasattr(smp, "OpenMMLabUPerNet"):
    smp.OpenMMLabUPerNet = OpenMMLabUPerNet
