"""Shared by the detectors' tests."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class Maps(nn.Module):
    """Stands in for an encoder: returns given maps at strides 4 to 32, whatever the image."""

    def __init__(self, widths: Sequence[int], maps: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.out_channels = [3, 0, *widths]
        self.maps = list(maps)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, x, *self.maps]


class TinyEncoder(nn.Sequential):
    """The smallest encoder that learns: a 3x3 convolution with stride 2 for every level."""

    def __init__(self, in_channels: int = 3) -> None:
        widths = [in_channels, 8, 16, 24, 32, 32]
        super().__init__(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.ReLU())
                for a, b in pairwise(widths)
            )
        )
        self.out_channels = widths

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = [x]
        for stage in self:
            maps.append(stage(maps[-1]))
        return maps
