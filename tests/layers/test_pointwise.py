"""The 1x1 layer as a drop-in for nn.Conv2d."""

import copy
import io

import pytest
import torch
import torch.nn as nn

from lk_backbones.layers import ConvNorm, InputConvNorm, PackedPointwiseConv2d, PointwiseConv2d

MAPS = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"stride": 2}, {"padding": 1}, {"padding": "same"}, {"groups": 2}],
    ids=str,
)
def test_same_as_conv2d(options):
    torch.manual_seed(0)
    ours, theirs = PointwiseConv2d(8, 6, 1, **options), nn.Conv2d(8, 6, 1, **options)
    theirs.load_state_dict(ours.state_dict())
    maps = torch.randn(2, 8, 5, 7)
    for input in (maps, maps.to(memory_format=torch.channels_last), maps[0]):
        torch.testing.assert_close(ours(input), theirs(input), rtol=1e-5, atol=1e-6)


def test_refuses_wider_kernels():
    with pytest.raises(ValueError, match=r"needs kernel_size=1, got \(3, 3\)"):
        PointwiseConv2d(8, 8, 3)


def test_script_holds_plain_convolutions():
    layer = nn.Sequential(InputConvNorm(3, 8, 3, stride=2, act_layer=nn.ReLU), ConvNorm(8, 4, 1)).eval()
    assert isinstance(layer[1].conv, PointwiseConv2d)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), buffer)
    buffer.seek(0)
    maps = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(torch.jit.load(buffer)(maps), layer(maps), rtol=1e-5, atol=1e-6)


def packed_layer(act: nn.Module | None = None) -> tuple[PackedPointwiseConv2d, nn.Module]:
    """A packed layer, used once, and what it stands for."""
    torch.manual_seed(0)
    act = nn.Identity() if act is None else act
    plain = nn.Sequential(nn.Conv2d(8, 6, 1), act)
    layer = PointwiseConv2d(8, 6, 1)
    layer.load_state_dict(plain[0].state_dict())
    layer = PackedPointwiseConv2d.from_layer(layer, act)
    with torch.no_grad():
        layer(MAPS)
    return layer, plain


def operators(layer: nn.Module, maps: torch.Tensor) -> set[str]:
    with torch.profiler.profile() as profiler, torch.no_grad():
        layer(maps)
    return {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("act", [nn.Identity(), nn.ReLU(inplace=True), nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=str)
def test_packed_layer_is_its_parts(act):
    layer, plain = packed_layer(act)
    fused = PackedPointwiseConv2d.fuses(act)
    assert fused == (not isinstance(act, nn.SiLU))
    assert ("mkldnn::_linear_pointwise" in operators(layer, MAPS)) == (fused and torch.backends.mkldnn.is_available())
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


def test_hooks_on_the_activation_are_still_called():
    layer, _ = packed_layer(nn.ReLU())
    seen = []
    layer.act.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        output = layer(MAPS)
    assert seen[0] is output


def test_weights_made_in_inference_mode_are_not_packed():
    with torch.inference_mode():  # where PyTorch does not count a tensor's changes
        layer = PackedPointwiseConv2d.from_layer(PointwiseConv2d(8, 6, 1), nn.Identity())
        before = layer(MAPS)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(MAPS), 2 * before)
