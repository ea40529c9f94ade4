"""PeLK against what the paper prints of it: there is no other implementation to compare it with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.utils.model import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lk_backbones
from lk_backbones.encoders.pelk import PeLK, PeLKBlock
from lk_backbones.layers import DepthwiseConv2d, KernelPositionEmbedding, PeripheralDepthwiseConv2d
from tests.conftest import assert_golden, randomize_norms

SPARSITY = 0.4  # of the published networks


def build(**kwargs: Any) -> PeLK:
    small: dict[str, Any] = {"depths": (2, 1, 1, 1), "channels": (8, 8, 16, 16), "kernel_sizes": (21, 13, 13, 9)}
    torch.manual_seed(0)
    model = PeLK(**(small | {"num_classes": 3, "layer_scale": 0.5} | kwargs))
    return randomize_norms(model).eval()


def on_meta(name: str, **kwargs: Any) -> PeLK:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def large_kernels(model: nn.Module) -> list[PeripheralDepthwiseConv2d]:
    return [module for module in model.modules() if isinstance(module, PeripheralDepthwiseConv2d)]


@pytest.mark.parametrize(
    ("name", "stored", "nonzero", "published"),
    [
        ("pelk_tiny", 48.74, 28.74, 29),
        ("pelk_small", 85.33, 50.67, 50),  # 0.2 beyond rounding, the one that the paper's numbers do not fit
        ("pelk_base", 150.22, 89.42, 89),
        ("pelk_base_101", 151.97, 89.68, 90),
    ],
)
def test_published_parameters_are_the_nonzero_free_weights(
    name: str, stored: float, nonzero: float, published: int
) -> None:
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(stored, abs=0.01)
    # What is merged for inference is not counted: the small kernels fit into the centres of the large ones, which share
    # with none, and the position embedding is a bias.
    for module in model.modules():
        if isinstance(module, PeLKBlock):
            del module.dwconv.conv.branches[1]
    for stage in model.stages:
        stage.position = None
    sparse = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    count = (sum(p.numel() for p in model.parameters()) - SPARSITY * sparse) / 1e6
    assert count == pytest.approx(nonzero, abs=0.01)
    assert count == pytest.approx(published, abs=0.5 if name != "pelk_small" else 0.7)


@pytest.mark.parametrize(
    ("name", "size", "published", "relative"),
    [
        ("pelk_tiny", 224, 5.6, 0.045),
        ("pelk_small", 224, 10.7, 0.025),
        ("pelk_base", 224, 18.3, 0.01),
        ("pelk_base", 384, 54.0, 0.001),
        ("pelk_base_101", 384, 68.3, 0.001),
    ],
)
def test_published_multiply_adds_are_those_of_dense_kernels_less_the_zeros(
    name: str, size: int, published: float, relative: float
) -> None:
    # Every tap of the dense kernels counts, so the layer is computed as here; T and S are 0.2 G below.
    model = lk_backbones.reparameterize(on_meta(name), inplace=True)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size))
    macs = (1 - SPARSITY) * counter.get_total_flops() / 2e9
    assert macs == pytest.approx(published, rel=relative)


@pytest.mark.parametrize("variant", ["n", "tiny", "small", "base"])
@pytest.mark.parametrize("large", [False, True])
def test_kernels_and_grids_are_the_published_ones(variant: str, large: bool) -> None:
    if variant == "n" and large:  # by arguments, as its docstring says
        model = on_meta("pelk_n", kernel_sizes=(101, 69, 67, 13), center_radius=3)
    else:
        model = on_meta(f"pelk_{variant}{'_101' * large}")
    sizes, cells = ((101, 69, 67, 13), (17, 15, 15, 9)) if large else ((51, 49, 47, 13), (13, 13, 13, 9))
    for stage, size, count, channels in zip(model.stages, sizes, cells, model.feature_info, strict=True):
        width = channels["num_chs"] * 3 // 8
        assert {conv.kernel_size for conv in large_kernels(stage)} == {(size, size)}
        assert {conv.weight.shape for conv in large_kernels(stage)} == {(width, 1, count, count)}
        assert len(large_kernels(stage)) == len(stage.blocks)
        assert stage.position.weight.shape == (width, size, size)
        assert {tuple(block.dwconv.conv.branches[1].conv.kernel_size) for block in stage.blocks} == {(5, 5)}


def test_nobody_published_weights() -> None:
    assert timm.list_pretrained("pelk*") == []
    tags = timm.list_models("pelk*", include_tags=True)
    assert len(tags) == 7
    assert all(tag.endswith(".untrained") for tag in tags)


def test_the_other_channels_pass_by() -> None:
    model, seen = build(), []
    conv = model.stages[1].blocks[0].dwconv
    conv.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model(torch.randn(2, 3, 64, 64))
    ((before, after),) = seen
    assert torch.equal(after[:, 3:], before[:, 3:])  # 3/8 of 8
    assert (after[:, :3] != before[:, :3]).all()


def test_all_channels_without_embedding_and_small_kernel_is_a_plain_large_kernel() -> None:
    model = build(partial_ratio=1, position_embedding=False, small_kernel=None, base=1, norm_layer=nn.Identity)
    x = torch.randn(1, 3, 64, 64)
    (conv,) = large_kernels(model.stages[1])
    assert conv.grid == [1] * 13
    plain = copy.deepcopy(model)
    for stage in plain.stages:
        for block in stage.blocks:
            weight = block.dwconv.conv.branches[0].conv.weight
            block.dwconv = nn.Conv2d(len(weight), len(weight), weight.shape[2:], padding="same", groups=len(weight))
            block.dwconv.weight, block.dwconv.bias = weight, None
            block.forward = lambda x, position, b=block: x + b.layer_scale(b.pw2(b.pw1(b.norm(b.dwconv(x)))))
    assert_golden(model(x), plain(x), 1e-5)


def test_an_embedding_belongs_to_a_stage_and_counts_once() -> None:
    model = build()
    names = [name for name, _ in model.named_parameters() if "position" in name]
    assert names == [f"stages.{i}.position.weight" for i in range(4)]
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.stages[0].position.weight.add_(1)
        changed = copied.stages[0](copied.stem(x))
        with_other = model.stages[0](model.stem(x))
    assert (changed - with_other).abs().max() > 1e-3  # both blocks read the copy's
    assert torch.equal(model(x), before)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for stage in model.stages[1:]:
        assert scale[id(stage.position.weight)] == scale[id(stage.downsample.conv.weight)]


def test_single_blocks_fold_before_their_stage() -> None:
    model = build()
    for stage in model.stages:
        nn.init.normal_(stage.position.weight)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        partly = copy.deepcopy(model)
        lk_backbones.reparameterize(partly.stages[0].blocks[1], inplace=True)
        assert len(large_kernels(partly)) == len(large_kernels(model)) - 1
        assert_golden(partly(x), expected, 1e-5)
        state = partly.state_dict()
        assert "stages.0.blocks.1.dwconv.conv.cell_weight" in state
        for fold in (reparameterize_model, lk_backbones.reparameterize):
            for start in (model, partly):
                folded = fold(start)
                assert_golden(folded(x), expected, 1e-5)
                assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d | KernelPositionEmbedding)]
                kernels = [m for m in folded.modules() if type(m) is DepthwiseConv2d]
                assert [m.kernel_size[0] for m in kernels] == [21, 21, 13, 13, 9]
                assert not [name for name in folded.state_dict() if "position" in name or "cell" in name]
        one_kept = copy.deepcopy(model)
        branch = one_kept.stages[0].blocks[0].dwconv.conv.branches[0]
        branch.bn = nn.GroupNorm(1, 3)  # folds not
        kept = lk_backbones.reparameterize(one_kept)
        assert isinstance(kept.stages[0].position, KernelPositionEmbedding)
        assert_golden(kept(x), one_kept(x), 1e-5)


def test_kernels_of_151_through_arguments() -> None:
    kwargs = {"kernel_sizes": (151, 89, 87, 13), "center_radius": (3, 3, 3, 2)}
    model = on_meta("pelk_tiny", **kwargs)
    assert large_kernels(model)[0].grid == [10, 32, 16, 8, 4, 2, *[1] * 7, 2, 4, 8, 16, 32, 10]
    assert large_kernels(model.stages[3])[0].weight.shape[2] == 9
    free = on_meta("pelk_tiny", **(kwargs | {"grid_size": (17, None, None, None)}))
    assert large_kernels(free)[0].grid[:2] == [42, 16]
    small = build(**kwargs, output_stride=8)
    assert small(torch.randn(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kernel_sizes": (50, 49, 47, 13)}, "kernel_sizes must be positive and odd, got 50"),
        ({"kernel_sizes": (51, 49, 47)}, "depths, channels and kernel_sizes must name the same four stages"),
        ({"kernel_sizes": 3}, "center_radius must be 0 to 1 for a kernel of 3"),
        ({"kernel_sizes": 3, "center_radius": 1}, "small_kernel must be odd and at most the large kernel's size 3"),
        ({"small_kernel": 4}, "small_kernel must be positive and odd, got 4"),
        ({"center_radius": (2, 2, 2, 7)}, "center_radius must be 0 to 6 for a kernel of 13, .* got 7"),
        ({"center_radius": (2, 2)}, r"center_radius must be one number, or one for each .* got \(2, 2\)"),
        ({"grid_size": 13}, "grid_size must be one of 7, 9 for a kernel of 13 .* got 13"),
        ({"grid_size": (13, 13, 13)}, "grid_size must be one number, or one for each"),
        ({"base": 0}, "base must be 1 at least, got 0"),
        ({"partial_ratio": 0}, "partial_ratio must be above 0 and at most 1, got 0"),
        ({"partial_ratio": 1.5}, "partial_ratio must be above 0 and at most 1, got 1.5"),
        ({"width_factor": 0.01}, r"width_factor=0.01 makes stages of \(0, "),
        ({"width_factor": 1 / 16}, "partial_ratio=0.375 of the 2 channels of stage 0 is less than one channel"),
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta("pelk_n", **kwargs)
