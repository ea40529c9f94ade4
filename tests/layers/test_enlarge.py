"""Large kernels in other people's networks: the same outputs at the start, one large kernel each in the end."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn as nn
import torchvision

import lk_backbones
from lk_backbones import enlarge_kernels, plan_enlargement, prepack_weights, reparameterize
from lk_backbones.layers import (
    DepthwiseConv2d,
    EnlargedConv2d,
    PackedConv2d,
    ReparamLargeKernelConv2d,
    peripheral_grid,
    replace_depthwise,
    restore_conv2d,
)
from lk_backbones.layers.enlarge import enlarged_parameters, original_name
from tests.conftest import assert_golden, randomize_norms

TIMM = {
    # network: how many convolutions are enlarged, and how many are left alone
    "convnext_atto": (12, 0),
    "inception_next_atto": (36, 0),
    "mobilenetv2_035": (13, 4),
    "mobilenetv3_small_050": (7, 4),
    "efficientnet_b0": (12, 4),
    "tf_efficientnet_lite0": (12, 4),
    "mobilenetv4_conv_small": (13, 2),
    "fastvit_t8": (10, 30),
}
TORCHVISION = {"convnext_tiny": (18, 0), "mobilenet_v2": (13, 4), "mobilenet_v3_small": (7, 4)}


def lively(model: nn.Module) -> nn.Module:
    """Parameters and statistics with which every layer shows in the output; as initialised many blocks hardly do."""
    torch.manual_seed(0)
    randomize_norms(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "layer_scale")):
            nn.init.uniform_(parameter, 0.5, 1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model.eval()


def create(name: str, **kwargs: Any) -> nn.Module:
    return lively(timm.create_model(name, num_classes=5, **kwargs))


def fill(model: nn.Module) -> nn.Module:
    """Give the large kernels values, as if they had been trained."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, EnlargedConv2d):
            module.large_weight.data.normal_(0, 0.1, generator=generator)
    return model


def enlarged_convs(model: nn.Module) -> list[EnlargedConv2d]:
    return [module for module in model.modules() if isinstance(module, EnlargedConv2d)]


BUILDERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    **{name: (lambda name=name: create(name), counts) for name, counts in TIMM.items()},
    **{
        f"torchvision {name}": (lambda name=name: lively(getattr(torchvision.models, name)(num_classes=5)), counts)
        for name, counts in TORCHVISION.items()
    },
}


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_outputs_are_the_same_at_the_start_and_after_folding(name: str) -> None:
    build, counts = BUILDERS[name]
    model, x = build(), torch.randn(1, 3, 64, 64)
    names = list(model.state_dict())
    before = model(x)
    plan = plan_enlargement(model, 11)
    assert (len(plan.enlarged), len(plan.left_alone)) == counts

    enlarged = enlarge_kernels(model, 11)
    assert enlarged_convs(model) == []
    assert len(enlarged_convs(enlarged)) == counts[0]
    assert_golden(enlarged(x), before, 2e-5)

    fill(enlarged)
    trained = enlarged(x)
    assert (trained - before).abs().max() > 0.01 * before.abs().max()  # or the comparison says nothing
    folded = reparameterize(enlarged)
    assert enlarged_convs(folded) == []
    assert_golden(folded(x), trained, 2e-4)
    if name != "fastvit_t8":  # which folds more than what is ours
        assert list(folded.state_dict()) == names
        for layer, (_, size) in plan.enlarged.items():
            assert folded.get_submodule(layer).weight.shape[2:] == size


