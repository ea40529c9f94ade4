"""Convolutions with packed weights: float64's numbers, and the situations in which they must not be used."""

import pytest
import torch
import torch.nn.functional as F

from lk_backbones.ops import pack_weight, packed_conv2d, packed_dtype

ACTIVATIONS = {
    ("none", ""): lambda x: x,
    ("relu", ""): F.relu,
    ("gelu", "none"): F.gelu,
    ("gelu", "tanh"): lambda x: F.gelu(x, approximate="tanh"),
}
CONVOLUTIONS = {  # weight, padding, stride, dilation, groups
    "pointwise": ((4, 6, 1, 1), (0, 0), (1, 1), (1, 1), 1),
    "strided pointwise": ((4, 6, 1, 1), (0, 0), (2, 2), (1, 1), 1),
    "padded pointwise": ((4, 6, 1, 1), (1, 1), (1, 1), (1, 1), 1),
    "dense": ((4, 6, 3, 3), (1, 1), (2, 2), (1, 1), 1),
    "depthwise": ((6, 1, 9, 5), (4, 2), (1, 1), (1, 1), 6),
    "dilated depthwise": ((6, 1, 3, 3), (2, 4), (1, 1), (2, 4), 6),
}
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def maps(*shape: int) -> torch.Tensor:
    return randn(*shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("convolution", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_against_float64(convolution, with_bias, activation):
    shape, padding, stride, dilation, groups = convolution
    weight, bias = randn(*shape), randn(shape[0]) if with_bias else None
    packed = pack_weight(weight, (2, 6, 9, 11), padding, stride, dilation, groups)
    for size in ((2, 6, 9, 11), (1, 6, 8, 5), (3, 6, 1, 1)):  # others than the one it was packed for too
        input = maps(*size)
        output = packed_conv2d(input, packed, bias, padding, stride, dilation, groups, activation)
        exact = F.conv2d(
            input.double(),
            weight.double(),
            None if bias is None else bias.double(),
            stride,
            padding,
            dilation,
            groups,
        )
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output.double(), ACTIVATIONS[activation](exact), rtol=1e-5, atol=1e-5)


def test_where_a_packed_weight_is_of_no_use():
    input, weight = maps(2, 6, 5, 7), randn(4, 6, 1, 1)
    assert packed_dtype(input, weight)
    assert not packed_dtype(input.contiguous(), weight)
    assert not packed_dtype(input[:0], weight)
    assert not packed_dtype(input.double(), weight.double())
    assert not packed_dtype(input.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not packed_dtype(input, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not packed_dtype(input, weight)
    with torch.inference_mode():
        assert packed_dtype(input, weight)
        assert not packed_dtype(input, weight.clone())
    weight.requires_grad_()
    assert not packed_dtype(input, weight)
    with torch.no_grad():
        assert packed_dtype(input, weight)
