"""Pointwise convolution: torch's numbers in either memory format, for gradients, autocast, transforms and exporters."""

import pytest
import torch
import torch.nn.functional as F

from lk_backbones.ops import pointwise_conv2d, to_preferred_memory_format

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def operands(memory_format=torch.channels_last, dtype=torch.float32, shape=(2, 6, 5, 7), out_channels=4):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(shape, generator=generator, dtype=dtype).to(memory_format=memory_format)
    weight = torch.randn(out_channels, shape[1], 1, 1, generator=generator, dtype=dtype)
    bias = torch.randn(out_channels, generator=generator, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (maps, weight, bias)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 1, 4, 4), (3, 6, 1, 1), (0, 6, 5, 7)], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_output_and_gradients_against_float64(memory_format, shape, with_bias):
    tensors = operands(memory_format, shape=shape)
    tensors = tensors if with_bias else tensors[:2]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output, expected = pointwise_conv2d(*tensors), F.conv2d(*exact)
    assert output.shape == expected.shape
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(
        torch.autograd.grad(output.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_keeps_the_memory_format(memory_format):
    assert pointwise_conv2d(*operands(memory_format)).is_contiguous(memory_format=memory_format)


def test_channels_last_is_a_matrix_product():
    with torch.profiler.profile() as profiler:
        pointwise_conv2d(*operands())
    names = {event.key for event in profiler.key_averages()}
    assert "aten::linear" in names
    assert "aten::conv2d" not in names


def test_autocast_computes_in_its_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = pointwise_conv2d(*operands())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), F.conv2d(*operands()), rtol=0.05, atol=0.05)


def test_function_transforms_and_exporters_see_a_convolution():
    maps, weight, bias = (tensor.detach() for tensor in operands())
    tangent = torch.randn_like(maps)
    _, ours = torch.func.jvp(lambda x: pointwise_conv2d(x, weight, bias), (maps,), (tangent,))
    torch.testing.assert_close(ours, F.conv2d(tangent, weight))

    class Layer(torch.nn.Module):
        def forward(self, x):
            return pointwise_conv2d(to_preferred_memory_format(x), weight, bias)

    graph = torch.export.export(Layer(), (maps,)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.ops.aten.conv2d.default]


def test_compiles_in_one_graph():
    tensors = operands()
    compiled = torch.compile(pointwise_conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), F.conv2d(*tensors))


def test_the_preferred_format_of_a_cpu_is_channels_last():
    maps = torch.randn(2, 3, 4, 5)
    laid_out = to_preferred_memory_format(maps)
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(laid_out, maps, rtol=0, atol=0)
    assert to_preferred_memory_format(laid_out) is laid_out
    assert to_preferred_memory_format(maps.to("meta")).is_contiguous()
