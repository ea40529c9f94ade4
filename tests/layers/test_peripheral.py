"""Peripheral convolution: the printed grids, and a direct computation of the paper's equations."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from lk_backbones import reparameterize
from lk_backbones.layers import (
    ConvNorm,
    DepthwiseConv2d,
    KernelPositionEmbedding,
    PeripheralDepthwiseConv2d,
    ReparamPeripheralConv2d,
    peripheral_grid,
)
from lk_backbones.layers.peripheral import expand_cells, sum_cells
from tests.conftest import assert_golden, randomize_norms

# Kernel, radius of the centre, cells outside it from the outermost inwards. The first nine are printed in the paper and
# its talk; the others are what the same rule makes of the other published kernels.
GRIDS = [
    (31, 2, [7, 4, 2]),
    (33, 2, [8, 4, 2]),
    (37, 2, [2, 8, 4, 2]),
    (51, 2, [9, 8, 4, 2]),
    (51, 3, [8, 8, 4, 2]),
    (51, 1, [10, 8, 4, 2]),
    (51, 0, [11, 8, 4, 2]),
    (9, 1, [3]),
    (101, 3, [17, 16, 8, 4, 2]),
    (49, 2, [8, 8, 4, 2]),
    (47, 2, [7, 8, 4, 2]),
    (13, 2, [2, 2]),
    (69, 3, [17, 8, 4, 2]),
    (67, 3, [16, 8, 4, 2]),
    (13, 3, [3]),
    (151, 3, [10, 32, 16, 8, 4, 2]),
    (7, 2, [1]),  # the centre shares with none, so that what is left around it joins nothing
    (5, 2, []),
    (1, 0, []),
]


@pytest.mark.parametrize(("kernel_size", "radius", "outside"), GRIDS)
def test_every_printed_grid(kernel_size: int, radius: int, outside: list[int]) -> None:
    grid = peripheral_grid(kernel_size, radius)
    assert grid == [*outside, *[1] * (2 * radius + 1), *reversed(outside)]
    assert sum(grid) == kernel_size
    assert peripheral_grid(kernel_size, radius, grid_size=len(grid)) == grid


def test_defaults_and_settable_sizes() -> None:
    assert peripheral_grid(37) == [2, 8, 4, 2, 1, 1, 1, 1, 1, 2, 4, 8, 2]
    assert peripheral_grid(69, 3, grid_size=17)[:5] == [1, 16, 8, 4, 2]  # the rest as a cell of its own
    assert peripheral_grid(33, 0, grid_size=3) == [16, 1, 16]
    assert peripheral_grid(21, 1, base=3) == [6, 3, 1, 1, 1, 3, 6]
    assert peripheral_grid(11, 1, base=1) == [1] * 11


def test_every_grid_that_there_is_fills_its_kernel() -> None:
    for half, radius, base in product(range(20), range(20), (1, 2, 3, 4)):
        if radius > half:
            continue
        size = 2 * half + 1
        default, allowed = peripheral_grid(size, radius, base), []
        for grid_size in range(-1, size + 3):
            try:
                grid = peripheral_grid(size, radius, base, grid_size)
            except ValueError as error:
                text = str(error)
                continue
            allowed.append(grid_size)
            assert (len(grid), sum(grid), grid) == (grid_size, size, grid[::-1])
            assert min(grid) >= 1
            centre = grid[grid_size // 2 - radius : grid_size // 2 + radius + 1]
            assert centre == [1] * (2 * radius + 1)
        assert len(default) in allowed
        assert f"grid_size must be one of {', '.join(map(str, allowed))} for a kernel of {size}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((50,), "kernel_size must be a positive odd number, got 50"),
        ((-1,), "kernel_size must be a positive odd number, got -1"),
        ((5, 3), "center_radius must be 0 to 2 for a kernel of 5"),
        ((5, -1), "center_radius must be 0 to 2 for a kernel of 5"),
        ((5, 1, 0), "base must be 1 at least, got 0"),
        ((51, 2, 2, 15), r"grid_size must be one of 7, 9, 11, 13 for a kernel of 51 with center_radius=2"),
        ((51, 2, 2, 12), "grid_size must be one of 7, 9, 11, 13 .* got 12"),
        ((5, 2, 2, 3), "grid_size must be one of 5 for"),
    ],
)
def test_impossible_grids_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peripheral_grid(*arguments)
    if len(arguments) > 1 or arguments[0] < 0:
        with pytest.raises(ValueError, match=message):
            ReparamPeripheralConv2d(4, arguments[0], None, *arguments[1:])


def test_small_kernels_larger_than_the_large_one_are_refused() -> None:
    for small in (11, 4, 0):
        with pytest.raises(ValueError, match=rf"small_kernel must be odd and at most .* 9, .* got {small}"):
            ReparamPeripheralConv2d(4, 9, small, 1)
    assert len(ReparamPeripheralConv2d(4, 9, 9, 1).branches) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_tap_has_the_weight_of_its_cell(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grid = peripheral_grid(37)
    weight = torch.randn(3, 1, 13, 13, dtype=dtype, requires_grad=True)
    dense = expand_cells(weight, grid)
    row = [index for index, width in enumerate(grid) for _ in range(width)]
    expected = torch.stack([torch.stack([weight[..., i, j] for j in row], -1) for i in row], -2)
    assert torch.equal(dense, expected)
    # the gradient, and the sums of an embedding, add up what lies in a cell
    gradient = torch.randn_like(dense)
    (of_cells,) = torch.autograd.grad(dense, weight, gradient)
    corners = [sum(grid[:i]) for i in range(len(grid) + 1)]
    exact = torch.stack(
        [
            torch.stack(
                [
                    gradient.double()[..., corners[i] : corners[i + 1], corners[j] : corners[j + 1]].sum((-1, -2))
                    for j in range(13)
                ],
                -1,
            )
            for i in range(13)
        ],
        -2,
    )
    assert_golden(of_cells.double(), exact, {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype])
    sums = sum_cells(gradient[:, 0], grid)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_golden(sums.double(), exact[:, 0], 1e-6)


@pytest.mark.parametrize(("kernel_size", "radius", "dilation"), [(9, 1, 1), (17, 2, 1), (31, 2, 1), (9, 1, 2)])
def test_layer_is_the_dense_convolution(kernel_size: int, radius: int, dilation: int) -> None:
    torch.manual_seed(0)
    layer = PeripheralDepthwiseConv2d(4, kernel_size, radius, dilation=dilation, bias=True).double()
    cells = len(peripheral_grid(kernel_size, radius))
    assert layer.weight.shape == (4, 1, cells, cells)
    assert layer.kernel_size == (kernel_size, kernel_size)
    x = torch.randn(2, 4, 11, 14, dtype=torch.float64, requires_grad=True)
    dense = layer.dense()
    assert type(dense) is DepthwiseConv2d
    assert dense.weight.shape == (4, 1, kernel_size, kernel_size)
    weight = expand_cells(layer.weight, layer.grid)
    expected = F.conv2d(x, weight, layer.bias, padding="same", dilation=dilation, groups=4)
    inputs = (x, layer.weight, layer.bias)
    actual = layer(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), expected[0], rtol=0, atol=1e-12)
    gradient = torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad(actual, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-10)


def equation_3(x: torch.Tensor, w: torch.Tensor, h: torch.Tensor, cells: list[int]) -> torch.Tensor:
    """Eq. 3 word by word: for every position the sum over the window of ``w * (x + h)``, zeros around the map."""
    half = len(cells) // 2
    windows = F.pad(x, (half,) * 4).unfold(2, len(cells), 1).unfold(3, len(cells), 1)
    kernel = w[:, 0][:, cells][:, :, cells]
    return ((windows + h[None, :, None, None]) * kernel[None, :, None, None]).sum((-1, -2))


@pytest.mark.parametrize("kernel_size", [9, 21])
def test_equation_3_is_the_convolution_and_a_bias(kernel_size: int) -> None:
    torch.manual_seed(0)
    layer = ReparamPeripheralConv2d(3, kernel_size, None, norm_layer=None, position_embedding=True).double()
    grid = layer.branches[0].conv.grid
    embedding = KernelPositionEmbedding(3, kernel_size, grid).double()
    embedding.weight.data.normal_()
    x = torch.randn(2, 3, 7, 12, dtype=torch.float64, requires_grad=True)
    cells = [index for index, width in enumerate(grid) for _ in range(width)]
    inputs = (x, layer.branches[0].conv.weight, embedding.weight)
    expected = equation_3(*inputs, cells)
    actual = layer(x, embedding())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    gradient = torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad(actual, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-10)
    folded = reparameterize(layer)
    assert folded.fold_position(embedding())
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-11)


def test_the_embedding_has_a_gradient_behind_batch_norms() -> None:
    torch.manual_seed(0)
    layer = ReparamPeripheralConv2d(4, 9, 3, 1, position_embedding=True).double().train()
    embedding = KernelPositionEmbedding(4, 9, layer.branches[0].conv.grid).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    gradient = torch.randn_like(x)
    layer(x, embedding()).backward(gradient)
    # of a cell: its weight times the gradient of the bias
    cells = layer.branches[0].conv.weight[:, 0] * gradient.sum((0, 2, 3))[:, None, None]
    torch.testing.assert_close(embedding.weight.grad, expand_cells(cells, embedding.grid), rtol=0, atol=1e-12)


@pytest.mark.parametrize("small_kernel", [None, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_folds_into_one_dense_convolution(small_kernel: int | None, dilation: int) -> None:
    torch.manual_seed(0)
    layer = ReparamPeripheralConv2d(6, 21, small_kernel, dilation=dilation, position_embedding=True)
    embedding = KernelPositionEmbedding(6, 21, layer.branches[0].conv.grid).double()
    randomize_norms(layer).double().eval()
    x = torch.randn(2, 6, 17, 23, dtype=torch.float64)
    with torch.no_grad():
        expected, without, position = layer(x, embedding()), layer(x), embedding()
    assert (expected - without).abs().max() > 1e-3

    alone = reparameterize(layer)  # the embedding belongs to somebody else
    torch.testing.assert_close(alone(x, position), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(alone(x), without, rtol=0, atol=1e-12)
    alone.reparameterize()
    assert alone.fold_position(position)
    assert alone.fold_position(position)  # a second call changes nothing
    torch.testing.assert_close(alone(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(alone(x, position), expected, rtol=0, atol=1e-12)  # it is in already
    assert [type(m) for m in alone.modules() if list(m.parameters(recurse=False))] == [DepthwiseConv2d]
    assert alone.branches[0].conv.weight.shape == (6, 1, 21, 21)
    torch.testing.assert_close(layer(x, position), expected, rtol=0, atol=0)  # the original is as it was

    plain = reparameterize(ReparamPeripheralConv2d(6, 21, small_kernel, dilation=dilation))
    assert len(list(plain.parameters())) == 2  # nothing is kept for an embedding


def test_norms_that_do_not_fold_keep_the_embedding_out() -> None:
    torch.manual_seed(0)
    layer = ReparamPeripheralConv2d(4, 9, 3, 1, norm_layer=LayerNorm2d, position_embedding=True).eval()
    embedding = KernelPositionEmbedding(4, 9, layer.branches[0].conv.grid)
    x = torch.randn(2, 4, 8, 8)
    folded = reparameterize(layer)
    assert not folded.fold_position(embedding())
    torch.testing.assert_close(folded(x, embedding()), layer(x, embedding()))
    assert sum(isinstance(module, LayerNorm2d) for module in folded.modules()) == 2


def test_timm_folds_it_inside_any_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), PeripheralDepthwiseConv2d(4, 9, 1)).eval()
    row = ConvNorm(4, 4, 1, groups=4)
    row.conv = PeripheralDepthwiseConv2d(4, 9, 1)
    model.append(randomize_norms(row).eval())
    x = torch.randn(1, 3, 8, 8)
    folded = reparameterize_model(model)
    assert [type(folded[1]), type(folded[2].conv)] == [DepthwiseConv2d, DepthwiseConv2d]
    assert_golden(folded(x), model(x), 1e-5)


def test_copies_pickles_and_the_meta_device() -> None:
    torch.manual_seed(0)
    layer = ReparamPeripheralConv2d(4, 21, position_embedding=True).eval()
    x = torch.randn(1, 4, 8, 8)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    with torch.device("meta"):
        empty = ReparamPeripheralConv2d(4, 21, position_embedding=True).eval()
        assert empty(x.to("meta")).shape == x.shape
    assert not set(dict(empty.named_buffers())) - {name for name, _ in layer.named_buffers() if ".bn." in name}
    state = layer.state_dict()
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(state)
    empty.load_state_dict(state, assign=True)
    for other in (filled, empty):
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = ReparamPeripheralConv2d(4, 21, position_embedding=True).eval()
    embedding = KernelPositionEmbedding(4, 21, layer.branches[0].conv.grid)
    x = torch.randn(2, 4, 16, 16).to(memory_format=torch.channels_last)
    expected = layer(x, embedding())
    with torch.autocast("cpu", dtype):
        assert_golden(layer(x, embedding()).float(), expected, 0.02)
    layer, embedding = layer.to(dtype), embedding.to(dtype)
    out = layer(x.to(dtype), embedding())
    assert out.dtype == dtype
    assert_golden(out.float(), expected, 0.02)


def test_graphs_of_all_kinds_compute_the_same() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = ReparamPeripheralConv2d(4, 21, position_embedding=True)
            self.position = KernelPositionEmbedding(4, 21, self.conv.branches[0].conv.grid)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x, self.position())

    torch.manual_seed(0)
    model, x = Pair().eval(), torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        expected = model(x)
        others = [
            torch.jit.script(model),
            torch.jit.trace(model, x),
            torch.fx.symbolic_trace(model),
            torch.compile(model, fullgraph=True, backend="eager"),
            torch.export.export(model, (x,)).module(),
        ]
        for other in others:
            assert_golden(other(x), expected, 1e-5)


def test_pruning_zeroes_whole_cells() -> None:
    layer = PeripheralDepthwiseConv2d(2, 21)
    l1_unstructured(layer, "weight", amount=0.4)
    x = torch.randn(1, 2, 9, 9, requires_grad=True)
    layer(x).sum().backward()
    dead = layer.weight_mask == 0
    assert (layer.weight_orig.grad[dead] == 0).all()
    assert dead.float().mean() == pytest.approx(0.4, abs=0.01)
    assert (layer.dense().weight == 0).float().mean() > 0
