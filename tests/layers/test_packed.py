"""Layers with packed weights: the same numbers, never from a weight that has changed, and no trace in what is saved."""

import copy
import io

import pytest
import torch
import torch.nn as nn

from lk_backbones.layers import DepthwiseConv2d, PackedConv2d, PointwiseConv2d
from lk_backbones.layers.packed import fuses, pack

MAPS = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)


LAYERS = {
    "pointwise": (PointwiseConv2d, {"out_channels": 6, "kernel_size": 1}),
    "strided pointwise": (PointwiseConv2d, {"out_channels": 6, "kernel_size": 1, "stride": 2}),
    "dense": (nn.Conv2d, {"out_channels": 6, "kernel_size": 3, "padding": 1, "stride": 2}),
    "depthwise": (DepthwiseConv2d, {"out_channels": 8, "kernel_size": (7, 5), "padding": (3, 2), "groups": 8}),
    "depthwise by name": (DepthwiseConv2d, {"out_channels": 8, "kernel_size": 7, "padding": "same", "groups": 8}),
    "strided depthwise": (
        DepthwiseConv2d,
        {"out_channels": 8, "kernel_size": 3, "padding": 1, "stride": 2, "groups": 8},
    ),
    "reflecting": (nn.Conv2d, {"out_channels": 6, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
}
PACKED_OPERATORS = {"mkldnn::_linear_pointwise", "mkldnn::_convolution_pointwise"}


def packed_layer(act: nn.Module | None = None, kind: str = "pointwise") -> tuple[PackedConv2d, nn.Module]:
    """A packed layer, used once, and what it stands for."""
    torch.manual_seed(0)
    act = nn.Identity() if act is None else act
    layer_type, options = LAYERS[kind]
    plain = nn.Sequential(nn.Conv2d(8, **options), act)
    layer = layer_type(8, **options)
    layer.load_state_dict(plain[0].state_dict())
    assert pack(layer, act)
    with torch.no_grad():
        layer(MAPS)
    return layer, plain


def operators(layer: nn.Module, maps: torch.Tensor) -> set[str]:
    with torch.profiler.profile() as profiler, torch.no_grad():
        layer(maps)
    return {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("act", [nn.Identity(), nn.ReLU(inplace=True), nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_layer_is_its_parts(kind, act):
    layer, plain = packed_layer(act, kind)
    assert fuses(act) == (not isinstance(act, nn.SiLU))
    packs = fuses(act) and kind not in ("reflecting", "depthwise by name") and torch.backends.mkldnn.is_available()
    assert bool(operators(layer, MAPS) & PACKED_OPERATORS) == packs
    for input in (MAPS, MAPS[:1], MAPS.contiguous(), MAPS[0]):
        with torch.no_grad():
            torch.testing.assert_close(layer(input), plain(input), rtol=1e-5, atol=1e-6)
    maps, twin = MAPS.clone().requires_grad_(), MAPS.clone().requires_grad_()
    layer(maps).sum().backward()
    plain(twin).sum().backward()
    torch.testing.assert_close(maps.grad, twin.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, plain[0].weight.grad, rtol=1e-5, atol=1e-5)


def test_packed_weight_follows_the_weight():
    layer, plain = packed_layer()
    with torch.no_grad():
        for conv in (layer, plain[0]):
            conv.weight.mul_(2)
        torch.testing.assert_close(layer(MAPS), plain(MAPS), rtol=1e-5, atol=1e-6)
        other = {name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()}
        layer.load_state_dict(other)
        plain[0].load_state_dict(other)
        torch.testing.assert_close(layer(MAPS), plain(MAPS), rtol=1e-5, atol=1e-6)
        layer.weight = nn.Parameter(torch.ones_like(layer.weight))
        plain[0].weight = nn.Parameter(torch.ones_like(layer.weight))
        torch.testing.assert_close(layer(MAPS), plain(MAPS), rtol=1e-5, atol=1e-6)
        for conv in (layer, plain[0]):  # another weight at the same address and of the same version
            conv.weight.data.mul_(3)
            conv.weight = nn.Parameter(conv.weight.data)
        torch.testing.assert_close(layer(MAPS), plain(MAPS), rtol=1e-5, atol=1e-6)


def test_packed_layer_is_copied_saved_and_cast_without_the_packed_weight():
    layer, plain = packed_layer(nn.GELU())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)  # the file is ours
    with torch.no_grad():
        for other in (copy.deepcopy(layer), loaded):
            assert list(other.state_dict()) == ["weight", "bias"]
            torch.testing.assert_close(other(MAPS), plain(MAPS), rtol=1e-5, atol=1e-6)
        layer, plain = layer.double(), plain.double()
        torch.testing.assert_close(layer(MAPS.double()), plain(MAPS.double()), rtol=1e-12, atol=1e-12)
        layer.float()(MAPS)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(layer), buffer)
        buffer.seek(0)
        scripted = torch.jit.load(buffer)
        torch.testing.assert_close(scripted(MAPS), plain(MAPS.double()).float(), rtol=1e-5, atol=1e-6)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(MAPS), scripted(MAPS), rtol=1e-5, atol=1e-6)
        exported = torch.export.export(layer, (MAPS,)).module()
        torch.testing.assert_close(exported(MAPS), scripted(MAPS), rtol=1e-5, atol=1e-6)


def test_tracers_and_transforms_see_plain_convolutions():
    layer, plain = packed_layer(nn.GELU())
    with torch.no_grad():
        traced = torch.jit.trace(layer, MAPS)
        assert "mkldnn::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(MAPS), plain(MAPS), rtol=1e-5, atol=1e-6)
        tangent = torch.ones_like(MAPS)
        _, ours = torch.func.jvp(layer, (MAPS,), (tangent,))
        _, theirs = torch.func.jvp(plain, (MAPS,), (tangent,))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_hooks_on_the_activation_are_still_called():
    layer, _ = packed_layer(nn.ReLU())
    seen = []
    layer.act.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        output = layer(MAPS)
    assert seen[0] is output


def test_weights_made_in_inference_mode_are_not_packed():
    with torch.inference_mode():  # where PyTorch does not count a tensor's changes
        layer = PointwiseConv2d(8, 6, 1)
        assert pack(layer)
        before = layer(MAPS)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(MAPS), 2 * before)


def test_attributes_changed_afterwards_count():
    layer, plain = packed_layer()
    for conv in (layer, plain[0]):
        conv.stride = (2, 2)
    with torch.no_grad():
        torch.testing.assert_close(layer(MAPS), plain(MAPS), rtol=1e-5, atol=1e-6)
        for conv in (layer, plain[0]):
            conv.padding = (1, 1)
        torch.testing.assert_close(layer(MAPS), plain(MAPS), rtol=1e-5, atol=1e-6)


def test_module_wide_changes_of_the_weights_count():
    layer, plain = packed_layer()
    for module in (layer, plain):  # as .to() and the like do it, here at the same address and uncounted
        module._apply(lambda tensor: tensor.data.mul_(2))
    with torch.no_grad():
        torch.testing.assert_close(layer(MAPS), plain(MAPS), rtol=1e-5, atol=1e-6)


def test_a_packed_layer_can_be_made_directly():
    torch.manual_seed(0)
    layer = PackedConv2d(8, 6, 3, padding=1, act=nn.GELU())
    plain = nn.Conv2d(8, 6, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(layer(MAPS), nn.functional.gelu(plain(MAPS)), rtol=1e-5, atol=1e-6)


def test_subclasses_are_left_alone():
    class Scaled(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    layer = Scaled(8, 6, 1)
    assert not pack(layer)
    assert type(layer) is Scaled
    assert not pack(nn.ConvTranspose2d(8, 6, 1))


def test_what_runs_through_transforms_is_not_packed():
    layer = DepthwiseConv2d(16, 16, 63, padding=31, groups=16)
    maps = torch.randn(1, 16, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = layer(maps)
        assert pack(layer)
        assert not operators(layer, maps) & PACKED_OPERATORS
        torch.testing.assert_close(layer(maps), expected)
