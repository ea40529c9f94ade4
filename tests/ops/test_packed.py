"""Convolutions with packed weights: float64's numbers, and the situations in which they must not be used."""

import pytest
import torch
import torch.nn.functional as F

from lk_backbones.ops import (
    _cpu,
    bands_conv2d,
    direct_conv2d,
    explain,
    pack_bands,
    pack_direct,
    pack_weight,
    packed_conv2d,
    packed_dtype,
)

BFLOAT16 = 2**-8  # relative L2 error: an output is rounded once

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
    with torch.autocast("cpu", dtype=torch.float16):
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


needs_bfloat16 = pytest.mark.skipif(
    not _cpu.computes_bfloat16(), reason="this processor multiplies no bfloat16 numbers"
)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@needs_bfloat16
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("convolution", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_bfloat16_against_float64(convolution, activation):
    shape, padding, stride, dilation, groups = convolution
    weight, bias = randn(*shape).bfloat16(), randn(shape[0])
    packed = pack_weight(weight, (2, 6, 9, 11), padding, stride, dilation, groups)
    for input in (maps(2, 6, 9, 11), maps(1, 6, 8, 5)):
        output = packed_conv2d(input, packed, bias, padding, stride, dilation, groups, activation)
        exact = F.conv2d(input.bfloat16().double(), weight.double(), bias.double(), stride, padding, dilation, groups)
        assert output.dtype == torch.bfloat16
        assert relative_error(output, ACTIVATIONS[activation](exact)) <= BFLOAT16


@needs_bfloat16
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        ((2, 6, 9, 11), (9, 5)),
        ((1, 32, 14, 14), (27, 27)),
        ((2, 16, 8, 14), (13, 13)),
        ((1, 5, 6, 7), (31, 31)),  # larger than any window
        ((3, 16, 1, 4), (3, 5)),
        ((1, 8, 12, 30), (5, 51)),
        ((1, 8, 12, 30), (7, 3)),
    ],
)
def test_large_kernels_in_bfloat16_against_float64(size, kernel, activation):
    input, bias = maps(*size).bfloat16(), randn(size[1])
    weight = (randn(size[1], 1, *kernel) / kernel[1]).bfloat16()
    padding = (kernel[0] // 2, kernel[1] // 2)
    exact = F.conv2d(input.double(), weight.double(), bias.double(), padding=padding, groups=size[1])
    exact = ACTIVATIONS[activation](exact)
    for pack, convolve in ((pack_bands, bands_conv2d), (pack_direct, direct_conv2d)):
        packed = pack(weight, size)
        output = convolve(input, packed, bias, activation)
        assert output.dtype == torch.bfloat16
        assert output.shape == input.shape
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(output, exact) <= BFLOAT16
        more = torch.cat([input, input])  # other batches too
        torch.testing.assert_close(convolve(more, packed, bias, activation)[-len(input) :], output)
        assert relative_error(convolve(input, pack(weight, size)), exact) > BFLOAT16  # the bias counts


@needs_bfloat16
def test_bfloat16_products_are_added_up_in_float32():
    # Sums of ones end at 256 in bfloat16, as 257 is rounded back. 961 is rounded to 960.
    input, weight = (
        torch.ones(1, 32, 33, 33).bfloat16().to(memory_format=torch.channels_last),
        torch.ones(32, 1, 31, 31),
    )
    weight = weight.bfloat16()
    padding = (15, 15)
    outputs = [
        bands_conv2d(input, pack_bands(weight, input.shape)),
        direct_conv2d(input, pack_direct(weight, input.shape)),
        packed_conv2d(input, pack_weight(weight, input.shape, padding, groups=32), None, padding, groups=32),
        F.conv2d(input, weight, None, padding=15, groups=32),  # the path "native"
    ]
    for output in outputs:
        assert output[0, :, 16, 16].tolist() == [960.0] * 32


@needs_bfloat16
def test_what_is_not_finite_reaches_the_rows_that_see_it():
    input, weight = maps(1, 16, 9, 9).bfloat16(), torch.ones(16, 1, 3, 3).bfloat16()
    input[0, 3, 4, 4] = torch.nan
    output = bands_conv2d(input, pack_bands(weight, input.shape))
    assert output[0, 3, 3:6, 3:6].isnan().all()
    output[0, 3, 3:6] = 0
    assert output.isfinite().all()


def test_bfloat16_where_the_processor_has_instructions_for_it(monkeypatch):
    input, weight = maps(2, 6, 5, 7), randn(4, 6, 1, 1)
    halves = input.bfloat16(), weight.bfloat16()
    for capable in (True, False):
        monkeypatch.setattr(_cpu, "computes_bfloat16", lambda capable=capable: capable)
        expected = torch.bfloat16 if capable else None
        assert packed_dtype(*halves) == expected
        assert packed_dtype(*halves, torch.zeros(4).bfloat16()) == expected
        assert packed_dtype(*halves, torch.zeros(4)) is None
        assert packed_dtype(input, halves[1]) is None
        assert packed_dtype(input, weight) == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            for tensors in ((input, weight), (halves[0], weight), (*halves, torch.zeros(4))):
                assert packed_dtype(*tensors) == expected
            assert packed_dtype(input.double(), weight.double()) is None


def test_explain_under_autocast_tells_of_its_dtype():
    input, weight = maps(1, 64, 14, 14), randn(64, 1, 27, 27)
    with torch.autocast("cpu", torch.bfloat16):
        plan = explain(input, weight)
    assert plan == explain(input.bfloat16(), weight.bfloat16())