def test_strips_stay_strips() -> None:
    with torch.device("meta"):
        model = timm.create_model("inception_next_atto")
    sizes = set(plan_enlargement(model, 31).enlarged.values())
    assert sizes == {((3, 3), (31, 31)), ((1, 9), (1, 31)), ((9, 1), (31, 1))}
    conv = nn.Conv2d(4, 4, (5, 9), padding=(2, 4), groups=4)
    assert plan_enlargement(conv, 13).enlarged == {"": ((5, 9), (5, 13))}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("regnetz_b16", "not depthwise: groups of 16 to 16 channels"),
        ("repvit_m0_9", "in a ConvNorm, which folds itself"),
        ("replknet_31n", "in a ConvNorm, which folds itself"),
        ("resnet18", "it has no convolutions with groups"),
    ],
)
def test_a_network_without_anything_to_enlarge(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = plan_enlargement(model, 33)
    assert plan.enlarged == {}
    assert reason in plan.left_alone.values() or not plan.left_alone
    with pytest.raises(ValueError, match=rf"nothing in this \w+ can be enlarged to 33: .*{reason}"):
        enlarge_kernels(model, 33)


class Own(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class Folding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.inner(input)

    def fuse(self) -> nn.Module:
        return self.inner[0]


def pruned() -> nn.Module:
    return torch.nn.utils.prune.l1_unstructured(nn.Conv2d(8, 8, 3, padding=1, groups=8), "weight", 0.5)


LEFT_ALONE = {
    "a stride of 2x1": lambda: nn.Conv2d(8, 8, 3, (2, 1), 1, groups=8),
    "not depthwise: groups of 2 to 2 channels": lambda: nn.Conv2d(8, 8, 3, 1, 1, groups=4),
    "not depthwise: groups of 1 to 2 channels": lambda: nn.Conv2d(8, 16, 3, 1, 1, groups=8),
    "an even kernel of 3x4": lambda: nn.Conv2d(8, 8, (3, 4), padding="same", groups=8),
    "a kernel of 1x1, which is a scale per channel": lambda: nn.Conv2d(8, 8, 1, groups=8),
    "padding (0, 0) around a kernel of 3x3": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "padding valid around a kernel of 3x3": lambda: nn.Conv2d(8, 8, 3, padding="valid", groups=8),
    "padding (1, 1) around a kernel of 3x3": lambda: nn.Conv2d(8, 8, 3, padding=1, dilation=2, groups=8),
    "padding (1, 1) in mode 'reflect' around a kernel of 3x3": (
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect")
    ),
    "a Own, whose forward may differ": lambda: Own(8, 8, 3, padding=1, groups=8),
    "a PackedConv2d, whose forward may differ": lambda: PackedConv2d(8, 8, 3, padding=1, groups=8),
    "a weight that is computed (pruned, perhaps, or normalised)": pruned,
    "enlarged before: fold it first": lambda: EnlargedConv2d(8, 8, 3, padding=1, groups=8, large_kernel_size=5),
    "in a Folding, which folds itself": Folding,
    "in a ReparamLargeKernelConv2d, which folds itself": lambda: ReparamLargeKernelConv2d(8, 3, None).large.conv,
    "a kernel of 9x1 already": lambda: nn.Conv2d(8, 8, (9, 1), padding=(4, 0), groups=8),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_what_is_left_alone_is_listed_with_its_reason(reason: str) -> None:
    layer = LEFT_ALONE[reason]()
    if "ReparamLarge" in reason:
        block = ReparamLargeKernelConv2d(8, 3, None)
        block.large = nn.Sequential(layer)
        layer = block
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=8), layer).eval()
    plan = plan_enlargement(model, 9)
    assert list(plan.left_alone.values()) == [reason]
    assert plan.enlarged == {"1": ((3, 3), (9, 9))}
    assert f"left alone, {reason}: {next(iter(plan.left_alone))}" in str(plan)
    assert "1 depthwise convolutions enlarged, 1 left alone\n  3x3 to 9x9: 1\n" in str(plan)
    x = torch.randn(1, 4, 14, 14)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(enlarge_kernels(model, 9, inplace=True)(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2, (1, 3)], ids=str)
@pytest.mark.parametrize("padding", ["same", None], ids=["same", "numbers"])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_of_the_sum_of_kernels(dilation: Any, padding: Any, bias: bool) -> None:
    """Against two convolutions of torch's own in float64, forward and backward, and the fold."""
    torch.manual_seed(0)
    steps = (dilation, dilation) if isinstance(dilation, int) else dilation
    around = padding or tuple(steps)
    small = nn.Conv2d(6, 6, 3, padding=around, dilation=dilation, groups=6, bias=bias).double()
    large = nn.Conv2d(6, 6, 9, padding="same", dilation=dilation, groups=6, bias=False).double()
    conv = enlarge_kernels(small, 9)
    assert conv.large_weight.dtype == torch.float64
    assert not conv.large_weight.any()
    conv.large_weight.data.copy_(large.weight)
    x = torch.randn(2, 6, 15, 14, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = conv(x), small(y) + large(y)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(out)
    out.backward(seed)
    expected.backward(seed)
    for own, theirs in ((x, y), (conv.weight, small.weight), (conv.large_weight, large.weight)):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    conv.reparameterize()
    assert type(conv) is DepthwiseConv2d
    assert (conv.bias is not None) == bias
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
    plain = restore_conv2d(conv)
    assert type(plain) is nn.Conv2d
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)
    assert set(dict(conv.named_parameters())) == {"weight", "bias"} - (set() if bias else {"bias"})


@pytest.mark.parametrize("kernel_size", [5, 9, 13, 31])
def test_peripheral_kernels_share_their_outer_weights(kernel_size: int) -> None:
    """The same as a dense kernel whose taps are equal within a cell; gradients are sums over cells."""
    torch.manual_seed(0)
    small = nn.Conv2d(4, 4, 3, padding=1, groups=4).double()
    conv = enlarge_kernels(small, kernel_size, peripheral=True)
    grid = peripheral_grid(kernel_size)
    assert conv.large_weight.shape == (4, 1, len(grid), len(grid))
    assert sum(conv.grid) == kernel_size
    conv.large_weight.data.normal_()
    cells = torch.repeat_interleave(torch.arange(len(grid)), torch.tensor(grid))
    dense = conv.large_weight.detach()[:, :, cells][..., cells].clone().requires_grad_()
    x = torch.randn(2, 4, 20, 21, dtype=torch.float64)
    out = conv(x)
    expected = small(x) + torch.nn.functional.conv2d(x, dense, padding="same", groups=4)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(out)
    out.backward(seed)
    expected.backward(seed)
    summed = torch.zeros_like(conv.large_weight)
    for i, row in enumerate(cells):
        for j, column in enumerate(cells):
            summed[:, :, row, column] += dense.grad[:, :, i, j]
    torch.testing.assert_close(conv.large_weight.grad, summed, rtol=1e-9, atol=1e-9)
    folded = reparameterize(conv)
    assert folded.kernel_size == (kernel_size, kernel_size)
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)


