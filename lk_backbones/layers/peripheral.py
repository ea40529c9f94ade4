"""Peripheral convolution: very large depthwise kernels whose outer weights are shared (PeLK, arXiv 2403.07589, §3).

A kernel is fine in its centre and coarse around it. Along one axis the offsets up to a radius have weights of their
own; outside lie cells of 2, 4, 8, … offsets that share one weight each; the grid of a kernel is the product of both
axes. So 101×101 taps have 17×17 free weights. The convolution itself is dense: the weights are spread out once for
each call.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.fx
import torch.nn as nn
from timm.layers import trunc_normal_
from torch import Tensor

from lk_backbones.layers.create import NormLayer
from lk_backbones.layers.depthwise import DepthwiseConv2d
from lk_backbones.layers.fold import fold_shift_into_previous
from lk_backbones.layers.reparam import ConvNorm, ReparamDepthwiseConv2d
from lk_backbones.ops import depthwise_conv2d

__all__ = [
    "KernelPositionEmbedding",
    "PeripheralDepthwiseConv2d",
    "ReparamPeripheralConv2d",
    "expand_cells",
    "peripheral_grid",
    "sum_cells",
]

# torch.fx records each as one call.
torch.fx.wrap("depthwise_conv2d")
torch.fx.wrap("expand_cells")
torch.fx.wrap("sum_cells")


def peripheral_grid(kernel_size: int, center_radius: int = 2, base: int = 2, grid_size: int | None = None) -> list[int]:
    """Widths of the cells of a peripheral kernel along one axis.

    Offsets up to ``center_radius`` have cells of their own. From there outwards come cells of ``base``, ``base**2``,
    ``base**3``, … offsets; the outermost takes what is left, and a rest smaller than ``base`` joins its neighbour.
    Directly around the centre, which shares with none, the offsets of such a rest have cells of their own. The paper
    (§3.1) gives the sequence, and examples whose outermost cells show how it ends.

    Args:
        kernel_size: Odd size of the kernel.
        center_radius: Offsets on each side of the centre that share with none; at most ``kernel_size // 2``.
        base: Width of the innermost shared cell, and what each is wider by than the one inside it; 1 shares nothing.
        grid_size: Number of cells, odd; ``None`` for as many as the rule makes. With fewer, the outermost is wider;
            with more, a rest smaller than ``base`` is a cell of its own.

    Returns:
        The widths, from one end of the kernel to the other; their sum is ``kernel_size``.

    Raises:
        ValueError: If the kernel is even, the centre does not fit inside it, or the grid has no such number of cells.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be a positive odd number, got {kernel_size}")
    half = kernel_size // 2
    if not 0 <= center_radius <= half:
        raise ValueError(
            f"center_radius must be 0 to {half} for a kernel of {kernel_size}, which has no more offsets on each side, "
            f"got {center_radius}"
        )
    if base < 1:
        raise ValueError(f"base must be 1 at least, got {base}")
    centre = [1] * (2 * center_radius + 1)
    outside = half - center_radius
    cells: list[int] = []
    while sum(cells) < outside:
        cells.append(min(base ** (len(cells) + 1), outside - sum(cells)))
    most = len(cells)
    if cells and cells[-1] < base:
        rest = cells.pop()
        cells = [*cells[:-1], cells[-1] + rest] if cells else [1] * rest
    if grid_size is not None and grid_size != len(centre) + 2 * len(cells):
        allowed = {len(centre) + 2 * n for n in (len(cells), *range(min(1, most), most + 1))}
        if grid_size not in allowed:
            raise ValueError(
                f"grid_size must be one of {', '.join(map(str, sorted(allowed)))} for a kernel of {kernel_size} with "
                f"center_radius={center_radius} and base={base}, got {grid_size}"
            )
        cells = [base ** (i + 1) for i in range((grid_size - len(centre)) // 2 - 1)]
        cells.append(outside - sum(cells))
    return [*reversed(cells), *centre, *cells]


def _cell_of_each_tap(grid: list[int], like: Tensor) -> Tensor:
    """Return the index of each tap's cell along one axis, ``(kernel_size,)``.

    It is made anew for every call, on the device, so that there is no buffer that could be left behind (by the meta
    device, by a cast) and nothing is copied from the host.
    """
    cells = torch.arange(len(grid), device=like.device).split(1)
    return torch.cat([cells[i].expand(grid[i]) for i in range(len(grid))])


def expand_cells(weight: Tensor, grid: list[int]) -> Tensor:
    """Give every tap of a kernel the weight of its cell.

    Two selections of rows and columns: exact in every dtype and at every setting of matrix products' precision, and on
    CPUs faster than products with 0/1 matrices or one gather.

    Args:
        weight: ``(..., K', K')``, floating point.
        grid: Width of each of the ``K'`` cells along an axis, as `peripheral_grid` returns them.

    Returns:
        ``(..., K, K)``; the gradient of a cell is the sum over its taps.
    """
    index = _cell_of_each_tap(grid, weight)
    # columns first: the second, large selection then copies whole rows
    return weight.index_select(-1, index).index_select(-2, index)


def sum_cells(kernel: Tensor, grid: list[int]) -> Tensor:
    """Sum the taps of every cell: the adjoint of `expand_cells`.

    Args:
        kernel: ``(C, K, K)``, floating point.
        grid: Width of each of the ``K'`` cells along an axis, which sum to ``K``.

    Returns:
        ``(C, K', K')``, in float32 at least: hundreds of taps may lie in a cell.
    """
    kernel = kernel if kernel.dtype == torch.float64 else kernel.float()
    index = _cell_of_each_tap(grid, kernel)
    channels, cells, taps = kernel.shape[0], len(grid), kernel.shape[2]
    rows = kernel.new_zeros(channels, cells, taps).index_add(1, index, kernel)
    return rows.new_zeros(channels, cells, cells).index_add(2, index, rows)


class PeripheralDepthwiseConv2d(DepthwiseConv2d):
    """Depthwise convolution with a peripheral kernel: stride 1, zeros as padding that keep the map's size.

    A `DepthwiseConv2d` whose ``weight`` is ``(channels, 1, K', K')``, one value for each cell, while ``kernel_size`` is
    that of the dense kernel which it computes with. What multiplies whole kernels (a batch norm that is folded) or
    zeroes single weights (pruning) works on it as on any convolution.

    Args:
        channels: Channels of input and output, ``(N, channels, H, W)``.
        kernel_size: Odd size of the dense kernel; it may exceed the map.
        center_radius: As `peripheral_grid`.
        base: As `peripheral_grid`.
        grid_size: As `peripheral_grid`.
        dilation: Distance between the taps, in pixels.
        bias: Whether there is a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        grid: Widths of the cells along one axis.

    Raises:
        ValueError: As `peripheral_grid`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        center_radius: int = 2,
        base: int = 2,
        grid_size: int | None = None,
        dilation: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        grid = peripheral_grid(kernel_size, center_radius, base, grid_size)
        padding = dilation * (kernel_size // 2)
        shape = {"padding": padding, "dilation": dilation, "groups": channels}
        super().__init__(channels, channels, len(grid), **shape, bias=bias, device=device, dtype=dtype)
        self.kernel_size = (kernel_size, kernel_size)
        self.grid = grid

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` or ``(channels, H, W)`` to the same shape."""
        weight = expand_cells(self.weight, self.grid)
        if torch.jit.is_scripting():
            return self._conv_forward(input, weight, self.bias)
        else:  # the else keeps TorchScript's compiler from looking inside
            return self._fast_with(input, weight)

    @torch.jit.unused
    def _fast_with(self, input: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv2d(input, weight, self.bias, (self.dilation[0], self.dilation[1]))

    def extra_repr(self) -> str:
        """Say what the representation shows: the grid too."""
        return f"{super().extra_repr()}, grid={self.grid}"

    def dense(self) -> DepthwiseConv2d:
        """Return the plain convolution that computes the same; it has a weight of its own, and this one's bias."""
        conv = DepthwiseConv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            device="meta",
        )
        weight = expand_cells(self.weight.detach(), self.grid)
        conv.weight, conv.bias = nn.Parameter(weight, self.weight.requires_grad), self.bias
        return conv.train(self.training)

    def fuse(self) -> DepthwiseConv2d:
        """Be replaced by `dense`: what ``timm.models.reparameterize_model`` calls."""
        return self.dense()


class KernelPositionEmbedding(nn.Module):
    """Value for every tap of a kernel, added to the input under the window (PeLK, arXiv 2403.07589, Eq. 3).

    With it a convolution computes ``sum over taps i of w[i] * (x[p + i] + h[i])``. The part ``sum of w[i] * h[i]`` is
    the same at every position ``p``: a bias per channel. So nothing is added to maps; this module returns the sums of
    ``h`` over the cells that share a weight, and their products with the free weights sum to that bias. It is so at the
    border too: ``h`` is also added where the window sees the zeros that pad the map.

    One is shared by all convolutions of a stage.

    Args:
        channels: Channels of the convolutions.
        kernel_size: Size of their dense kernels.
        grid: Widths of the cells along one axis, as `peripheral_grid` returns them.
        device: Device of the parameter.
        dtype: Dtype of the parameter.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        grid: list[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.empty(channels, kernel_size, kernel_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the values from a truncated normal distribution."""
        if not self.weight.is_meta:  # which costs time there
            trunc_normal_(self.weight, std=0.02)

    def forward(self) -> Tensor:
        """Return the sums over the cells, float32 or float64 ``(channels, 1, K', K')``."""
        return sum_cells(self.weight, self.grid).unsqueeze(1)


class ReparamPeripheralConv2d(ReparamDepthwiseConv2d):
    """Peripheral depthwise convolution with a parallel small one, each with its own norm; folds into one convolution.

    The position embedding comes with the input, as the embedding belongs to a stage. The paper leaves open where the
    norms are. Right behind Eq. 3 a batch norm would subtract the embedding's bias again, which then had neither effect
    nor gradient; here the bias joins the sum behind the norms.

    Args:
        channels: Channels of input and output, ``(N, channels, H, W)``.
        kernel_size: Odd size of the dense large kernel; it may exceed the map.
        small_kernel: Odd size of the parallel kernel, or ``None`` for none. It is also left out where it is
            ``kernel_size``.
        center_radius: As `peripheral_grid`.
        base: As `peripheral_grid`.
        grid_size: As `peripheral_grid`.
        dilation: Distance between the taps of both kernels, in pixels.
        norm_layer: Class of the norms, called with the number of channels, or ``None`` for none. Only branches with
            batch norms are folded.
        position_embedding: Whether it takes a position embedding. Then the free weights are kept in folding until the
            embedding is folded too (`fold_position`).
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: As `peripheral_grid`, or if ``small_kernel`` is even, not positive or larger than ``kernel_size``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None = 5,
        center_radius: int = 2,
        base: int = 2,
        grid_size: int | None = None,
        dilation: int = 1,
        norm_layer: NormLayer | None = nn.BatchNorm2d,
        position_embedding: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = PeripheralDepthwiseConv2d(channels, kernel_size, center_radius, base, grid_size, dilation, **dd)
        if small_kernel is not None and not (0 < small_kernel <= kernel_size and small_kernel % 2):
            raise ValueError(
                f"small_kernel must be odd and at most the large kernel's size {kernel_size}, or None for no small "
                f"kernel, got {small_kernel}"
            )
        small = [] if small_kernel is None or small_kernel == kernel_size else [(small_kernel, 1)]
        super().__init__(channels, [(1, 1), *small], dilation, norm_layer=norm_layer, **dd)
        cast(ConvNorm, self.branches[0]).conv = conv
        self.position_embedding = position_embedding
        # The free weights of a convolution that was folded without the embedding, which belongs to a stage.
        self.register_parameter("cell_weight", None)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """Map ``(N, channels, H, W)`` to the same shape.

        Args:
            x: The map.
            position: What a `KernelPositionEmbedding` returns, or ``None`` for no embedding. It is not looked at if
                the module takes none, or has it folded.
        """
        out = self.branches[0](x)
        for index, branch in enumerate(self.branches):  # TorchScript cannot call what it slices off
            if index > 0:
                out = out + branch(x)
        if position is not None and self.position_embedding:
            out = out + self._position_bias(position).to(out.dtype).view(1, -1, 1, 1)
        return out

    def _position_bias(self, position: Tensor) -> Tensor:
        """Return the embedding's part of Eq. 3, ``(channels,)``."""
        if self.cell_weight is not None:
            return (self.cell_weight.to(position.dtype) * position).sum(dim=(1, 2, 3))
        else:
            return (self.branches[0].conv.weight.to(position.dtype) * position).sum(dim=(1, 2, 3))

    def reparameterize(self, dense: bool = False) -> None:
        """Spread the weights out, fold the norms and add the small kernel to the large one, in place.

        Args:
            dense: As `ReparamDepthwiseConv2d`; the kernel is dense in any case.
        """
        large = cast(ConvNorm, self.branches[0])
        if isinstance(large.conv, PeripheralDepthwiseConv2d):
            if self.position_embedding:
                self.cell_weight = cast(nn.Parameter, large.conv.weight)
            large.conv = large.conv.dense()
        super().reparameterize(dense)

    def fold_position(self, position: Tensor) -> bool:
        """Fold the position embedding into the convolution's bias, in place; call `reparameterize` first.

        Args:
            position: As `forward`, which then gets none.

        Returns:
            Whether it is folded: not if the large kernel has a norm that does not fold.
        """
        if not self.position_embedding:
            return True
        branch = cast(ConvNorm, self.branches[0])
        if self.cell_weight is None or not isinstance(branch.bn, nn.Identity):
            return False
        fold_shift_into_previous(branch.conv, self._position_bias(position.detach().double()))
        self.position_embedding = False
        self.register_parameter("cell_weight", None)
        return True
