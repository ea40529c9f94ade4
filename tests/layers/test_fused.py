"""What a GPU computes along with a large convolution: the sum of branches, the activation; driven on a CPU."""

import pytest
import torch
from torch import nn

from lk_backbones.encoders.replknet import RepLKBlock
from lk_backbones.layers import DepthwiseConv2d, ReparamDepthwiseConv2d, prepack_weights, reparameterize
from lk_backbones.ops import _cuda


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


def test_packed_strips_and_activations_too(fused):
    layer, input = strips(), torch.randn(2, 3, 12, 16)
    packed = prepack_weights(layer)
    with torch.no_grad():
        expected = layer(input)
        packed(input)  # measures
        fused.clear()
        torch.testing.assert_close(packed(input), expected)
    assert fused == [(False, False), (True, False)]


@pytest.mark.parametrize("autocast", [False, True])
def test_the_activation_behind_a_folded_large_kernel_is_computed_along(fused, autocast):
    torch.manual_seed(0)
    block = RepLKBlock(4, 4, 13, 5).eval()
    input = torch.randn(2, 4, 8, 8)
    packed = prepack_weights(block)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = block(input)
        packed(input)  # measures
        fused.clear()
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {}
        torch.testing.assert_close(packed(input), expected, **tolerance)
        assert fused == [(False, True)]
        seen = []
        packed.large_kernel.large.conv.act.register_forward_hook(lambda *args: seen.append(args))
        fused.clear()
        torch.testing.assert_close(packed(input), expected, **tolerance)
    assert fused == [(False, False)]
    assert len(seen) == 1
