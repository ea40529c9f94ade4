from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lk_backbones import prepack_weights, reparameterize
from lk_backbones.layers import PackedConv2d, ReparamDepthwiseConv2d
from lk_backbones.layers.fold import fold_norm_into_next
from lk_backbones.layers.reparam import ConvNorm, ReparamLargeKernelConv2d
from tests.conftest import assert_golden, randomize_norms


@pytest.mark.parametrize("kernel_size", [1, 3, 7, 31])
@pytest.mark.parametrize("small_kernel", [None, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_large_kernel_folds_into_one_convolution(kernel_size: int, small_kernel: int | None, dilation: int) -> None:
    torch.manual_seed(0)
    layer = randomize_norms(ReparamLargeKernelConv2d(6, kernel_size, small_kernel, dilation)).double().eval()
    assert (layer.small is not None) == (small_kernel is not None and small_kernel < kernel_size)
    x = torch.randn(2, 6, 17, 23, dtype=torch.float64)
    folded = reparameterize(layer)
    assert [type(m).__name__ for m in folded.modules() if list(m.parameters(recurse=False))] == ["DepthwiseConv2d"]
    torch.testing.assert_close(folded(x), layer(x), rtol=0, atol=1e-12)
    layer.reparameterize()
    layer.reparameterize()
    torch.testing.assert_close(layer(x), folded(x), rtol=0, atol=0)


def test_small_branch_adds_to_the_large_one() -> None:
    layer = ReparamLargeKernelConv2d(4, 7, 3).eval()
    x = torch.randn(1, 4, 9, 9)
    torch.testing.assert_close(layer(x), layer.large(x) + layer.small(x))


STRIPS = [((51, 5), 1), ((5, 51), 1), (5, 1)]
DILATED = [(13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5)]
BRANCHES: dict[str, tuple[list[tuple[int | tuple[int, int], int]], list[tuple[int, int]]]] = {
    "one": ([(7, 1)], [(7, 7)]),
    "strips": (STRIPS, [(51, 5), (5, 51)]),
    "dilated": (DILATED, [(13, 13)]),
    "equal": ([(5, 1), (5, 1)], [(5, 5)]),
    "large one last": ([(3, 2), (5, 1), (9, 1)], [(9, 9)]),
    "strip inside": ([((1, 9), 1), ((9, 1), 1), (9, 1), ((3, 1), 4)], [(9, 9)]),
}


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(
    ("norm_layer", "bias", "identity"),
    [(nn.BatchNorm2d, False, True), (nn.BatchNorm2d, True, False), (None, True, True), (None, False, False)],
)
def test_branches_fold_into_as_few_as_possible(branches, dilation, norm_layer, bias, identity) -> None:
    torch.manual_seed(0)
    kernels, left = BRANCHES[branches]
    layer = ReparamDepthwiseConv2d(
        4, kernels, dilation=dilation, bias=bias, norm_layer=norm_layer, identity=identity, dtype=torch.float64
    )
    randomize_norms(layer).eval()
    x = torch.randn(2, 4, 17, 23, dtype=torch.float64)
    expected = sum(
        branch.bn(
            F.conv2d(x, branch.conv.weight, branch.conv.bias, padding="same", dilation=spread * dilation, groups=4)
        )
        for branch, (_, spread) in zip(layer.branches, kernels, strict=True)
    )
    expected = expected + layer.identity(x) if identity else expected
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)

    folded = reparameterize(layer)
    assert [branch.conv.kernel_size for branch in folded.branches] == left
    assert folded.identity is None
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-12)
    folded.reparameterize()
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-12)


def test_strided_branches_fold_too() -> None:
    torch.manual_seed(0)
    layer = randomize_norms(ReparamDepthwiseConv2d(4, [(13, 1), (3, 1)], stride=2)).double().eval()
    x = torch.randn(1, 4, 17, 24, dtype=torch.float64)
    expected = layer(x)
    assert expected.shape == (1, 4, 9, 12)
    layer.reparameterize()
    (branch,) = layer.branches
    assert (branch.conv.kernel_size, branch.conv.stride) == ((13, 13), (2, 2))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="stride must be 1 where the input itself is added"):
        ReparamDepthwiseConv2d(4, [(3, 1)], stride=2, identity=True)


