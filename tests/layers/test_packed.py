"""Layers with packed weights: the same numbers, never from a weight that has changed, and no trace in what is saved."""

import copy
import io

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import GlobalResponseNormMlp, Mlp
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from lk_backbones import prepack_weights
from lk_backbones.layers import (
    ConvNorm,
    DepthwiseConv2d,
    PackedConv2d,
    PackedLinear,
    PointwiseConv2d,
    called_in_a_row,
    packed,
    restore_conv2d,
)
from lk_backbones.layers.packed import fuses, pack, unpack
from lk_backbones.ops import _cpu
from tests.conftest import assert_golden, randomize_norms

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
ACTS = [
    nn.Identity(),
    nn.ReLU(inplace=True),
    nn.GELU(),
    nn.GELU("tanh"),
    timm.layers.GELU(),
    timm.layers.GELUTanh(),
    nn.SiLU(),
]
PACKED_OPERATORS = {"mkldnn::_linear_pointwise", "mkldnn::_convolution_pointwise"}


def packed_layer(act: nn.Module | None = None, kind: str = "pointwise") -> tuple[PackedConv2d, nn.Module]:
    """A packed layer, in use, and what it stands for."""
    torch.manual_seed(0)
    act = nn.Identity() if act is None else act
    layer_type, options = LAYERS[kind]
    plain = nn.Sequential(nn.Conv2d(8, **options), act)
    layer = layer_type(8, **options)
    layer.load_state_dict(plain[0].state_dict())
    assert pack(layer, act)
    with torch.no_grad():
        for _ in range(3):
            layer(MAPS)
    return layer, plain


