"""SLaK against tensors that the reference implementation computed, and against every published key."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

import lk_backbones
from lk_backbones.encoders._loading import fitting_encoders
from lk_backbones.encoders._names import translate
from lk_backbones.encoders.slak import SLaK, SLaKBlock, SLaKDownsample, checkpoint_arguments, checkpoint_filter_fn
from tests.conftest import assert_golden, load_golden, load_manifest, randomize_norms

GOLDENS: dict[str, dict[str, Any]] = {
    "tiny": {"channels": (8, 16, 32, 64)},
    "tiny_nodecom": {"channels": (8, 16, 32, 64), "strips": False},
    "tiny_eps": {"channels": (8, 12, 16, 24)},
}
# variant: published parameters in millions
PUBLISHED = {"tiny": 30, "small": 55, "base": 95}


def build(name: str, **kwargs: Any) -> SLaK:
    return SLaK(**(GOLDENS[name] | {"depths": (1, 1, 2, 1), "num_classes": 10} | kwargs)).eval()


def load(model: SLaK, state_dict: dict[str, torch.Tensor]) -> SLaK:
    model.load_state_dict(translate(state_dict, model, model), strict=True)
    return model


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", GOLDENS)
def test_same_numbers_as_the_reference(name: str, folded: bool) -> None:
    golden = load_golden(f"slak_{name}")
    model = load(build(name), golden["state"])
    if folded:
        model = reparameterize_model(model)
        kinds = {type(module).__name__ for module in model.modules()}
        assert not kinds & {"BatchNorm2d", "LayerScale2d"}
    image = golden["input"][""]
    assert_golden(model(image), golden["output"]["logits"])
    if folded and name == "tiny_nodecom":  # which the reference can fold too
        assert_golden(model(image), golden["output"]["logits_reparam"])
    for level, feature in enumerate(model.forward_intermediates(image, intermediates_only=True)):
        assert_golden(feature, golden["output"][f"stage_features.{level}"])


@pytest.mark.parametrize("folded", [False, True])
def test_returned_maps_are_normalised_as_in_dense_tasks(folded: bool) -> None:
    golden = load_golden("slak_tiny")
    state = {key: value for key, value in golden["state"].items() if not key.startswith(("norm.", "head."))}
    model = build("tiny", norm_features=True, num_classes=0)
    renamed = checkpoint_filter_fn(state | golden["backbone_state"], model)
    assert checkpoint_arguments(renamed) == {"norm_features": True}
    report = model.load_state_dict(renamed, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) == {"head.norm.weight", "head.norm.bias"}  # absent from backbones
    if folded:
        model = reparameterize_model(model)
    for level, feature in enumerate(model.forward_intermediates(golden["input"][""], intermediates_only=True)):
        assert_golden(feature, golden["output"][f"backbone_features.{level}"])


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_wrapped_checkpoints_load(wrapper: str) -> None:
    golden = load_golden("slak_tiny")
    state = golden["state"]
    if wrapper == "state_dict":  # OpenMMLab's
        state = {f"backbone.{k}" if not k.startswith("head.") else k: v for k, v in state.items()}
    model = load(build("tiny"), {wrapper: state})
    assert_golden(model(golden["input"][""]), golden["output"]["logits"])


@pytest.mark.parametrize("name", ["tiny", "tiny_nodecom"])
def test_the_order_of_the_keys_does_not_matter(name: str) -> None:
    golden = load_golden(f"slak_{name}")
    model = load(build(name), dict(reversed(golden["state"].items())))
    assert_golden(model(golden["input"][""]), golden["output"]["logits"])


def test_own_checkpoints_pass_through_unchanged() -> None:
    for model in (build("tiny"), reparameterize_model(build("tiny"))):
        state = model.state_dict()
        assert checkpoint_filter_fn(state, model) is state


def test_unknown_keys_reach_the_strict_load() -> None:
    model = build("tiny")
    state = load_golden("slak_tiny")["state"] | {"stages.0.0.typo.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"stages\.0\.blocks\.0\.typo\.weight"):
        model.load_state_dict(checkpoint_filter_fn(state, model))


def test_strips_fold_into_strips_and_short_ones_into_a_square() -> None:
    model = randomize_norms(build("tiny"))
    folded = lk_backbones.reparameterize(model)
    kernels = [[branch.conv.kernel_size for branch in stage.blocks[0].dwconv.branches] for stage in folded.stages]
    assert kernels == [[(k, 5), (5, k)] for k in (51, 49, 47)] + [[(13, 13)]]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    again = lk_backbones.reparameterize(folded)
    x = torch.rand(1, 3, 64, 64)
    assert_golden(folded(x), model(x), 1e-5)
    assert torch.equal(again(x), folded(x))


@pytest.mark.parametrize(("height", "width"), [(97, 65), (32, 161), (250, 34)])
@pytest.mark.parametrize("folded", [False, True])
def test_odd_maps_and_kernels_larger_than_they(
    height: int, width: int, folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomize_norms(build("tiny"))
    x = torch.rand(1, 3, height, width)
    with torch.no_grad():
        maps = (lk_backbones.reparameterize(model) if folded else model).forward_intermediates(
            x, intermediates_only=True
        )
        monkeypatch.setenv("LK_BACKBONES_DEPTHWISE", "native")  # PyTorch's own convolutions
        exact = model.double().forward_intermediates(x.double(), intermediates_only=True)
    for level, (feature, expected) in enumerate(zip(maps, exact, strict=True)):
        assert feature.shape[2:] == (height // 2 ** (level + 2), width // 2 ** (level + 2))
        assert_golden(feature.double(), expected, 1e-5)


def test_dilation_does_not_shift_the_map() -> None:
    strided = randomize_norms(build("tiny")).double()
    dense = build("tiny", output_stride=8).double()
    dense.load_state_dict(strided.state_dict())
    assert [type(m.pad) for m in dense.modules() if isinstance(m, SLaKDownsample)] == [
        nn.Identity,
        nn.ZeroPad2d,
        nn.ZeroPad2d,
    ]
    x = torch.rand(1, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(dense.forward_features(x)[..., ::4, ::4], strided.forward_features(x))


@pytest.mark.parametrize(
    ("kwargs", "kernels"),
    [
        ({"kernel_sizes": 7, "small_kernel": 100 + 1, "strips": False}, [(7, 7)]),  # as the reference makes a ConvNeXt
        ({"kernel_sizes": 5}, [(5, 5)]),
        ({"kernel_sizes": 31, "small_kernel": None, "strips": False}, [(31, 31)]),
        ({"kernel_sizes": 31, "strips": False}, [(31, 31), (5, 5)]),
        ({"kernel_sizes": 61, "small_kernel": 3}, [(61, 3), (3, 61), (3, 3)]),
    ],
)
def test_other_kernels(kwargs: dict[str, Any], kernels: list[tuple[int, int]]) -> None:
    model = randomize_norms(build("tiny", **kwargs))
    blocks = [module for module in model.modules() if isinstance(module, SLaKBlock)]
    assert all([branch.conv.kernel_size for branch in block.dwconv.branches] == kernels for block in blocks)
    x = torch.rand(1, 3, 64, 64)
    assert_golden(lk_backbones.reparameterize(model)(x), model(x), 1e-5)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_every_published_key_is_accounted_for(variant: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"slak_{variant}", num_classes=1000, norm_features=True)
    maps = {name for name in model.state_dict() if name.startswith("feature_norms.")}
    classifier = {name for name in model.state_dict() if name.startswith("head.")}
    assert (len(maps), len(classifier)) == (8, 4)
    for naming, missing in (("", maps), ("_backbone", classifier)):
        manifest = load_manifest(f"slak_{variant}{naming}")
        state = {key: torch.empty(shape, device="meta") for key, shape in manifest["state_dict"].items()}
        mapped = checkpoint_filter_fn(state, model)
        assert {key: value.shape for key, value in mapped.items()} == {
            key: value.shape for key, value in model.state_dict().items() if key not in missing
        }
        assert len(mapped) == len(state)
        assert checkpoint_arguments(mapped) == ({"norm_features": True} if naming else {})
        own = {name: parameter for name, parameter in model.named_parameters() if name not in missing}
        assert sum(parameter.numel() for parameter in own.values()) == manifest["param_count"]


@pytest.mark.parametrize("variant", PUBLISHED)
def test_non_zero_parameters_are_those_published(variant: str) -> None:
    manifest = load_manifest(f"slak_{variant}")
    assert 0.6 * manifest["param_count"] / 1e6 == pytest.approx(PUBLISHED[variant], abs=0.5)


@pytest.mark.parametrize("kwargs", [{"kernel_sizes": (31, 29, 27, 13)}, {"strips": False}, {}])
def test_the_family_says_which_kernels_a_checkpoint_has(kwargs: dict[str, Any]) -> None:
    assert checkpoint_arguments(build("tiny", **kwargs).state_dict()) == kwargs
    assert checkpoint_arguments(lk_backbones.reparameterize(build("tiny", **kwargs)).state_dict()) == kwargs


def test_drop_path_grows_linearly_over_blocks() -> None:
    model = build("tiny", drop_path_rate=0.8)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ({"kernel_sizes": (51, 49, 46, 13)}, "kernel_sizes must be positive and odd, got 46"),
        ({"kernel_sizes": -3}, "kernel_sizes must be positive and odd, got -3"),
        ({"kernel_sizes": 0}, "kernel_sizes must be positive and odd, got 0"),
        ({"small_kernel": 4}, "small_kernel must be positive and odd, got 4"),
        ({"small_kernel": None}, "strips need a width, small_kernel: .* strips=False"),
        ({"kernel_sizes": (51, 49, 47)}, r"same four stages.*kernel_sizes=\(51, 49, 47\)"),
        ({"channels": (8, 16, 32)}, r"same four stages.*channels=\(8, 16, 32\)"),
        ({"depths": (1, 1, 2)}, r"same four stages.*depths=\(1, 1, 2\)"),
        ({"width_factor": 0.1}, r"channels=\(8, 16, 32, 64\) times width_factor=0.1 makes .* \(0, 1, 3, 6\) channels"),
        ({"width_factor": -1}, "width_factor=-1 makes"),
        ({"width_factor": 0}, "each needs one at least"),
    ],
)
def test_nonsense_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("tiny", **kwargs)


def test_a_deeper_siblings_weights_are_known_by_its_name() -> None:
    manifest = load_manifest("slak_small")  # all tensors of the tiny one are among those of the small one
    state = {key: torch.empty(shape, device="meta") for key, shape in manifest["state_dict"].items()}
    assert fitting_encoders(state) == ["slak_small"]
