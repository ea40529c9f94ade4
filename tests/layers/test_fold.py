"""Folds compute the same function: against the layers in a row, and against hand-made kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import FrozenBatchNorm2d

from lk_backbones.layers import (
    embed_kernel,
    fold_norm_into_next,
    fold_norm_into_previous,
    fold_scale_into_previous,
    fold_shift_into_next,
    fold_shift_into_previous,
    is_foldable,
    merge_kernels,
)


def randomized(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    norm.running_mean.normal_(0, 0.5, generator=generator)
    norm.running_var.uniform_(0.5, 2, generator=generator)
    for tensor in (norm.weight, norm.bias):
        if tensor is not None:
            tensor.data.normal_(0.5, 1, generator=generator)
    return norm.double().eval()


NORMS = [nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False, eps=0.1), FrozenBatchNorm2d(6), nn.SyncBatchNorm(6)]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("bias", [False, True])
def test_norm_after_a_layer(norm: nn.Module, bias: bool) -> None:
    torch.manual_seed(0)
    norm = randomized(norm)
    for layer, x in (
        (nn.Conv2d(4, 6, (3, 5), padding=(1, 2), stride=2, bias=bias), torch.randn(2, 4, 9, 9)),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias), torch.randn(2, 6, 9, 9)),
        (nn.Linear(4, 6, bias=bias), torch.randn(2, 9, 9, 4)),
    ):
        layer, x = layer.double(), x.double()
        linear = isinstance(layer, nn.Linear)
        mean, variance, eps = norm.running_mean, norm.running_var, norm.eps
        out = layer(x) if linear else layer(x).permute(0, 2, 3, 1)
        expected = (out - mean) / (variance + eps).sqrt()
        if norm.weight is not None:
            expected = expected * norm.weight + norm.bias
        fold_norm_into_previous(layer, norm)
        folded = layer(x) if linear else layer(x).permute(0, 2, 3, 1)
        torch.testing.assert_close(folded, expected, rtol=0, atol=1e-12)


def test_norm_of_features_after_a_linear_layer() -> None:
    layer, norm = nn.Linear(4, 6).double(), randomized(nn.BatchNorm1d(6))
    assert is_foldable(norm)
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = norm(layer(x))
    fold_norm_into_previous(layer, norm)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_norm_before_a_layer(bias: bool) -> None:
    norm = randomized(nn.BatchNorm2d(6))
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    conv, linear = nn.Conv2d(6, 3, 1, stride=2, bias=bias).double(), nn.Linear(6, 3, bias=bias).double()
    expected = conv(norm(x)), linear(norm(x).permute(0, 2, 3, 1))
    fold_norm_into_next(norm, conv)
    fold_norm_into_next(norm, linear)
    torch.testing.assert_close(conv(x), expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(linear(x.permute(0, 2, 3, 1)), expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_scale_after_a_layer(bias: bool) -> None:
    scale = torch.randn(6)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    conv, linear = nn.Conv2d(4, 6, 3, bias=bias).double(), nn.Linear(4, 6, bias=bias).double()
    expected = conv(x) * scale.view(1, -1, 1, 1), linear(x.permute(0, 2, 3, 1)) * scale
    fold_scale_into_previous(conv, scale.view(-1, 1, 1))
    fold_scale_into_previous(linear, scale)
    torch.testing.assert_close(conv(x), expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(linear(x.permute(0, 2, 3, 1)), expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_shift_before_a_layer(bias: bool) -> None:
    shift = torch.randn(4)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    conv, linear = nn.Conv2d(4, 6, 1, bias=bias).double(), nn.Linear(4, 6, bias=bias).double()
    expected = conv(x + shift.view(-1, 1, 1)), linear(x.permute(0, 2, 3, 1) + shift)
    fold_shift_into_next(shift.view(1, -1, 1, 1), conv)
    fold_shift_into_next(shift, linear)
    torch.testing.assert_close(conv(x), expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(linear(x.permute(0, 2, 3, 1)), expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 1, padding=1), nn.Conv2d(4, 6, 1, groups=2)])
def test_shift_before_what_sees_more_than_its_pixel_is_refused(layer: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match="a shift folds only into a following dense 1x1 convolution"):
        fold_shift_into_next(torch.ones(4), layer)


def test_other_channels_are_refused() -> None:
    # one channel would broadcast
    for channels in (1, 5):
        norm = nn.BatchNorm2d(channels)
        with pytest.raises(ValueError, match=rf"norm of {channels} channels does not follow Linear"):
            fold_norm_into_previous(nn.Linear(4, 6), norm)
        with pytest.raises(ValueError, match=rf"norm of {channels} channels does not come before Conv2d"):
            fold_norm_into_next(norm, nn.Conv2d(4, 6, 1))
        with pytest.raises(ValueError, match=rf"scale of {channels} channels does not follow Conv2d"):
            fold_scale_into_previous(nn.Conv2d(4, 6, 1), torch.ones(channels))
        with pytest.raises(ValueError, match=rf"shift of {channels} channels does not come before Linear"):
            fold_shift_into_next(torch.ones(channels), nn.Linear(4, 6))


def test_what_is_no_batch_norm_is_refused() -> None:
    for norm in (nn.GroupNorm(1, 6), nn.BatchNorm2d(6, track_running_stats=False), nn.Identity()):
        with pytest.raises(ValueError, match="only a batch norm with running statistics"):
            fold_norm_into_previous(nn.Linear(4, 6), norm)


def test_a_shared_weight_is_not_folded_for_the_other_layer() -> None:
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = layer.weight
    before = other.weight.clone()
    fold_norm_into_previous(layer, randomized(nn.BatchNorm2d(4)))
    torch.testing.assert_close(other.weight, before, rtol=0, atol=0)
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("size", "dilation", "into", "into_dilation"),
    [
        ((3, 3), (5, 5), (13, 13), (1, 1)),
        ((5, 5), (2, 2), (9, 9), (1, 1)),
        ((3, 3), (4, 4), (7, 9), (2, 2)),
        ((5, 3), (1, 3), (5, 51), (1, 1)),
        ((1, 3), (7, 2), (1, 5), (3, 1)),  # one tap along an axis has no dilation there
        ((1, 1), (1, 1), (31, 1), (2, 2)),
    ],
)
def test_an_embedded_kernel_computes_the_same(size, dilation, into, into_dilation) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 1, *size, dtype=torch.float64)
    large = embed_kernel(weight, dilation, into, into_dilation)
    assert large is not None
    assert large.shape[2:] == into
    assert large.count_nonzero() == weight.numel()
    x = torch.randn(2, 4, 17, 23, dtype=torch.float64)
    expected = F.conv2d(x, weight, dilation=dilation, padding="same", groups=4)
    torch.testing.assert_close(
        F.conv2d(x, large, dilation=into_dilation, padding="same", groups=4), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("size", "dilation", "into", "into_dilation"),
    [
        ((3, 3), (7, 7), (13, 13), (1, 1)),  # too far
        ((51, 5), (1, 1), (5, 51), (1, 1)),
        ((3, 3), (3, 3), (13, 13), (2, 2)),  # between the taps
        ((3, 3), (1, 1), (13, 13), (2, 2)),
    ],
)
def test_what_does_not_fit_is_not_embedded(size, dilation, into, into_dilation) -> None:
    assert embed_kernel(torch.ones(4, 1, *size), dilation, into, into_dilation) is None


def test_merged_kernels_keep_the_sum_and_the_first_of_equals() -> None:
    torch.manual_seed(0)

    def conv(size: tuple[int, int], dilation: int = 1, bias: bool = True) -> nn.Conv2d:
        return nn.Conv2d(4, 4, size, padding="same", dilation=dilation, groups=4, bias=bias).double()

    convs = [conv((3, 3)), conv((11, 3), bias=False), conv((3, 11)), conv((3, 11)), conv((3, 1), 5), conv((5, 5), 4)]
    x = torch.randn(2, 4, 9, 16, dtype=torch.float64)
    expected = sum(layer(x) for layer in convs)
    left = merge_kernels(convs)
    assert [convs.index(layer) for layer in left] == [1, 2, 5]  # the last reaches over 17 pixels
    torch.testing.assert_close(sum(layer(x) for layer in left), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_shift_after_a_layer(bias: bool) -> None:
    torch.manual_seed(0)
    shift = torch.randn(6, dtype=torch.float64)
    for layer, x in (
        (nn.Conv2d(4, 6, 3, padding=1, bias=bias), torch.randn(2, 4, 9, 9)),
        (nn.Linear(4, 6, bias=bias), torch.randn(2, 4)),
    ):
        layer, x = layer.double(), x.double()
        expected = layer(x) + shift.view(-1, *[1] * (x.dim() - 2))
        fold_shift_into_previous(layer, shift)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="a shift of 5 channels does not follow"):
            fold_shift_into_previous(layer, shift[:5])
