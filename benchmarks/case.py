"""A shape of a depthwise convolution, for the benchmarks of the operator."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lk_backbones.ops._shapes import crop_kernel, taps_inside


@dataclass(frozen=True)
class Case:
    """One shape: input ``(batch, channels, height, width)`` and kernel ``(kernel_height, kernel_width)``."""

    group: str
    batch: int
    channels: int
    height: int
    width: int
    kernel_height: int
    kernel_width: int

    @property
    def label(self) -> str:
        return f"{self.batch}×{self.channels}×{self.height}×{self.width} k{self.kernel_height}×{self.kernel_width}"

    @property
    def flops(self) -> int:
        """Useful floating point operations of the forward."""
        sizes = (self.height, self.width)
        kernel = crop_kernel((self.kernel_height, self.kernel_width), sizes)
        taps = math.prod(taps_inside(size, side) for size, side in zip(sizes, kernel, strict=True))
        return 2 * self.batch * self.channels * taps
