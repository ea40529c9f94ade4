"""Other libraries on our encoders, and on a timm model as a control: tracers, quantisers, counters, attribution.

What torch and torchvision bring runs always; the others where they are installed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from lk_backbones import prepack_weights, reparameterize
from lk_backbones.layers import PeripheralDepthwiseConv2d, restore_conv2d
from tests.conftest import SMALL_ENCODERS, assert_golden, randomize_norms

CONTROL = "convnext_atto"
FEW = (1, 1, 2, 1)  # blocks by stage: clients are asked about kinds of modules, of which more would be more of the same
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as trained": lambda model: model,
    "folded": reparameterize,
    "packed": prepack_weights,
    "restored": restore_conv2d,
    "folded, restored": lambda model: restore_conv2d(reparameterize(model)),
    "packed, restored": lambda model: restore_conv2d(prepack_weights(model)),
}
ANY_FORM = [(CONTROL, "as trained"), *((name, form) for name in SMALL_ENCODERS for form in FORMS)]


def shares_weights(name: str) -> bool:
    with torch.device("meta"):
        modules = timm.create_model(name).modules()
    return any(isinstance(module, PeripheralDepthwiseConv2d) for module in modules)


# For what asks whether a module's class is nn.Conv2d itself. Kernels that share weights are that once they are folded.
PLAIN = [
    (CONTROL, "as trained"),
    *((name, form) for name in SMALL_ENCODERS for form in FORMS if form.endswith(", restored")),
    *((name, "restored") for name in SMALL_ENCODERS if not shares_weights(name)),
]

any_form = pytest.mark.parametrize(("name", "form"), ANY_FORM)
plain = pytest.mark.parametrize(("name", "form"), PLAIN)


def create(name: str, form: str) -> nn.Module:
    torch.manual_seed(0)
    return FORMS[form](randomize_norms(timm.create_model(name, num_classes=10, depths=FEW)).eval())


def images() -> torch.Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def multiply_adds(model: nn.Module) -> int:
    """Of convolutions and linear layers, by their definition."""
    total = 0

    def count(module: nn.Module, args: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * math.prod(module.kernel_size) * module.in_channels // module.groups
        else:
            total += output.numel() * module.in_features

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(images())
    return total


@any_form
def test_symbolic_trace(name: str, form: str) -> None:
    model, x = create(name, form), images()
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        assert_golden(traced(x), model(x), 1e-5)
        assert_golden(traced(x[..., :32]), model(x[..., :32]), 1e-5)  # nothing of the example is fixed
    traced(x).sum().backward()
    assert all(parameter.grad is not None for parameter in traced.parameters())


@any_form
def test_torchvision_feature_extraction(name: str, form: str) -> None:
    model, x = create(name, form), images()
    train_nodes, eval_nodes = get_graph_node_names(model)
    assert train_nodes == eval_nodes
    extractor = create_feature_extractor(model, {"stages.0": "fine", "stages.3": "coarse"})
    kept = {}
    for level, key in ((0, "fine"), (3, "coarse")):
        model.get_submodule(f"stages.{level}").register_forward_hook(
            lambda module, args, output, key=key: kept.update({key: output})
        )
    with torch.no_grad():
        model(x)
        maps = extractor(x)
    assert list(maps) == ["fine", "coarse"]
    for key, value in maps.items():
        assert_golden(value, kept[key], 1e-5)


@pytest.mark.filterwarnings("ignore")
@any_form
def test_fx_quantisation(name: str, form: str) -> None:
    quantization = pytest.importorskip("torch.ao.quantization", reason="this torch has no quantisation of its own")
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    model, x = create(name, form), images()
    prepared = quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping("x86"), (x,))
    with torch.no_grad():
        assert_golden(prepared(x), model(x), 1e-5)
        if (name, form) not in PLAIN:
            return
        quantized = quantize_fx.convert_fx(prepared)
        assert_golden(quantized(x), model(x), 0.2)
    kinds = [type(module).__module__ for module in quantized.modules() if "Conv" in type(module).__name__]
    assert len(kinds) == convolutions(model)
    assert all("quantized" in kind for kind in kinds)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [CONTROL, *SMALL_ENCODERS])
def test_pt2e_quantisation(name: str) -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model, x = restore_conv2d(reparameterize(timm.create_model(name, depths=(1, 1, 1, 1)))), images()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
        prepared(x)
        quantized = pt2e.convert_pt2e(prepared)
        convs = [node for node in quantized.graph.nodes if "conv2d" in str(node.target)]
        assert len(convs) == convolutions(model)
        assert all("dequantize" in str(operand.target) for node in convs for operand in node.args[:2])
        assert_golden(quantized(x), model(x), 0.2)


@any_form
def test_torchs_flop_counter(name: str, form: str) -> None:
    model = create(name, form)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images())
    assert counter.get_total_flops() == 2 * multiply_adds(model)


@plain
def test_torchs_profiler(name: str, form: str) -> None:
    model = create(name, form)
    with torch.no_grad(), torch.profiler.profile(with_flops=True) as profiler:
        model(images())
    matrix = ("aten::conv2d", "aten::addmm", "aten::mm")
    flops = sum(event.flops for event in profiler.key_averages() if event.key in matrix)
    assert flops == 2 * multiply_adds(model)


@plain
def test_thop(name: str, form: str) -> None:
    thop = pytest.importorskip("thop", reason="thop is not installed")
    model = create(name, form)
    macs, _ = thop.profile(copy.deepcopy(model), (images(),), verbose=False)
    assert 1 <= macs / multiply_adds(model) < 1.05  # it counts norms too


@plain
@pytest.mark.parametrize("backend", ["pytorch", "aten"])
def test_ptflops(name: str, form: str, backend: str) -> None:
    ptflops = pytest.importorskip("ptflops", reason="ptflops is not installed")
    model = create(name, form)
    macs, _ = ptflops.get_model_complexity_info(
        copy.deepcopy(model), (3, 64, 64), as_strings=False, print_per_layer_stat=False, verbose=False, backend=backend
    )
    assert 1 <= macs / multiply_adds(model) < 1.05


@any_form
def test_fvcore(name: str, form: str) -> None:
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    model = create(name, form)
    with torch.no_grad():
        counts = fvcore.FlopCountAnalysis(model, images()).unsupported_ops_warnings(False).by_operator()
    assert counts["conv"] + counts["linear"] == multiply_adds(model)


@plain
def test_calflops(name: str, form: str) -> None:
    calflops = pytest.importorskip("calflops", reason="calflops is not installed")
    model = create(name, form)
    with contextlib.redirect_stdout(io.StringIO()):
        _, macs, _ = calflops.calculate_flops(
            model, input_shape=(1, 3, 64, 64), output_as_string=False, print_results=False, print_detailed=False
        )
    assert macs == multiply_adds(model)


@plain
def test_captum_lrp(name: str, form: str) -> None:
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    rules = pytest.importorskip("captum.attr._utils.lrp_rules")
    known = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Dropout)
    model = create(name, form).double()
    for module in model.modules():
        if not list(module.children()) and type(module) not in known:
            module.rule = rules.EpsilonRule()  # captum wants to be told about any other class, whoever wrote it
    relevance = captum.LRP(model).attribute(images().double().requires_grad_(), target=1)
    assert relevance.shape == (1, 3, 64, 64)
    assert relevance.abs().sum() > 0