def test_peripheral_kernels_in_a_network() -> None:
    model, x = create("inception_next_atto"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        enlarged = enlarge_kernels(model, 31, peripheral=True)
        mixer = enlarged.stages[0].blocks[0].token_mixer
        shapes = [conv.large_weight.shape[2:] for conv in (mixer.dwconv_hw, mixer.dwconv_w, mixer.dwconv_h)]
        assert shapes == [(11, 11), (1, 31), (31, 1)]
        assert "grid=[7, 4, 2, 1, 1, 1, 1, 1, 2, 4, 7]" in repr(mixer.dwconv_hw)
        assert_golden(enlarged(x), before, 2e-5)
        trained = fill(enlarged)(x)
        assert_golden(reparameterize(enlarged)(x), trained, 2e-4)


def test_a_zero_kernel_learns() -> None:
    model = enlarge_kernels(create("convnext_atto"), 9)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for conv in enlarged_convs(model):
        gradient = conv.large_weight.grad
        assert gradient[..., 0, 0].abs().max() > 0 or gradient.abs().sum() > 0
        torch.testing.assert_close(gradient[..., 1:-1, 1:-1], conv.weight.grad)


def test_constructor_checks_what_it_is_given() -> None:
    conv = EnlargedConv2d(8, 8, 3, padding=1, groups=8, large_kernel_size=(9, 3))
    assert conv.large_weight.shape == (8, 1, 9, 3)
    assert "large_kernel_size=(9, 3)" in repr(conv)
    with pytest.raises(ValueError, match="large_kernel_size must be odd and at least the kernel_size 5x5, got 9x3"):
        EnlargedConv2d(8, 8, 5, padding=2, groups=8, large_kernel_size=(9, 3))
    with pytest.raises(ValueError, match=r"large_kernel_size must be odd .* got 8x8"):
        EnlargedConv2d(8, 8, 5, padding=2, groups=8, large_kernel_size=8)
    with pytest.raises(ValueError, match="needs a convolution that can be enlarged, got a stride of 2x2"):
        EnlargedConv2d(8, 8, 5, 2, 2, groups=8, large_kernel_size=9)


# ---- which convolutions ----


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("convnext_atto", {}),
        ("convnext_atto", {"features_only": True}),
        ("convnext_atto", {"features_only": True, "out_indices": (1, 3)}),
        ("mobilenetv2_035", {}),
        ("mobilenetv2_035", {"features_only": True}),
        ("mobilenetv3_small_050", {"features_only": True, "feature_cls": "getter"}),
        ("ghostnet_100", {}),
    ],
)
def test_stages_are_counted_as_timm_counts_levels(name: str, kwargs: dict[str, Any]) -> None:
    """A hook finds the resolution that a convolution works at: that of its level, but for the strided ones."""
    model = timm.create_model(name, **kwargs).eval()
    info = model.feature_info if isinstance(model.feature_info, list) else model.feature_info.info
    strides = [level["reduction"] for level in info]
    widths = {}
    for layer, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.register_forward_hook(
                lambda module, args, output, layer=layer: widths.__setitem__(layer, output.shape[3])
            )
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    found = 0
    for stage, stride in enumerate(strides):
        plan = plan_enlargement(model, 13, stages=stage)
        # what works at a level's resolution before its first map counts to the level before it only in ghost modules
        assert {widths[layer] for layer in plan.enlarged} <= {64 // stride, 128 // stride}
        assert plan.enlarged == plan_enlargement(model, 13, stages=[stage - len(strides)]).enlarged
        assert set(plan.left_alone.values()) <= {"in another stage", "a stride of 2x2"} or name == "ghostnet_100"
        found += len(plan.enlarged)
    assert found == len(plan_enlargement(model, 13).enlarged)


def test_a_size_for_each_stage() -> None:
    model = enlarge_kernels(timm.create_model("convnext_atto"), [31, 29, 27, 13])
    assert [model.stages[i].blocks[1].conv_dw.large_kernel_size[0] for i in range(4)] == [31, 29, 27, 13]
    model = enlarge_kernels(timm.create_model("convnext_atto"), [27, 13], stages=(2, 3))
    assert [isinstance(model.stages[i].blocks[0].conv_dw, EnlargedConv2d) for i in range(4)] == [False] * 2 + [True] * 2
    assert model.stages[3].blocks[0].conv_dw.large_kernel_size == (13, 13)


def test_inside_of_larger_models() -> None:
    """smp's models and a pair of networks: the stages of every timm model in them."""
    unet = smp.Unet("tu-convnext_atto", encoder_weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = unet(x)
        assert enlarge_kernels(unet, 13, stages=[2, 3], inplace=True) is unet
        assert_golden(unet(x), before, 2e-5)
    assert len(enlarged_convs(unet.encoder)) == 8
    pair = nn.ModuleDict({"a": timm.create_model("convnext_atto"), "b": timm.create_model("mobilenetv2_035")})
    plan = plan_enlargement(pair, 13, stages=0)
    assert {name.partition(".")[0] for name in plan.enlarged} == {"a", "b"}


def test_patterns() -> None:
    with torch.device("meta"):
        model = timm.create_model("convnext_atto")
    assert list(plan_enlargement(model, 13, pattern="stages.3.*").enlarged) == [
        f"stages.3.blocks.{i}.conv_dw" for i in range(2)
    ]
    plan = plan_enlargement(model, 13, pattern=["stages.3.*", "*.0.conv_dw"], stages=[2, 3])
    assert list(plan.enlarged) == [f"stages.{name}.conv_dw" for name in ("2.blocks.0", "3.blocks.0", "3.blocks.1")]
    assert set(plan.left_alone.values()) == {"in another stage", "of another name"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 12}, "kernel_size must be an odd number of at least 3, got 12"),
        ({"kernel_size": 1}, "kernel_size must be an odd number of at least 3, got 1"),
        ({"kernel_size": -13}, "kernel_size must be an odd number of at least 3, got -13"),
        ({"kernel_size": True}, "kernel_size must be an odd number of at least 3, got True"),
        ({"kernel_size": []}, "one for each of stages, got none"),
        ({"kernel_size": [13, 14]}, "got 14"),
        ({"kernel_size": [13, 11]}, r"one for each of the 4 stages \[0, 1, 2, 3\]"),
        ({"kernel_size": 13, "stages": 4}, r"stages=\[4\]: there is no stage 4, there are 0 to 3"),
        ({"kernel_size": 13, "stages": -5}, "there is no stage -5"),
        ({"kernel_size": 7}, r"nothing in this ConvNeXt .* to 7: 12 are left alone, a kernel of 7x7 already"),
        (
            {"kernel_size": 13, "pattern": "stages.3.block.*"},
            r"'stages.3.block.\*' matches no convolution .* nearest of 12 are 'stages\.3\.blocks\.[01]\.conv_dw'",
        ),
        (
            {"kernel_size": 13, "pattern": ["*conv_dw", "stage_1.*"]},
            r"pattern 'stage_1.\*' matches no convolution .* 'stages",
        ),
        ({"kernel_size": 13, "pattern": "*.0.conv_dw", "stages": []}, "in another stage"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("convnext_atto")
    with pytest.raises(ValueError, match=message):
        enlarge_kernels(model, **arguments, inplace=True)
    assert enlarged_convs(model) == []


def test_a_model_without_stages_says_so() -> None:
    with pytest.raises(ValueError, match=r"this MobileNetV2 does not tell its stages.*choose layers by pattern"):
        enlarge_kernels(torchvision.models.mobilenet_v2(), 13, stages=2)


# ---- as any module ----


def test_hooks_references_flags_and_format_stay() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8, dtype=torch.bfloat16).eval()
    conv.weight.requires_grad_(False)
    weight, seen = conv.weight, []
    conv.register_forward_hook(lambda *_: seen.append(1))
    model = nn.Sequential(conv, conv)
    assert enlarge_kernels(model, 9, inplace=True) is model
    assert model[0] is model[1] is conv
    assert conv.weight is weight
    assert not conv.training
    assert not conv.large_weight.requires_grad
    assert conv.large_weight.dtype == torch.bfloat16
    x = torch.randn(1, 8, 9, 9, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert seen == [1, 1]
    folded = reparameterize(model)
    assert not folded[0].weight.requires_grad
    assert folded[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: torch.compile(module, fullgraph=True, backend="aot_eager"),
        torch.jit.script,
        lambda module: torch.jit.trace(module, torch.randn(1, 8, 12, 12)),
        torch.fx.symbolic_trace,
        lambda module: torch.export.export(module, (torch.randn(1, 8, 12, 12),)).module(),
    ],
    ids=["deepcopy", "pickle", "compile", "script", "trace", "fx", "export"],
)
@pytest.mark.parametrize("peripheral", [False, True])
def test_copies_compilers_and_exporters(
    copied: Callable[[nn.Module], Callable[..., torch.Tensor]], peripheral: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), nn.GELU())
    model = fill(enlarge_kernels(model, 9, peripheral=peripheral)).eval()
    x = torch.randn(1, 8, 12, 12)
    expected = model(x)
    torch.testing.assert_close(copied(model)(x), expected)
    torch.testing.assert_close(copied(reparameterize(model))(x), expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_the_sum_is_rounded_once() -> None:
    model = fill(enlarge_kernels(nn.Conv2d(8, 8, 3, padding=1, groups=8), 9))
    x = torch.randn(1, 8, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x), rtol=2e-2, atol=2e-2)