def operators(layer: nn.Module, maps: torch.Tensor) -> set[str]:
    with torch.profiler.profile() as profiler, torch.no_grad():
        layer(maps)
    return {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("act", ACTS, ids=str)
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


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_layer_is_its_parts(act: nn.Module, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6, bias=bias)
    plain = nn.Sequential(copy.deepcopy(layer), act)
    assert pack(layer, act)
    assert type(layer) is PackedLinear
    tokens = torch.randn(3, 5, 7, 8)
    packs = fuses(act) and torch.backends.mkldnn.is_available()
    assert bool(operators(layer, tokens) & PACKED_OPERATORS) == packs
    # ... a vector, none, strided ones, none of a batch
    for input in (tokens, tokens[0, 0], tokens[0, 0, 0], tokens.transpose(0, 2), tokens[..., ::1][:, ::2], tokens[:0]):
        with torch.no_grad():
            torch.testing.assert_close(layer(input), plain(input), rtol=1e-5, atol=1e-6)
    tokens, twin = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    layer(tokens).sum().backward()
    plain(twin).sum().backward()
    torch.testing.assert_close(tokens.grad, twin.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, plain[0].weight.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(tokens).dtype == torch.bfloat16


def test_packed_linear_layer_follows_its_weight_and_is_copied_without_the_packed_one() -> None:
    torch.manual_seed(0)
    layer = PackedLinear(8, 6, act=nn.GELU())
    plain = nn.Sequential(nn.Linear(8, 6), nn.GELU())
    plain[0].load_state_dict(layer.state_dict())
    tokens = torch.randn(3, 8)
    with torch.no_grad():
        layer(tokens)
        for linear in (layer, plain[0]):
            linear.weight.mul_(2)
        expected = plain(tokens)
        torch.testing.assert_close(layer(tokens), expected, rtol=1e-5, atol=1e-6)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)  # the file is ours
        others = [
            copy.deepcopy(layer),
            loaded,
            torch.jit.script(layer),
            torch.jit.trace(layer, tokens),
            torch.fx.symbolic_trace(nn.Sequential(layer)),
            torch.compile(layer, fullgraph=True, backend="aot_eager"),
            torch.export.export(layer, (tokens,)).module(),
            restore_conv2d(copy.deepcopy(layer)),
        ]
        for other in others:
            torch.testing.assert_close(other(tokens), expected, rtol=1e-5, atol=1e-6)
        assert list(loaded.state_dict()) == ["weight", "bias"]
        torch.testing.assert_close(layer.double()(tokens.double()), plain.double()(tokens.double()))


class Block(nn.Module):
    """A user's block around layers of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.conv_act = nn.ReLU()
        self.mlp = GlobalResponseNormMlp(8, 16)
        self.norm = nn.LayerNorm(8)
        self.other = Mlp(8, 16, act_layer=nn.SiLU)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_act(self.conv(x)).permute(0, 2, 3, 1)
        x = x + self.other(self.norm(x + self.mlp(x)))
        return self.head(x.mean((1, 2)))


def block() -> Block:
    torch.manual_seed(0)
    model = Block().eval()
    for name, parameter in model.named_parameters():
        if "grn" in name:
            nn.init.normal_(parameter)
    return model


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if not list(module.children())}


def test_every_plain_layer_inside_a_model_is_packed_and_restored() -> None:
    model = block()
    before = kinds(model)
    state = model.state_dict()
    with torch.inference_mode():
        expected = model(MAPS)
        packed = prepack_weights(model)
        torch.testing.assert_close(packed(MAPS), expected, rtol=1e-4, atol=1e-5)
        assert kinds(model) == before
        assert packed.state_dict().keys() == state.keys()
        layers = {name for name, module in packed.named_modules() if isinstance(module, PackedConv2d | PackedLinear)}
        assert layers == {"conv", "mlp.fc1", "mlp.fc2", "other.fc1", "other.fc2", "head"}
        assert type(packed.mlp.act) is nn.Identity  # computed along
        assert type(packed.other.act) is nn.SiLU
        for other in (copy.deepcopy(packed), prepack_weights(packed), torch.fx.symbolic_trace(packed)):
            torch.testing.assert_close(other(MAPS), expected, rtol=1e-4, atol=1e-5)
        restore_conv2d(packed)
        assert kinds(packed) == before
        torch.testing.assert_close(packed(MAPS), expected, rtol=1e-4, atol=1e-5)


def test_a_module_tells_what_it_calls_in_a_row() -> None:
    class Row(Block):
        pass

    with torch.inference_mode():
        expected = block()(MAPS)
        model = block()
        model.__class__ = Row
        assert type(prepack_weights(model).conv_act) is nn.ReLU
        assert called_in_a_row("conv", "conv_act")(Row) is Row
        packed = prepack_weights(model)
        assert type(packed.conv_act) is nn.Identity
        torch.testing.assert_close(packed(MAPS), expected, rtol=1e-4, atol=1e-5)
        assert type(restore_conv2d(packed).conv_act) is nn.ReLU

        class Derived(Row):  # its forward may differ
            pass

        model.__class__ = Derived
        assert type(prepack_weights(model).conv_act) is nn.ReLU


def test_hooks_see_what_they_saw() -> None:
    model = block()
    model.mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        expected = model(MAPS)
        packed = prepack_weights(model, inplace=True)
        torch.testing.assert_close(packed(MAPS), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(packed.mlp.fc1, PackedLinear)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)  # not the activation's output
    assert seen[0].min() < -0.5


def test_a_hook_between_the_layer_and_its_activation_is_still_called() -> None:
    model = nn.Sequential(ConvNorm(8, 8, 1, norm_layer=None, act_layer=nn.ReLU))
    seen: list[torch.Tensor] = []
    model[0].bn.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        prepack_weights(model, inplace=True)(MAPS)
    assert seen[0].min() < 0


def test_shared_weights_and_shared_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.first, self.second = Mlp(8, 16, 8), Mlp(8, 16, 8)
            self.second.fc1 = self.first.fc1  # the same module, once followed by another activation
            self.second.act = nn.ReLU()
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(self.embed(x))))

    torch.manual_seed(0)
    model, x = Tied().eval(), torch.arange(10)
    with torch.no_grad():
        expected = model(x)
        packed = prepack_weights(model)
        assert packed.head.weight is packed.embed.weight
        assert isinstance(packed.head, PackedLinear)
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)
        for other in (model, packed):
            other.embed.weight.mul_(0.5)
        torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-5)
        assert isinstance(restore_conv2d(packed).second.act, nn.ReLU)


def test_layers_that_are_more_than_their_class_says_are_left_alone() -> None:
    def patched(layer: nn.Module) -> nn.Module:
        plain = layer.forward
        layer.forward = lambda x: 2 * plain(x)
        return layer

    torch.manual_seed(0)
    pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
    with pytest.warns(FutureWarning):
        old_weight_norm = weight_norm(nn.Linear(8, 8))
    layers = [pruned, old_weight_norm, parametrizations.spectral_norm(nn.Linear(8, 8)), patched(nn.Linear(8, 8))]
    model, x = nn.Sequential(*layers, nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    before = [type(layer) for layer in model]
    with torch.no_grad():
        expected = model(x)
        prepack_weights(model, inplace=True)
        assert [type(layer) for layer in model] == [*before[:-1], PackedLinear]
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        pruned.weight_orig.mul_(2)
        old_weight_norm.weight_g.mul_(2)
        expected = nn.Sequential(*layers)(x)
        model[-1].weight.mul_(3)
        torch.testing.assert_close(
            model(x), nn.functional.linear(expected, model[-1].weight, model[-1].bias), rtol=1e-5, atol=1e-5
        )

    fused = nn.Sequential(ConvNorm(8, 8, 1, norm_layer=None, act_layer=nn.ReLU))
    patched(fused[0].conv)  # whose activation must stay outside
    with torch.no_grad():
        expected = fused(MAPS)
        torch.testing.assert_close(prepack_weights(fused, inplace=True)(MAPS), expected, rtol=1e-5, atol=1e-6)
    assert unpack(nn.Linear(8, 8)).state_dict() == {}


def test_a_timm_model_of_linear_layers() -> None:
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model("convnext_atto", num_classes=5)).eval()
    x = torch.randn(1, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        packed = prepack_weights(model)
        assert_golden(packed(x), model(x), 1e-4)
        acts = [module for module in packed.modules() if isinstance(module, nn.GELU | timm.layers.GELU)]
        assert sum(isinstance(module, PackedLinear) for module in packed.modules()) >= 1
        assert len(acts) == sum(
            isinstance(m, PackedLinear | PackedConv2d) and fuses(m.act) and m.act in acts for m in packed.modules()
        )


def linear_and_convolution() -> list[tuple[nn.Module, nn.Module, torch.Tensor]]:
    """Packed layers of each kind, used once, with their plain twins and an input."""
    torch.manual_seed(0)
    out = []
    for plain, input in ((nn.Linear(8, 6), torch.randn(5, 8)), (nn.Conv2d(8, 6, 3), MAPS), (nn.Conv2d(8, 6, 1), MAPS)):
        layer = copy.deepcopy(plain)
        assert pack(layer)
        with torch.no_grad():
            layer(input)
        out.append((layer, plain, input))
    return out


def test_a_weight_that_a_fused_optimizer_changed_is_packed_anew() -> None:
    for layer, plain, input in linear_and_convolution():
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
        layer(input).square().sum().backward()
        optimizer.step()
        assert not torch.equal(layer.weight, plain.weight)
        plain.load_state_dict(layer.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(layer(input), plain(input), rtol=1e-5, atol=1e-5)


def test_a_bias_trained_alone_gets_its_gradients() -> None:
    for layer, plain, input in linear_and_convolution():
        for module in (layer, plain):
            module.weight.requires_grad_(False)
            module(input).square().sum().backward()
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-4)
        with torch.no_grad(), forward_ad.dual_level():
            bias = {"bias": forward_ad.make_dual(torch.zeros(6), torch.ones(6))}
            output = forward_ad.unpack_dual(torch.func.functional_call(layer, bias, (input,)))
            torch.testing.assert_close(output.tangent, torch.ones_like(output.primal))


BIASES = {"strided": torch.arange(12.0)[::2], "one for all": torch.ones(1).expand(6)}


@pytest.mark.parametrize("bias", BIASES)
def test_a_bias_may_lie_in_memory_as_it_likes(bias: str) -> None:
    for layer, plain, input in linear_and_convolution():
        layer.bias = plain.bias = nn.Parameter(BIASES[bias])
        with torch.no_grad():
            torch.testing.assert_close(layer(input), plain(input), rtol=1e-5, atol=1e-5)


def test_packed_linear_layer_takes_every_input_that_a_linear_layer_takes() -> None:
    layer, plain, tokens = linear_and_convolution()[0]
    with torch.no_grad():
        expected = plain(tokens)

        def use() -> None:
            for _ in range(3):
                layer(tokens)

        for input in (tokens.to_sparse(), tokens.to_sparse_csr()):
            use()
            torch.testing.assert_close(layer(input), expected, rtol=1e-5, atol=1e-5)
        for layout in (torch.strided, torch.jagged):
            use()
            nested = torch.nested.nested_tensor([tokens[:2], tokens[2:]], layout=layout)
            torch.testing.assert_close(torch.cat(layer(nested).unbind()), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):  # although there is nothing to multiply
            layer(torch.zeros(0, 9))


needs_bfloat16 = pytest.mark.skipif(
    not _cpu.computes_bfloat16(), reason="this processor multiplies no bfloat16 numbers"
)


@needs_bfloat16
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", [*LAYERS, "linear"])
def test_bfloat16_is_packed_too(kind: str, autocast: bool) -> None:
    torch.manual_seed(0)
    layer_type, options = LAYERS.get(kind, (nn.Linear, {"out_features": 6}))
    layer, input = layer_type(8, **options), torch.randn(5, 8) if kind == "linear" else MAPS
    exact = copy.deepcopy(layer).bfloat16().double()
    assert pack(layer, nn.ReLU())
    if not autocast:
        layer, input = layer.bfloat16(), input.bfloat16()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(input)
        with torch.profiler.profile() as profiler:
            output = layer(input)
    operators = {event.name for event in profiler.events()}
    assert bool(operators & PACKED_OPERATORS) == (kind not in ("reflecting", "depthwise by name"))
    assert output.dtype == torch.bfloat16
    expected = exact(input.bfloat16().double()).relu()
    assert (output.double() - expected).norm() <= 2**-8 * expected.norm()


@needs_bfloat16
def test_autocast_and_float32_may_alternate() -> None:
    layer, plain = packed_layer()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(MAPS), plain(MAPS), rtol=1e-5, atol=1e-5)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(layer(MAPS), plain(MAPS), rtol=2e-2, atol=2e-2)
        layer.weight.mul_(2)
        plain[0].weight.mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(MAPS), plain(MAPS), rtol=2e-2, atol=2e-2)


@needs_bfloat16
def test_band_matrices_follow_the_width_of_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "has_amx", lambda: True)
    made: list[int] = []
    make = packed.pack_bands

    def count(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        made.append(shape[3])
        return make(weight, shape)

    monkeypatch.setattr(packed, "pack_bands", count)
    torch.manual_seed(0)
    layer = DepthwiseConv2d(64, 64, 29, padding=14, groups=64).bfloat16()
    exact = copy.deepcopy(layer).double()
    assert pack(layer, nn.ReLU())

    def check(width: int) -> None:
        maps = torch.randn(1, 64, 28, width).bfloat16().to(memory_format=torch.channels_last)
        expected = exact(maps.double()).relu()
        assert (layer(maps).double() - expected).norm() <= 2**-8 * expected.norm()

    with torch.no_grad():
        for width in (28, 28, 32, 28, 32):  # one call of another width is no reason to make them anew
            check(width)
        assert made == [28]
        check(32)
        assert made == [28, 32]
        for parameters in (layer, exact):
            parameters.weight.mul_(2)
        check(32)
        assert made == [28, 32, 32]
        check(32)
        assert made == [28, 32, 32]
        layer = copy.deepcopy(layer)  # without them
        check(32)
        assert made == [28, 32, 32, 32]
    assert list(layer.state_dict()) == ["weight", "bias"]


def replace(layer: nn.Conv2d, **attributes: object) -> None:
    for name, value in attributes.items():
        setattr(layer, name, value)


def scale_bias(layer: nn.Conv2d) -> None:
    layer.bias.data = 3 * layer.bias.data


def replace_activation(conv: nn.Conv2d, act: nn.Module) -> None:
    if hasattr(conv, "act"):
        conv.act = nn.ReLU()
    act.forward = torch.relu  # as the plain one's, which nobody looks at in the packed layer any more


# What a user may do between two calls, to the packed layer and to a convolution alike.
CHANGES = {
    "nothing": lambda conv, act: None,
    "weight": lambda conv, act: conv.weight.mul_(2),
    "weight through .data": lambda conv, act: setattr(conv.weight, "data", 2 * conv.weight.data),
    "another weight": lambda conv, act: replace(conv, weight=nn.Parameter(conv.weight * 2)),
    "bias": lambda conv, act: conv.bias.mul_(3),
    "bias through .data": lambda conv, act: scale_bias(conv),
    "another bias": lambda conv, act: replace(conv, bias=nn.Parameter(conv.bias * 3)),
    "no bias": lambda conv, act: replace(conv, bias=None),
    "pruned": lambda conv, act: prune.l1_unstructured(conv, "weight", 0.5),
    "parametrized": lambda conv, act: parametrizations.weight_norm(conv),
    "stride": lambda conv, act: replace(conv, stride=(2, 2)),
    "padding": lambda conv, act: replace(conv, padding=tuple(2 * size for size in conv.kernel_size)),
    "padding by name": lambda conv, act: replace(conv, padding="same", stride=(1, 1)),
    "another activation": lambda conv, act: replace_activation(conv, act),
    "approximation": lambda conv, act: replace(act, approximate="tanh"),
}


@pytest.mark.parametrize("kind", ["pointwise", "dense", "depthwise"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_call_is_decided_anew_where_something_changed(change: str, kind: str) -> None:
    layer, plain = packed_layer(nn.GELU(), kind)
    with torch.no_grad():
        CHANGES[change](layer, layer.act)
        CHANGES[change](plain[0], plain[1])
        for maps in (MAPS, MAPS, MAPS, MAPS[:, :, 1:], MAPS.contiguous(), MAPS[:1], MAPS, MAPS, MAPS):
            torch.testing.assert_close(layer(maps), plain(maps), rtol=1e-5, atol=1e-6)


def test_a_call_is_not_decided_anew_where_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[torch.dtype | None] = []
    decide = packed.packed_dtype
    monkeypatch.setattr(packed, "packed_dtype", lambda *tensors: (decided.append(decide(*tensors)), decided[-1])[1])
    layers = [packed_layer(nn.GELU(), kind)[0] for kind in ("pointwise", "dense", "depthwise")]
    layers.append(PackedLinear(8, 6))
    inputs = [MAPS, MAPS, MAPS, torch.randn(5, 8)]
    with torch.no_grad():
        for layer, input in zip(layers, inputs, strict=True):
            layer(input)
            expected = layer(input)
            decided.clear()
            for _ in range(3):
                assert torch.equal(layer(input.clone()), expected)
            assert decided == []
            layer(input[:-1])
            assert decided == [torch.float32]
            for _ in range(4):  # the first of a shape tells nothing about the next
                assert torch.equal(layer(input), expected)
            assert decided == [torch.float32] * 3


def test_surroundings_that_changed_count(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain = packed_layer(nn.GELU(), "depthwise")

    def used(maps: torch.Tensor = MAPS) -> nn.Module:
        """Return the layer with nothing left to decide."""
        with torch.no_grad():
            for _ in range(3):
                layer(maps)
        return layer

    assert "mkldnn::_convolution_pointwise" in operators(used(), MAPS)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not operators(layer, MAPS) & PACKED_OPERATORS
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(MAPS)
    assert counter.get_total_flops() == 2 * MAPS.numel() * 35
    maps = MAPS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(used()(maps).sum(), maps)
    (expected,) = torch.autograd.grad(plain(maps).sum(), maps)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        batched = torch.func.vmap(used())(MAPS[None])
        torch.testing.assert_close(batched[0], plain(MAPS), rtol=1e-5, atol=1e-6)
        used()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(MAPS, torch.ones_like(MAPS))
            tangent = forward_ad.unpack_dual(layer(dual)).tangent
            expected = forward_ad.unpack_dual(plain(dual)).tangent
            torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="input meta, weight cpu"):
            used()(MAPS.to("meta"))
        symbolic = torch.fx.symbolic_trace(used())
        assert "mkldnn" not in str(symbolic.graph)
        torch.testing.assert_close(symbolic(MAPS), plain(MAPS), rtol=1e-5, atol=1e-6)
        assert "mkldnn" not in str(torch.export.export(used(), (MAPS,)).graph)
        compiled = torch.compile(used(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(MAPS), layer(MAPS), rtol=1e-5, atol=1e-6)
        large = torch.randn(1, 8, 9, 9).to(memory_format=torch.channels_last)
        assert operators(used(large), large) & PACKED_OPERATORS
        monkeypatch.setenv("LK_BACKBONES_DEPTHWISE", "fft")
        assert not operators(layer, large) & PACKED_OPERATORS
