"""The memory-format decision as a module: once, for any stem, and one node for whoever draws a graph."""

from __future__ import annotations

import torch
import torch.nn as nn
from timm.layers import LayerNorm2d
from timm.models._features_fx import get_graph_node_names

import lk_backbones  # noqa: F401, registers the module with timm's tracer
from lk_backbones.layers import ConvNorm, InputConvNorm, PreferredMemoryFormat

IMAGE = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def stem() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(PreferredMemoryFormat(), nn.Conv2d(3, 8, 4, 4), LayerNorm2d(8)).eval()


def test_a_layer_norm_stem_in_channels_last() -> None:
    model = stem()
    with torch.no_grad():
        out = model(IMAGE)
        torch.testing.assert_close(out, model[2](model[1](IMAGE)), rtol=1e-5, atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert model[0](out) is out  # decided already
    assert not model[0].state_dict()
    assert model[0](IMAGE.to("meta")).is_contiguous()  # other devices keep theirs
    assert model[0](IMAGE[0]).is_contiguous()


def test_graphs_scripts_and_exports() -> None:
    model = stem()
    with torch.no_grad():
        expected = model(IMAGE)
        graph = torch.fx.symbolic_trace(model)
        calls = [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
        assert calls[0] == "to_preferred_memory_format"
        assert graph(IMAGE).is_contiguous(memory_format=torch.channels_last)
        for other in (
            graph,
            torch.jit.script(model),
            torch.jit.trace(model, IMAGE),
            torch.compile(model, fullgraph=True, backend="eager"),
            torch.export.export(model, (IMAGE,)).module(),
        ):
            torch.testing.assert_close(other(IMAGE), expected, rtol=1e-5, atol=1e-6)


def test_one_node_for_timms_tracer() -> None:
    train, evaluation = get_graph_node_names(stem())
    assert train == evaluation
    assert evaluation[1:3] == ["0", "1"]


def test_input_layer_adds_nothing_to_the_state_dict() -> None:
    layer = InputConvNorm(3, 8, 3, stride=2, act_layer=nn.ReLU)
    assert list(layer.state_dict()) == list(ConvNorm(3, 8, 3, stride=2, act_layer=nn.ReLU).state_dict())
    assert layer.eval()(IMAGE).is_contiguous(memory_format=torch.channels_last)
