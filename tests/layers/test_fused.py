"""What a GPU computes along with a large convolution: the sum of branches, the activation; driven on a CPU."""

import pytest
import timm
import torch
from torch import nn

import lk_backbones
from lk_backbones.layers import DepthwiseConv2d, ReparamDepthwiseConv2d, memory_format, reparameterize
from lk_backbones.ops import _cuda, _operators


@pytest.fixture
def fused(pretended_gpu, monkeypatch):
    """What was computed along: for each pass of the kernels whether something was added, and whether cut at zero."""
    pretended_gpu["triton"] = 1.0
    passes = []
    convolve = _cuda.convolve

    def watch(input, weight, bias, path, addend=None, relu=False):
        passes.append((addend is not None, relu))
        return convolve(input, weight, bias, path, addend, relu)

    monkeypatch.setattr(_cuda, "convolve", watch)
    return passes


def strips():
    torch.manual_seed(0)
    layer = ReparamDepthwiseConv2d(3, [((21, 5), 1), ((5, 21), 1), (5, 1)])
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return layer.eval()


def test_the_sum_of_strips_is_computed_along(fused):
    layer, input = strips(), torch.randn(2, 3, 12, 16)
    folded = reparameterize(layer)
    assert len(folded.branches) == 2
    with torch.no_grad():
        expected = layer(input)
        folded(input)  # measures
        fused.clear()
        torch.testing.assert_close(folded(input), expected)
    assert fused == [(False, False), (True, False)]


def test_who_looks_sees_the_parts(fused):
    folded, input = reparameterize(strips()), torch.randn(2, 3, 12, 16)
    with torch.no_grad():
        expected = folded(input)
        seen = []
        for module in (folded.branches[1], folded.branches[1].conv, folded.branches[1].act):
            hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
            fused.clear()
            torch.testing.assert_close(folded(input), expected)
            hook.remove()
            assert (True, False) not in fused
        assert len(seen) == 3
    fused.clear()
    torch.testing.assert_close(folded(input), expected)  # gradients are on, and the weights want theirs
    assert (True, False) not in fused
    traced = torch.fx.symbolic_trace(folded)
    with torch.no_grad():
        torch.testing.assert_close(traced(input), expected)
        scripted = torch.jit.script(folded)
        torch.testing.assert_close(scripted(input), expected)


def test_layers_that_it_does_not_apply_to_say_so(fused):
    input = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        for options in ({"padding": 4, "stride": 2}, {"padding": 0}, {"padding": 4, "padding_mode": "circular"}):
            assert DepthwiseConv2d(4, 4, 9, groups=4, **options).plus(input) is None
        same = DepthwiseConv2d(4, 4, 9, groups=4, padding=4)
        torch.testing.assert_close(same.plus(input, input, relu=True), (same(input) + input).relu())


def test_on_a_cpu_nothing_is_fused():
    layer = DepthwiseConv2d(4, 4, 9, groups=4, padding=4)
    with torch.no_grad():
        assert layer.plus(torch.randn(1, 4, 8, 8)) is None


def test_a_folded_network_computes_the_same(fused, monkeypatch):
    monkeypatch.setattr(memory_format, "to_preferred_memory_format", lambda x: x)  # as on a GPU
    torch.manual_seed(0)
    model = timm.create_model("slak_n", num_classes=4).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        with monkeypatch.context() as plain:
            plain.setattr(_operators, "device_type", lambda tensor: "cpu")
            expected = model(images)
        folded = lk_backbones.reparameterize(model)
        torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-5)
        fused.clear()
        torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-5)
    assert (True, False) in fused
