"""The auxiliary FCN head that the published segmentation models train beside their decoder.

Source: Long et al., "Fully Convolutional Networks for Semantic Segmentation" (CVPR 2015), in the form that OpenMMLab's
segmentation recipes attach to the third stage of the encoder (stride 16) with loss weight 0.4. It is used in training
only; smp has no dense auxiliary head (its ``aux_params`` adds an image classifier).
"""

import torch
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from torch import nn
from torchvision.ops import Conv2dNormActivation

__all__ = ["FCNHead"]


class FCNHead(nn.Module):
    """3x3 convolutions, each with batch norm and ReLU, then dropout and a 1x1 classifier.

    Args:
        in_channels: Channels of the feature map it reads.
        num_classes: Number of classes.
        channels: Width of the 3x3 convolutions (256 in the published models).
        num_convs: Number of 3x3 convolutions (1 in the published models).
        dropout: Probability of dropping a whole channel before the classifier.
    """

    def __init__(
        self, in_channels: int, num_classes: int, channels: int = 256, num_convs: int = 1, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if num_convs < 1:
            raise ValueError(f"num_convs must be at least 1, got {num_convs}")
        self.convs = nn.Sequential(
            *(
                # In place, the ReLU would change what a hook on the norm has kept.
                Conv2dNormActivation(in_channels if i == 0 else channels, channels, 3, inplace=False)
                for i in range(num_convs)
            )
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        initialize_decoder(self.convs)
        initialize_head(self.classifier)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """Classify every position of a feature map.

        Args:
            feature: ``(N, in_channels, H, W)``.

        Returns:
            Logits ``(N, num_classes, H, W)``, at the feature map's resolution.
        """
        return self.classifier(self.dropout(self.convs(feature)))
