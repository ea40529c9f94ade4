"""transformers' backbone API knows every registered encoder, through timm."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.conftest import feature_strides

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def four_levels(encoder: str) -> tuple[int, ...]:
    """Indices of the maps of stride 4 to 32."""
    return tuple(index for index, stride in enumerate(feature_strides(encoder)) if stride >= 4)


def test_backbone_of_four_levels(small_encoder: str) -> None:
    config = transformers.TimmBackboneConfig(
        backbone=small_encoder, out_indices=four_levels(small_encoder), use_pretrained_backbone=False
    )
    backbone = transformers.AutoBackbone.from_config(config).eval()
    x = torch.rand(1, 3, 64, 64)
    maps = backbone(x).feature_maps
    assert [64 // m.shape[-1] for m in maps] == [4, 8, 16, 32]
    assert [m.shape[1] for m in maps] == backbone.channels

    model = timm.create_model(small_encoder, features_only=True, out_indices=four_levels(small_encoder)).eval()
    model.load_state_dict({key.removeprefix("_backbone."): value for key, value in backbone.state_dict().items()})
    for theirs, timms in zip(maps, model(x), strict=True):
        torch.testing.assert_close(theirs, timms, rtol=0, atol=1e-5)


def test_upernet_trains(small_encoder: str) -> None:
    backbone = transformers.TimmBackboneConfig(
        backbone=small_encoder, out_indices=four_levels(small_encoder), use_pretrained_backbone=False
    )
    config = transformers.UperNetConfig(backbone_config=backbone, num_labels=5, use_auxiliary_head=False)
    model = transformers.UperNetForSemanticSegmentation(config)
    logits = model(torch.rand(2, 3, 64, 64)).logits
    assert logits.shape == (2, 5, 64, 64)
    logits.mean().backward()
    assert next(model.backbone.parameters()).grad.abs().sum() > 0
