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