def test_strips_become_a_dense_kernel_on_request() -> None:
    torch.manual_seed(0)
    layer = randomize_norms(ReparamDepthwiseConv2d(4, STRIPS, dilation=2, identity=True)).double().eval()
    x = torch.randn(1, 4, 40, 30, dtype=torch.float64)
    expected = layer(x)
    layer.reparameterize()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    layer.reparameterize(dense=True)
    (branch,) = layer.branches
    assert (branch.conv.kernel_size, branch.conv.dilation, branch.conv.padding) == ((51, 51), (2, 2), (50, 50))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_a_norm_that_follows_the_sum_folds_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 17, 23, dtype=torch.float64)
    for kernels in (STRIPS, DILATED):
        layer, norm = ReparamDepthwiseConv2d(4, kernels, identity=True), nn.BatchNorm2d(4)
        randomize_norms(nn.Sequential(layer, norm)).double().eval()
        expected = norm(layer(x))
        assert not layer.fold_norm(norm)  # before it is re-parameterised
        layer.reparameterize()
        assert not layer.fold_norm(nn.LayerNorm(4))
        torch.testing.assert_close(norm(layer(x)), expected, rtol=0, atol=1e-12)
        assert layer.fold_norm(norm)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("identity", [False, True])
def test_norms_that_do_not_fold_keep_their_branch(identity: bool) -> None:
    class Odd(nn.GroupNorm):
        def __init__(self, channels: int) -> None:
            super().__init__(2, channels)

    layer = ReparamDepthwiseConv2d(4, DILATED, norm_layer=Odd, identity=identity).eval()
    x = torch.randn(1, 4, 9, 9)
    folded = reparameterize(layer)
    assert folded.state_dict().keys() == layer.state_dict().keys()
    torch.testing.assert_close(folded(x), layer(x), rtol=0, atol=0)
    layer.branches[0].bn = layer.branches[2].bn = nn.BatchNorm2d(4).eval()  # these two fold
    folded = reparameterize(layer)
    assert len(folded.branches) == len(DILATED) - 1
    torch.testing.assert_close(folded(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ([], "at least, got none"),
        ([(4, 1)], r"positive odd .* got \(4, 4\), dilation 1"),
        ([(5, 1), ((3, 0), 1)], r"positive odd .* got \(3, 0\)"),
        ([(5, 1), (3, 0)], "dilation 0"),
        (
            [(13, 1), (3, 7)],
            r"kernel \(3, 3\) and dilation 7 reaches over \(15, 15\) pixels, which no kernel .*\(13, 13\)",
        ),
        ([((51, 5), 1), ((5, 51), 1), (3, 3)], r"dilation 3 reaches over \(7, 7\) pixels"),
        ([(3, 2)], r"dilation 2 reaches over \(5, 5\)"),
    ],
)
def test_branches_that_make_no_sense_are_refused(branches, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReparamDepthwiseConv2d(4, branches)


def test_branches_in_scripts_graphs_copies_and_on_the_meta_device() -> None:
    layer = randomize_norms(ReparamDepthwiseConv2d(4, STRIPS, identity=True)).eval()
    x = torch.randn(1, 4, 12, 15)
    with torch.no_grad():
        expected = layer(x)
        for model in (layer, reparameterize(layer)):
            for other in (torch.jit.script(model), torch.fx.symbolic_trace(model), copy.deepcopy(model)):
                torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
    assert reparameterize(ReparamDepthwiseConv2d(4, STRIPS, device="meta")).branches[0].conv.weight.is_meta


def test_convolution_with_bias_and_without_norm() -> None:
    layer = ConvNorm(4, 6, (3, 5), stride=2, norm_layer=None, bias=True, act_layer=nn.GELU)
    assert list(layer.state_dict()) == ["conv.weight", "conv.bias"]
    x = torch.randn(2, 4, 9, 11)
    expected = F.gelu(F.conv2d(x, layer.conv.weight, layer.conv.bias, stride=2, padding=(1, 2)))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(reparameterize(layer)(x), expected)


@pytest.mark.parametrize("kernel_size", [0, -3, 4])
def test_even_kernels_are_refused(kernel_size: int) -> None:
    with pytest.raises(ValueError, match=f"kernel_size must be a positive odd number, got {kernel_size}"):
        ReparamLargeKernelConv2d(4, kernel_size)


def test_norm_in_front_of_a_padded_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="1x1"):
        fold_norm_into_next(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_keeps_dtype_and_gradient_flag(dtype: torch.dtype) -> None:
    layer = randomize_norms(ConvNorm(8, 8, 3, groups=8, act_layer=nn.ReLU)).to(dtype).eval()
    layer.conv.weight.requires_grad_(False)
    x = torch.randn(1, 8, 12, 12, dtype=dtype)
    folded = reparameterize(layer)
    assert folded.conv.weight.dtype == dtype
    assert not folded.conv.weight.requires_grad
    assert_golden(folded(x).float(), layer(x).float(), 1e-6 if dtype == torch.float32 else 2e-2)


def test_sync_batchnorm_conversion_keeps_the_activation() -> None:
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(ConvNorm(4, 8, 3, act_layer=nn.ReLU)).eval()
    assert isinstance(layer.bn, nn.SyncBatchNorm)
    x = torch.randn(2, 4, 8, 8)
    assert layer(x).min() == 0
    assert_golden(reparameterize(layer)(x), layer(x), 1e-6)


def test_reparameterize_leaves_the_original_alone_unless_told() -> None:
    layer = ConvNorm(4, 8, 1).eval()
    assert reparameterize(layer) is not layer
    assert isinstance(layer.bn, nn.BatchNorm2d)
    assert reparameterize(layer, inplace=True) is layer
    assert isinstance(layer.bn, nn.Identity)


@pytest.mark.parametrize("act_layer", [None, nn.ReLU, nn.GELU, nn.SiLU])
def test_packing_folds_and_takes_the_activation_along(act_layer: type[nn.Module] | None) -> None:
    layer = randomize_norms(nn.Sequential(ConvNorm(4, 8, 1, act_layer=act_layer), ConvNorm(8, 8, 3, groups=8))).eval()
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    packed = prepack_weights(layer)
    assert isinstance(layer[0].bn, nn.BatchNorm2d)  # the original is left alone
    assert all(isinstance(layer.conv, PackedConv2d) for layer in packed)
    assert isinstance(packed[0].act, nn.SiLU if act_layer is nn.SiLU else nn.Identity)
    assert packed.state_dict().keys() == reparameterize(layer).state_dict().keys()
    with torch.inference_mode():
        assert_golden(packed(x), layer(x), 1e-6)
    assert prepack_weights(packed, inplace=True) is packed
    with torch.inference_mode():
        assert_golden(packed(x), layer(x), 1e-6)


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64 on an accelerator, as Apple's do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu" and tensor.dtype == torch.float64:
                raise TypeError("this device has no float64")
        return out


@pytest.mark.parametrize("fold", [reparameterize, prepack_weights])
def test_fold_asks_the_device_for_no_float64_and_comes_back_to_it(fold: Callable[..., nn.Module]) -> None:
    with FakeTensorMode(), WithoutFloat64():  # which needs no such device
        half: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
        layers = ConvNorm(4, 8, 1, **half), ReparamLargeKernelConv2d(8, 7, **half), ConvNorm(8, 4, 1, **half)
        model = fold(nn.Sequential(*layers), inplace=True)
        tensors = list(model.state_dict().values())
        assert len(tensors) == 6
        assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("cuda", torch.float16)}


def test_fold_on_the_meta_device() -> None:
    model = nn.Sequential(ConvNorm(4, 8, 1), ReparamLargeKernelConv2d(8, 7)).to("meta")
    assert all(tensor.is_meta for tensor in reparameterize(model).state_dict().values())