def test_states_of_enlarged_and_plain_models() -> None:
    """What was there keeps its name: published weights fit, and the folded network is timm's with large kernels."""
    plain = create("convnext_atto")
    model = fill(enlarge_kernels(plain, 13))
    added = enlarged_parameters(model)
    assert model.state_dict().keys() - plain.state_dict().keys() == added.keys()
    assert set(added.values()) <= plain.state_dict().keys()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert (set(missing), unexpected) == (added.keys(), [])
    again = enlarge_kernels(create("convnext_atto"), 13)
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        native = timm.create_model("convnext_atto", num_classes=5, kernel_sizes=13).eval()
        native.load_state_dict(reparameterize(model).state_dict())
        assert_golden(native(x), model(x), 2e-5)


def test_names() -> None:
    assert original_name("stages.0.conv_dw.large_weight") == "stages.0.conv_dw.weight"
    assert original_name("large_weight") == "weight"
    assert original_name("stages.0.very_large_weight") == "stages.0.very_large_weight"
    assert enlarged_parameters(enlarge_kernels(nn.Conv2d(8, 8, 3, padding=1, groups=8), 5)) == {
        "large_weight": "weight"
    }


def test_packed_restored_and_enlarged_again() -> None:
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        model = fill(enlarge_kernels(create("mobilenetv3_small_050"), 9))
        expected = model(x)
        packed = prepack_weights(model)
        assert any(isinstance(module, PackedConv2d) for module in packed.modules())
        assert_golden(packed(x), expected, 2e-5)
        assert_golden(restore_conv2d(packed)(x), expected, 2e-5)
        again = enlarge_kernels(replace_depthwise(reparameterize(model)), 13)
        assert_golden(again(x), expected, 2e-5)
        assert all(conv.large_kernel_size == (13, 13) for conv in enlarged_convs(again))


def test_gradient_checkpointing_and_channels_last() -> None:
    model = fill(enlarge_kernels(create("convnext_atto"), 9)).to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 64, 64).to(memory_format=torch.channels_last)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([conv.large_weight.grad.clone() for conv in enlarged_convs(model)])
    for without, with_it in zip(*gradients, strict=True):
        torch.testing.assert_close(without, with_it)


def test_exported_from_the_package() -> None:
    assert lk_backbones.enlarge_kernels is lk_backbones.layers.enlarge_kernels
