"""The timm surface, for every registered encoder: a new family is tested by being registered."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, GroupNorm, SqueezeExcite, get_act_layer
from timm.layers.grn import GlobalResponseNorm
from timm.optim import param_groups_layer_decay
from timm.utils.model import reparameterize_model

import lk_backbones
from lk_backbones.encoders._registry import register_encoder
from lk_backbones.encoders.pelk import PartialPeripheralConv2d
from tests.conftest import LEVELS, assert_golden, feature_strides, randomize_norms

FEW = (1, 1, 2, 1)  # blocks by stage, where more of them would be more of the same
ACTIVATIONS = (torch.nn.ReLU, torch.nn.GELU)


def test_listed_names_are_timm_models() -> None:
    assert lk_backbones.list_encoders("replknet_31?") == [
        "replknet_31b",
        "replknet_31l",
        "replknet_31n",
        "replknet_31t",
    ]
    assert set(lk_backbones.list_encoders()) <= set(timm.list_models())


def test_a_name_that_timm_owns_stays_timms() -> None:
    def resnet18(pretrained: bool = False) -> None:
        raise AssertionError("timm's own model was replaced")

    before = lk_backbones.list_encoders()
    register_encoder(resnet18)
    assert type(timm.create_model("resnet18")).__name__ == "ResNet"
    assert lk_backbones.list_encoders() == before


def test_import_prints_nothing() -> None:
    out = subprocess.run([sys.executable, "-c", "import lk_backbones"], capture_output=True, text=True, check=True)
    assert out.stdout == out.stderr == ""


def test_levels_are_those_that_the_net_has(any_encoder: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(any_encoder, features_only=True)
        maps = model(torch.empty(1, 3, 64, 96))
    assert model.feature_info.reduction() in LEVELS
    for feature, stride, channels in zip(
        maps, model.feature_info.reduction(), model.feature_info.channels(), strict=True
    ):
        assert feature.shape == (1, channels, 64 // stride, 96 // stride)


def test_pretrained_configurations_name_real_modules(any_encoder: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(any_encoder)
    tags = timm.list_models(f"{any_encoder}.*", pretrained=False, include_tags=True)
    assert tags
    for cfg in [model.pretrained_cfg] + [timm.get_pretrained_cfg(tag).to_dict() for tag in tags]:
        assert isinstance(model.get_submodule(cfg["first_conv"]), torch.nn.Conv2d)
        assert isinstance(model.get_submodule(cfg["classifier"]), torch.nn.Linear)
        assert cfg["license"]
        assert cfg["input_size"][1] // 32 == cfg["pool_size"][0]


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (32, 160)])
def test_features_only_equals_forward_intermediates(small_encoder: str, size: tuple[int, int]) -> None:
    model = randomize_norms(timm.create_model(small_encoder)).eval()
    extractor = timm.create_model(small_encoder, features_only=True).eval()
    state = model.state_dict()
    extractor.load_state_dict(
        {key: state[key if key in state else key.replace("_", ".", 1)] for key in extractor.state_dict()}
    )
    x = torch.randn(1, 3, *size)
    final, maps = model.forward_intermediates(x)
    for mine, timms in zip(maps, extractor(x), strict=True):
        torch.testing.assert_close(mine, timms, rtol=0, atol=1e-5)
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.forward_head(final), model(x), rtol=0, atol=1e-5)
    early = model.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, [maps[0], maps[2]], rtol=0, atol=1e-5)


def test_prune_keeps_the_chosen_levels(small_encoder: str) -> None:
    model = timm.create_model(small_encoder).eval()
    x = torch.randn(1, 3, 64, 64)
    kept = [1, len(model.feature_info) - 2]  # all stages but the last
    expected = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    assert model.prune_intermediate_layers(kept, prune_norm=True) == kept
    assert len(model.stages) == 3
    torch.testing.assert_close(model.forward_intermediates(x, indices=kept, intermediates_only=True), expected)
    torch.testing.assert_close(model(x), expected[-1])  # no norm, no pooling, no classifier left
    assert model.num_features == expected[-1].shape[1]
    model.prune_intermediate_layers([0])
    (finest,) = model.train().forward_intermediates(x, indices=[0], intermediates_only=True)
    finest.square().sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride_keeps_resolution(small_encoder: str, output_stride: int) -> None:
    model = timm.create_model(small_encoder, features_only=True, output_stride=output_stride).eval()
    assert model.feature_info.reduction() == [min(s, output_stride) for s in feature_strides(small_encoder)]
    for feature, stride in zip(model(torch.randn(1, 3, 64, 96)), model.feature_info.reduction(), strict=True):
        assert feature.shape[-2:] == (64 // stride, 96 // stride)


def test_dilation_computes_the_same_function_more_densely(small_encoder: str) -> None:
    # With stride 1 and dilated taps, every second pixel of the dense map is the strided map's.
    strided = randomize_norms(timm.create_model(small_encoder, features_only=True)).eval().double()
    dense = timm.create_model(small_encoder, features_only=True, output_stride=16).eval().double()
    dense.load_state_dict(strided.state_dict())
    for model in (strided, dense):  # without what sums over the whole map, of other pixels then
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, SqueezeExcite | GlobalResponseNorm):
                    setattr(parent, name, torch.nn.Identity())
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    torch.testing.assert_close(dense(x)[-1][..., ::2, ::2], strided(x)[-1])


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans_and_classifier(small_encoder: str, in_chans: int) -> None:
    model = timm.create_model(small_encoder, in_chans=in_chans, num_classes=7).eval()
    x = torch.randn(2, in_chans, 64, 64)
    assert model(x).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


def test_every_parameter_gets_a_gradient_also_when_checkpointing(small_encoder: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(small_encoder, num_classes=5).train()
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_layer_decay_falls_from_head_to_stem(small_encoder: str) -> None:
    model = timm.create_model(small_encoder, num_classes=5)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    parameters = dict(model.named_parameters())
    first, last = next(iter(parameters)), "head.fc.weight"
    assert scale[id(parameters[first])] == min(scale.values()) < scale[id(parameters[last])] == 1.0
    for name, parameter in parameters.items():
        assert decay[id(parameter)] == (0.05 if parameter.ndim > 1 else 0.0), name


def test_timm_folds_to_the_same_outputs(small_encoder: str) -> None:
    model = randomize_norms(timm.create_model(small_encoder)).eval()
    x = torch.randn(1, 3, 64, 96)
    assert_golden(reparameterize_model(model)(x), model(x), 1e-4)
    # in number: a kernel of shared weights has more of them once it is dense
    assert len(list(reparameterize_model(model).parameters())) < len(list(model.parameters()))


def test_packed_weights_give_the_same_outputs(small_encoder: str) -> None:
    model = randomize_norms(timm.create_model(small_encoder)).eval()
    packed = lk_backbones.prepack_weights(model)
    with torch.inference_mode():
        for size in ((64, 96), (96, 32)):
            for _ in range(3):  # from the third input of a size on, layers know how they compute it
                x = torch.randn(2, 3, *size)
                assert_golden(packed(x), model(x), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_odd_sizes_is_finite(small_encoder: str, dtype: torch.dtype) -> None:
    # On processors with AMX oneDNN reads memory that nobody wrote in a bfloat16 convolution of stride 2 on a map two
    # pixels wide: plain conv2d of torch 2.10 to 2.14 gives NaN if it held one. So images 32 pixels wide are left out.
    width = 64 if dtype == torch.bfloat16 else 32
    model = timm.create_model(small_encoder).eval().to(dtype)
    assert torch.isfinite(model(torch.randn(1, 3, 96, width).to(dtype))).all()


def test_script_trace_and_compile(small_encoder: str) -> None:
    model = timm.create_model(small_encoder, num_classes=5, depths=FEW).eval()  # compilers take their time
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for other in (torch.jit.script(model), torch.jit.trace(model, x)):
            torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_memory_format_is_decided_once(small_encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LK_BACKBONES_DEPTHWISE", "direct")  # Fourier transforms have a format of their own
    model = lk_backbones.reparameterize(timm.create_model(small_encoder))
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as profiler:
        maps = model.forward_intermediates(x, intermediates_only=True)
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in maps)
    copied = [event.input_shapes[0] for event in profiler.events() if event.name == "aten::clone"]
    parts = [module.split[0] for module in model.modules() if isinstance(module, PartialPeripheralConv2d)]
    # kernels are copied, and the part of a map that goes through one, but no whole maps
    assert [shape for shape in copied if shape[0] == len(x) and shape[1] not in parts] == [list(x.shape)]


@pytest.mark.parametrize("act_layer", ["silu", torch.nn.Hardswish])
def test_activations_are_those_asked_for(small_encoder: str, act_layer: str | type[torch.nn.Module]) -> None:
    default = timm.create_model(small_encoder, depths=FEW)
    model = timm.create_model(small_encoder, depths=FEW, act_layer=act_layer)
    acts = {name: type(module) for name, module in default.named_modules() if isinstance(module, ACTIVATIONS)}
    assert acts
    for name in acts:
        assert isinstance(model.get_submodule(name), get_act_layer(act_layer)), name
    assert default.state_dict().keys() == model.state_dict().keys()
    model.eval().load_state_dict(randomize_norms(default).state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert (model(x) - default.eval()(x)).abs().max() > 0.01 * model(x).abs().max()
    for prepare in (lk_backbones.reparameterize, lk_backbones.prepack_weights):
        with torch.no_grad():
            assert_golden(prepare(model)(x), model(x), 1e-4)


NORMS = [
    ("frozenbatchnorm2d", True),
    (torch.nn.SyncBatchNorm, True),
    (partial(torch.nn.BatchNorm2d, affine=False, eps=1e-3), True),
    (partial(torch.nn.BatchNorm2d, track_running_stats=False), False),
    (BatchNormAct2d, False),  # a batch norm and an activation
    ("layernorm", False),
    ("layernorm2d", False),
    ("groupnorm1", False),
    (partial(GroupNorm, num_groups=4), False),
]


@pytest.mark.parametrize(("norm_layer", "folds"), NORMS, ids=str)
def test_norms_are_those_asked_for_and_fold_or_stay(small_encoder: str, norm_layer: Any, folds: bool) -> None:
    default = timm.create_model(small_encoder, depths=FEW)
    model = timm.create_model(small_encoder, depths=FEW, norm_layer=norm_layer).eval()
    norms = [name for name, module in default.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    kind = type(model.get_submodule(norms[0]))
    assert {type(model.get_submodule(name)) for name in norms} == {kind}
    assert kind is not torch.nn.BatchNorm2d or isinstance(norm_layer, partial)
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.2)
        elif name.endswith(("bn.weight", "norm.weight", "running_var", "layer_scale.gamma")):
            tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for prepare in (reparameterize_model, lk_backbones.reparameterize, lk_backbones.prepack_weights):
            prepared = prepare(model)
            left = sum(isinstance(module, kind) for name, module in prepared.named_modules() if name in norms)
            # all stay, or only those that no convolution follows do
            assert left <= 1 + 4 if folds else left == len(norms)
            assert_golden(prepared(x), model(x), 1e-4)


@pytest.mark.parametrize("argument", ["act_layer", "norm_layer"])
@pytest.mark.parametrize("value", ["nonsense", "", 3])
def test_unknown_activations_and_norms_are_refused(small_encoder: str, argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be a class or timm's name of a.*, got {value!r}"):
        timm.create_model(small_encoder, **{argument: value})
