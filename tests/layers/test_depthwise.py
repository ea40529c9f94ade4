"""The layer as a drop-in for nn.Conv2d, alone and inside other people's models."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn as nn

from lk_backbones.layers import DepthwiseConv2d, replace_depthwise

CONFIGURATIONS = [
    {"kernel_size": 7, "padding": 3},
    {"kernel_size": (51, 5), "padding": (25, 2), "bias": False},
    {"kernel_size": 7, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 7, "padding": 3, "stride": (1, 2)},
    {"kernel_size": 7, "padding": 2},
    {"kernel_size": 7, "padding": "valid"},
    {"kernel_size": 7},
    {"kernel_size": 6, "padding": "same"},
    {"kernel_size": 7, "padding": 3, "padding_mode": "reflect"},
    {"kernel_size": 7, "padding": 3, "dilation": (1, 2)},
]


def pair(**options):
    ours = DepthwiseConv2d(8, 8, groups=8, **options)
    theirs = nn.Conv2d(8, 8, groups=8, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_same_as_conv2d(options):
    torch.manual_seed(0)
    ours, theirs = pair(**options)
    for input in (torch.randn(2, 8, 15, 14), torch.randn(8, 15, 14)):
        torch.testing.assert_close(ours(input), theirs(input), rtol=1e-5, atol=1e-6)
    ours(input).square().sum().backward()
    theirs(input).square().sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 8, 7), "groups=1, in_channels=8, out_channels=8"),
        ((8, 16, 7, 1, 3, 1, 8), "groups=8, in_channels=8, out_channels=16"),
        ((8, 8, 7, 1, 3, 1, 4), "groups=4, in_channels=8, out_channels=8"),
    ],
)
def test_refuses_what_is_not_depthwise(arguments, message):
    with pytest.raises(ValueError, match=f"groups == in_channels == out_channels, got {message}"):
        DepthwiseConv2d(*arguments)


def test_changed_attributes_count():
    """Output strides are traded for dilation by changing convolutions in place."""
    ours, theirs = pair(kernel_size=3, padding=1, stride=2)
    for conv in (ours, theirs):
        conv.stride, conv.dilation, conv.padding = (1, 1), (4, 4), (4, 4)
    input = torch.randn(1, 8, 12, 12)
    torch.testing.assert_close(ours(input), theirs(input))


def test_script():
    module = nn.Sequential(DepthwiseConv2d(8, 8, 7, padding=3, groups=8), nn.ReLU())
    scripted = torch.jit.script(module)
    stored = io.BytesIO()
    torch.jit.save(scripted, stored)
    stored.seek(0)
    input = torch.randn(1, 8, 9, 9)
    for copied in (scripted, torch.jit.load(stored), torch.jit.freeze(torch.jit.script(module.eval()))):
        torch.testing.assert_close(copied(input), module(input))


@pytest.mark.parametrize("options", [{"kernel_size": 7, "padding": 3}, {"kernel_size": 3, "padding": 1, "stride": 2}])
def test_compile(options):
    module = DepthwiseConv2d(8, 8, groups=8, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 8, 10, 10)
    torch.testing.assert_close(compiled(input), module(input))
    compiled(input).square().sum().backward()
    grad, module.weight.grad = module.weight.grad, None
    module(input).square().sum().backward()
    torch.testing.assert_close(grad, module.weight.grad)


def test_symbolic_trace():
    module = nn.Sequential(DepthwiseConv2d(8, 8, 7, padding=3, groups=8), nn.ReLU())
    traced = torch.fx.symbolic_trace(module)
    assert [node.name for node in traced.graph.nodes if node.op == "call_function"] == ["depthwise_conv2d"]
    input = torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(traced(input), module(input))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(copied):
    module = DepthwiseConv2d(8, 8, 7, padding=3, groups=8)
    input = torch.randn(1, 8, 9, 9)
    assert torch.equal(copied(module)(input), module(input))


def test_export():
    module = DepthwiseConv2d(8, 8, 7, padding=3, groups=8).eval()
    program = torch.export.export(module, (torch.randn(1, 8, 9, 9),))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.conv2d.default"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_replace_in_timm_convnext(memory_format):
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=5).eval().to(memory_format=memory_format)
    input = torch.randn(1, 3, 64, 64).to(memory_format=memory_format)
    state, before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(input)
    before.sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    assert replace_depthwise(model) is model
    replaced = [name for name, module in model.named_modules() if isinstance(module, DepthwiseConv2d)]
    assert len(replaced) == sum(model.get_submodule(f"stages.{i}").blocks.__len__() for i in range(4))
    assert model.state_dict().keys() == state.keys()
    after = model(input)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    after.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4 * grads[name].abs().max().item())


def test_replace_leaves_the_rest_alone():
    class Own(nn.Conv2d):
        def forward(self, input):
            return super().forward(input) + 1

    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3, groups=4), Own(8, 8, 3, groups=8))
    assert [type(module) for module in replace_depthwise(model)] == [nn.Conv2d, nn.Conv2d, Own]
    calls = []
    conv = nn.Conv2d(4, 4, 7, groups=4, padding=3)
    conv.register_forward_hook(lambda *_: calls.append(1))
    assert type(replace_depthwise(conv)) is DepthwiseConv2d
    conv(torch.randn(1, 4, 9, 9))
    assert calls == [1]
