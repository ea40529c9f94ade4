"""RepLKNet against tensors that the reference implementation computed, and against every published key."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model

from lk_backbones.encoders._names import translate
from lk_backbones.encoders.replknet import RepLKNet, checkpoint_filter_fn
from tests.conftest import assert_golden, load_golden, load_manifest

TINY = {"depths": (1, 1, 2, 1), "channels": (8, 16, 32, 64)}
XL_TINY = {"kernel_sizes": (27, 27, 27, 13), "small_kernel": None, "dw_ratio": 1.5, "norm_features": True}


def load(model: RepLKNet, state_dict: dict[str, torch.Tensor]) -> RepLKNet:
    model.load_state_dict(translate(state_dict, model, model), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, torch.Tensor]]:
    return load_golden("replknet_tiny")


@pytest.mark.parametrize("folded", [False, True])
def test_same_numbers_as_the_reference(golden: dict, folded: bool) -> None:
    model = load(RepLKNet(**TINY, num_classes=10), golden["state"])
    suffix = ""
    if folded:
        model, suffix = reparameterize_model(model), "_reparam"
        # Only the norm that the classifier pools stays: no convolution follows it.
        assert [n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)] == ["norm"]
    image = golden["input"][""]
    assert_golden(model(image), golden["output"][f"logits{suffix}"])
    for level, feature in enumerate(model.forward_intermediates(image, [1, 2, 3, 4], intermediates_only=True)):
        assert_golden(feature, golden["output"][f"features{suffix}.{level}"])


@pytest.mark.parametrize("folded", [False, True])
def test_xl_same_numbers_as_the_reference(folded: bool) -> None:
    golden = load_golden("replknet_xl_tiny")
    model = RepLKNet(**TINY, **XL_TINY, num_classes=0)
    report = model.load_state_dict(checkpoint_filter_fn(golden["state"], model), strict=False)
    assert not report.unexpected_keys
    assert {key.split(".")[0] for key in report.missing_keys} == {"norm"}  # the classifier's, absent from backbones
    model.eval()
    if folded:
        model = reparameterize_model(model)
    features = model.forward_intermediates(golden["input"][""], [1, 2, 3, 4], intermediates_only=True)
    for level, feature in enumerate(features):
        assert_golden(feature, golden["output"][f"features{'_reparam' if folded else ''}.{level}"])


def merged_state(golden: dict) -> dict[str, torch.Tensor]:
    branches = (".lkb_origin.", ".small_conv.")
    state = {key: value for key, value in golden["state"].items() if not any(b in key for b in branches)}
    return state | golden["merged_state"]


@pytest.mark.parametrize("folded_model", [False, True])
def test_merged_checkpoint_loads(golden: dict, folded_model: bool) -> None:
    model = RepLKNet(**TINY, num_classes=10)
    if folded_model:  # a model folded as far as the reference folds: only the large kernels
        for module in model.modules():
            if type(module).__name__ == "ReparamLargeKernelConv2d":
                module.reparameterize()
    model = load(model, merged_state(golden))
    assert_golden(model(golden["input"][""]), golden["output"]["logits_small_kernel_merged_ctor"])
    assert_golden(reparameterize_model(model)(golden["input"][""]), golden["output"]["logits_reparam"])


def test_folded_kernels_equal_the_reference_tap_by_tap(golden: dict) -> None:
    model = reparameterize_model(load(RepLKNet(**TINY, num_classes=10), golden["state"]))
    merged = golden["merged_state"]
    assert merged
    for key, expected in merged.items():
        assert_golden(model.get_parameter(key.replace("lkb_reparam", "large.conv")), expected, 1e-6)


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_wrapped_and_openmmlab_checkpoints_load(golden: dict, wrapper: str) -> None:
    # OpenMMLab's conversion calls the last norm stages.3.norm and the classifier head.fc.
    state = {}
    for key, value in golden["state"].items():
        if key.startswith("head."):
            key = key.replace("head.", "head.fc.")
        elif key.startswith("norm."):
            key = f"backbone.stages.3.{key}"
        else:
            key = f"backbone.{key}"
        state[key] = value
    model = load(RepLKNet(**TINY, num_classes=10), {wrapper: state})
    assert_golden(model(golden["input"][""]), golden["output"]["logits"])


def test_own_checkpoints_pass_through_unchanged() -> None:
    model = RepLKNet(**TINY, num_classes=10)
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model).keys() == state.keys()


def test_unknown_keys_reach_the_strict_load(golden: dict) -> None:
    model = RepLKNet(**TINY, num_classes=10)
    state = golden["state"] | {"stages.0.blocks.0.typo.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"stages\.0\.blocks\.0\.typo\.weight"):
        model.load_state_dict(checkpoint_filter_fn(state, model))


@pytest.mark.parametrize("name", ["replknet_31b", "replknet_31l", "replknet_xl"])
@pytest.mark.parametrize("variant", ["", "_merged", "_backbone"])
def test_every_published_key_is_accounted_for(name: str, variant: str) -> None:
    manifest = load_manifest(name + variant)
    state = {key: torch.empty(shape, device="meta") for key, shape in manifest["state_dict"].items()}
    norm_features = variant == "_backbone" and name == "replknet_xl"
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0 if variant == "_backbone" else 1000, norm_features=norm_features)
    mapped = checkpoint_filter_fn(state, model)
    report = model.load_state_dict(mapped, strict=False, assign=True)  # raises on a wrong shape
    assert not report.unexpected_keys
    assert {key.split(".")[0] for key in report.missing_keys} == ({"norm"} if variant == "_backbone" else set())
    published = {id(value) for value in state.values()}
    assert published <= {id(value) for value in mapped.values()}, "a published tensor was dropped"
    if not variant:
        assert sum(p.numel() for p in model.parameters()) == manifest["param_count"]


@pytest.mark.parametrize(
    ("name", "kernel_sizes"),
    [
        ("replknet_3b", (3, 3, 3, 3)),
        ("replknet_7b", (7, 7, 7, 7)),
        ("replknet_13b", (13, 13, 13, 13)),
        ("replknet_25b", (25, 25, 25, 13)),
        ("replknet_31b", (31, 29, 27, 13)),
    ],
)
def test_ablation_kernel_sizes(name: str, kernel_sizes: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    for stage, size in zip(model.stages, kernel_sizes, strict=True):
        for block in list(stage.blocks)[::2]:
            assert block.large_kernel.large.conv.kernel_size == (size, size)
            assert (block.large_kernel.small is None) == (size == 3)


def test_drop_path_grows_linearly_over_block_pairs() -> None:
    model = RepLKNet(**TINY, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ({"kernel_sizes": (31, 30, 27, 13)}, "kernel_size must be a positive odd number, got 30"),
        ({"kernel_sizes": (31, 29, 27)}, "same four stages"),
        ({"small_kernel": 4}, "small_kernel must be a positive odd number, got 4"),
    ],
)
def test_nonsense_is_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepLKNet(**(TINY | kwargs))
