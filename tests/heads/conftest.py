"""Shared by the detectors' tests."""

from collections.abc import Sequence

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
