"""Back to plain nn.Conv2d: the same network for whoever tells a convolution by its class."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn

from lk_backbones import prepack_weights, reparameterize
from lk_backbones.layers import (
    ConvNorm,
    DepthwiseConv2d,
    InputConvNorm,
    PackedConv2d,
    PointwiseConv2d,
    ReparamLargeKernelConv2d,
    replace_depthwise,
    restore_conv2d,
)
from lk_backbones.layers.packed import pack
from tests.conftest import assert_golden, randomize_norms


def network(act_layer: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        InputConvNorm(3, 8, 3, stride=2, act_layer=act_layer),
        ConvNorm(8, 8, 3, groups=8, act_layer=act_layer),
        ConvNorm(8, 16, 1, act_layer=act_layer),
        ReparamLargeKernelConv2d(16, 13),
    ]
    return randomize_norms(nn.Sequential(*layers)).eval()


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.GELU, nn.SiLU])
@pytest.mark.parametrize(
    "prepare", [lambda model: model, reparameterize, prepack_weights], ids=["", "folded", "packed"]
)
def test_only_plain_convolutions_are_left(prepare, act_layer) -> None:
    model = prepare(network(act_layer))
    x = torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        before = model(x)
    state, parameters = model.state_dict(keep_vars=True), list(model.parameters())
    assert not all(type(conv) is nn.Conv2d for conv in convolutions(model))

    assert restore_conv2d(model) is model
    assert convolutions(model)
    assert all(type(conv) is nn.Conv2d for conv in convolutions(model))
    assert not any(hasattr(conv, "act") or hasattr(conv, "_packed") for conv in convolutions(model))
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(tensor is state[name] for name, tensor in after.items())  # what an optimiser holds
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with torch.no_grad():
        assert_golden(model(x), before, 1e-6)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restore_conv2d(model)):
            assert_golden(copied(x), before, 1e-6)
    assert sum(isinstance(module, act_layer) for module in model.modules()) == 3


def test_inverse_of_replace_depthwise() -> None:
    model = timm.create_model("convnext_atto").train()
    classes = [type(module) for module in model.modules()]
    replace_depthwise(model)
    assert [type(module) for module in model.modules()] != classes
    restore_conv2d(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(module.training for module in model.modules())


def test_hooks_flags_and_dtype_stay() -> None:
    conv = DepthwiseConv2d(8, 8, 7, padding=3, groups=8, dtype=torch.float64).eval()
    conv.weight.requires_grad_(False)
    seen = []
    conv.register_forward_hook(lambda module, args, output: seen.append(output))
    assert restore_conv2d(conv) is conv
    assert type(conv) is nn.Conv2d
    output = conv(torch.randn(1, 8, 9, 9, dtype=torch.float64))
    assert seen[0] is output
    assert output.dtype == torch.float64
    assert not conv.training
    assert not conv.weight.requires_grad
    assert conv.bias.requires_grad


def test_packed_again_afterwards() -> None:
    model, x = network(), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x)
        again = prepack_weights(restore_conv2d(prepack_weights(model)))
        assert any(isinstance(module, PackedConv2d) for module in again.modules())
        assert_golden(again(x), expected, 1e-6)


def test_a_packed_layer_with_an_activation_of_its_own_becomes_two_modules() -> None:
    torch.manual_seed(0)
    layer = PackedConv2d(8, 8, 3, padding=1, act=nn.GELU())
    model = nn.Sequential(layer, layer).eval()  # one layer in two places
    x = torch.randn(1, 8, 9, 9).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        assert restore_conv2d(model) is model
        torch.testing.assert_close(model(x), expected)
    assert model[0] is model[1]
    assert [type(module) for module in model[0]] == [nn.Conv2d, nn.GELU]
    assert model[0][0] is layer
    assert not model[0].training

    alone = PackedConv2d(8, 8, 3, padding=1, act=nn.GELU())
    restored = restore_conv2d(alone)
    assert [type(module) for module in restored] == [nn.Conv2d, nn.GELU]
    plain = PackedConv2d(8, 8, 3)
    assert restore_conv2d(plain) is plain
    assert type(plain) is nn.Conv2d


def test_others_are_left_alone() -> None:
    class Own(PointwiseConv2d):
        def forward(self, input):
            return super().forward(input) + 1

    model = nn.Sequential(Own(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 4), PointwiseConv2d(4, 4, 1))
    assert pack(model[3])
    assert [type(module) for module in restore_conv2d(model)] == [Own, nn.Conv2d, nn.Linear, nn.Conv2d]
