"""Every tensor of a file is loaded or skipped, and said to be, also where a family's filter makes new ones of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from lk_backbones import hub as lk_hub
from lk_backbones.weights import Weights
from lk_backbones.weights.report import follow

State = dict[str, torch.Tensor]


def facebook_convnext(state: State) -> State:
    """The names of the authors' files, whose pointwise layers are linear."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.").replace("head.fc.", "head.")
        key = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"stages\.(\d)\.blocks\.", r"stages.\1.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        renamed[key] = value.flatten(1) if value.dim() == 4 and value.shape[2:] == (1, 1) else value
    return renamed


def same(state: State) -> State:
    return dict(state)


def with_teacher(state: State) -> State:
    """A file of self-supervised training: a second head that nobody wants."""
    return dict(state) | {"head_dist.weight": torch.ones(3, 4), "pre_logits.fc.weight": torch.ones(2)}


def other_size(state: State) -> State:
    """Position embeddings for pictures of another size, which the filter resamples."""
    grid = state["pos_embed"][:, 1:]
    return dict(state) | {"pos_embed": torch.cat([state["pos_embed"][:, :1], grid.repeat(1, 4, 1)], 1)}


# Architecture, arguments, the file's naming, and what of the file is not the model's.
FAMILIES: dict[str, tuple[str, dict[str, Any], Callable[[State], State], set[str]]] = {
    "convnext, authors'": ("convnext_atto", {"conv_mlp": False}, facebook_convnext, set()),
    "convnext with convolutions, authors'": ("convnext_atto", {"conv_mlp": True}, facebook_convnext, set()),
    "convnext": ("convnext_atto", {}, same, set()),
    "resnet": ("resnet10t", {}, same, set()),
    "vit": ("vit_tiny_patch16_224", {"depth": 2}, same, set()),
    "vit resampled": ("vit_tiny_patch16_224", {"depth": 2}, other_size, set()),
    "vit with another head": ("vit_tiny_patch16_224", {"depth": 2}, with_teacher, {"head_dist.weight"}),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1)}, same, set()),
    "swinv2": ("swinv2_tiny_window8_256", {"embed_dim": 24, "depths": (1, 1, 1, 1)}, same, set()),
    "efficientnet": ("efficientnet_b0", {}, same, set()),
    "mobilenetv3": ("mobilenetv3_small_050", {}, same, set()),
    "replknet": ("replknet_31n", {"depths": (1, 1, 1, 1), "kernel_sizes": 3}, same, set()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_accounted_for_once(family: str, tmp_path: Path) -> None:
    name, arguments, naming, foreign = FAMILIES[family]
    torch.manual_seed(0)
    source, model = (timm.create_model(name, num_classes=7, **arguments) for _ in range(2))
    state = naming(source.state_dict())
    report = lk_hub.load_weights(model, Weights(state, {}, "file.pth", tmp_path), strict=not foreign)
    skipped = [key for keys in report.skipped.values() for key in keys]
    assert foreign <= set(skipped) <= set(state) - set(source.state_dict()) if foreign else skipped == []
    assert report.missing == []
    assert sorted(report.loaded) == sorted(model.state_dict())
    for key, value in source.state_dict().items():
        if key != "pos_embed" or family != "vit resampled":
            assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("family", ["convnext with convolutions, authors'", "resnet", "replknet", "efficientnet"])
def test_an_encoder_skips_the_classifier_only(family: str, tmp_path: Path) -> None:
    name, arguments, naming, _ = FAMILIES[family]
    source = timm.create_model(name, num_classes=7, **arguments)
    state = naming(source.state_dict())
    model = timm.create_model(name, features_only=True, **arguments)
    report = lk_hub.load_weights(model, Weights(state, {}, "file.pth", tmp_path))
    skipped = [key for keys in report.skipped.values() for key in keys]
    assert len(set(skipped)) == len(skipped)
    assert set(skipped) <= state.keys()  # by the names that they have in the file
    assert len(report.loaded) + len(skipped) == len(state)
    assert all(re.match(r"(head|norm|fc|classifier|conv_head|bn2)\b", key) for key in skipped), skipped
    assert sorted(report.loaded) == sorted(model.state_dict())


def test_a_classifier_of_other_classes_is_named_as_in_the_file(tmp_path: Path) -> None:
    state = facebook_convnext(timm.create_model("convnext_atto", num_classes=7).state_dict())
    model = timm.create_model("convnext_atto", num_classes=3)
    report = lk_hub.load_weights(model, Weights(state, {}, "file.pth", tmp_path))
    assert report.skipped == {
        "a classifier of 7 classes; the model keeps its own, of 3": ["head.weight", "head.bias"],
    }


def test_what_came_of_what() -> None:
    state = {key: torch.arange(4.0) + i for i, key in enumerate("abcde")}

    def rename(named: State) -> State:
        unused = named.pop("e")
        joined = torch.cat([named["a"], named["b"]])
        made = torch.zeros(4)
        half = named["c"].clone()
        half[:2] = named["d"][:2]
        del unused
        return {"same": named["a"], "joined": joined, "first": joined.chunk(2)[0], "made": made, "half": half}

    renamed, origins = follow(rename, state)
    assert {key: "".join(sorted(keys)) for key, keys in origins.items()} == {
        "same": "a", "joined": "ab", "first": "ab", "made": "", "half": "cd",
    }  # fmt: skip
    assert state.keys() == set("abcde")
    assert all(type(value) is torch.Tensor for value in renamed.values())
    assert torch.equal(renamed["half"], torch.tensor([3.0, 4.0, 4.0, 5.0]))
    assert renamed["same"].data_ptr() == state["a"].data_ptr()


def test_a_filter_that_stumbles_is_one_error(tmp_path: Path) -> None:
    model: VisionTransformer = timm.create_model("vit_tiny_patch16_224", depth=1)
    state = dict(model.state_dict())
    state["patch_embed.proj.weight"] = torch.ones(3)
    state["pos_embed"] = torch.ones(2, dtype=torch.int32)
    with pytest.raises(lk_hub.WeightsError, match=r"'file\.pth' does not hold weights of 'vit_tiny_patch16_224'"):
        lk_hub.load_weights(model, Weights(state, {}, "file.pth", tmp_path))


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_copy_beside_the_encoder_is_not_taken_for_it(first: bool, features_only: bool) -> None:
    model = timm.create_model("replknet_31n", depths=(1, 1, 1, 1), kernel_sizes=3)
    own = model.state_dict()
    copies = {
        f"{name}.{key}": torch.zeros_like(value) for name in ("teacher", "backbone") for key, value in own.items()
    }
    encoder = timm.create_model("replknet_31n", depths=(1, 1, 1, 1), kernel_sizes=3, features_only=features_only)
    report = lk_hub.load_weights(
        encoder, Weights(copies | own if first else own | copies, {}, "mine", Path("mine")), strict=False
    )
    loaded = {key.replace("stem_", "stem.").replace("stages_", "stages."): v for key, v in encoder.state_dict().items()}
    assert len(report.loaded) == len(loaded)
    for key, value in loaded.items():
        assert torch.equal(value, own[key]), key
