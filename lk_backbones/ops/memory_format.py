"""The memory format that a whole network runs fastest in."""

from __future__ import annotations

import torch
from torch import Tensor

from lk_backbones.ops._plan import wants_plain_convolution

__all__ = ["to_preferred_memory_format"]


def to_preferred_memory_format(input: Tensor) -> Tensor:
    """Lay a map out as the convolutions after it want it.

    On CPUs that is channels_last: there wide depthwise convolutions reach oneDNN's fast kernel, pointwise ones are
    plain matrix products, and batch norms run over whole cache lines. PyTorch's operators keep the format from layer to
    layer, so an encoder calls this once, on its input. On other devices, and for exporters and tracers, the input comes
    back as it is.

    Args:
        input: ``(N, C, H, W)``.

    Returns:
        The same values; ``input`` itself where nothing is to be done.
    """
    if input.device.type != "cpu" or input.dim() != 4 or wants_plain_convolution(input):
        return input
    return input.contiguous(memory_format=torch.channels_last)
