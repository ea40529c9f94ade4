"""UniRepLKNet against tensors that the reference implementation computed, and against every published key."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model

import lk_backbones
from lk_backbones.encoders._loading import fitting_encoders
from lk_backbones.encoders._names import translate
from lk_backbones.encoders.unireplknet import UniRepLKNet, checkpoint_arguments, checkpoint_filter_fn
from lk_backbones.tasks import SegmentationTask
from lk_backbones.tasks.optim import encoder_lr_scales
from tests.conftest import assert_golden, load_golden, load_manifest

DEPTHS = (2, 2, 4, 2)
GOLDENS: dict[str, dict[str, Any]] = {
    "tiny": {"channels": (8, 16, 32, 64), "kernel_sizes": (3, 13, (13, 3), 13)},
    "tiny_eps": {"channels": (8, 12, 16, 24), "kernel_sizes": ((3, 3), (13, 13), (13, 3, 13, 3), (13, 13))},
    "tiny_kernels": {"channels": (8, 12, 16, 24), "kernel_sizes": ((5, 7), (9, 11), (15, 17, 0, 13), (3, 13))},
}


def build(name: str, **kwargs: Any) -> UniRepLKNet:
    return UniRepLKNet(**(GOLDENS[name] | {"depths": DEPTHS, "num_classes": 10} | kwargs)).eval()


def load(model: UniRepLKNet, state_dict: dict[str, torch.Tensor]) -> UniRepLKNet:
    model.load_state_dict(translate(state_dict, model, model), strict=True)
    return model


def deployed_state(golden: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a checkpoint after the reference's own folding; one tensor of the fixture is left out there for size."""
    gone = r"stages\.\d\.\d\.(gamma|norm\..*|act\.1\.beta|pwconv2\..*|dwconv\..*)"
    state = {key: value for key, value in golden["state"].items() if not re.fullmatch(gone, key)}
    for key, value in golden["state"].items():
        if match := re.fullmatch(r"(stages\.\d\.\d)\.pwconv2\.0\.weight", key):
            block, norm = match[1], f"{match[1]}.pwconv2.2"
            factor = golden["state"][f"{norm}.weight"] / (golden["state"][f"{norm}.running_var"] + 1e-5).sqrt()
            state[key] = value * (factor * golden["state"][f"{block}.gamma"])[:, None]
    return state | golden["merged_state"]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", GOLDENS)
def test_same_numbers_as_the_reference(name: str, folded: bool) -> None:
    golden = load_golden(f"unireplknet_{name}")
    model = load(build(name), golden["state"])
    suffix = ""
    if folded:
        model, suffix = reparameterize_model(model), "_reparam"
        kinds = {type(module).__name__ for module in model.modules()}
        assert not kinds & {"BatchNorm2d", "LayerScale2d"}
    image = golden["input"][""]
    assert_golden(model(image), golden["output"][f"logits{suffix}"])
    for level, feature in enumerate(model.forward_intermediates(image, [1, 2, 3, 4], intermediates_only=True)):
        assert_golden(feature, golden["output"][f"stage_features{suffix}.{level}"])


@pytest.mark.parametrize("folded", [False, True])
def test_returned_maps_are_normalised_as_in_dense_tasks(folded: bool) -> None:
    golden = load_golden("unireplknet_tiny")
    state = {key: value for key, value in golden["state"].items() if not key.startswith(("norm.", "head."))}
    model = build("tiny", norm_features=True, num_classes=0)
    renamed = checkpoint_filter_fn(state | golden["backbone_state"], model)
    assert checkpoint_arguments(renamed) == {"norm_features": True}
    report = model.load_state_dict(renamed, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) == {"head.norm.weight", "head.norm.bias"}  # absent from backbones
    if folded:
        model = reparameterize_model(model)
    maps = model.forward_intermediates(golden["input"][""], [1, 2, 3, 4], intermediates_only=True)
    for level, feature in enumerate(maps):
        assert_golden(feature, golden["output"][f"backbone_features.{level}"])


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", ["tiny", "tiny_kernels"])
def test_deployed_checkpoints_load(name: str, folded: bool) -> None:
    golden = load_golden(f"unireplknet_{name}")
    if name == "tiny":
        state = deployed_state(golden)
    else:  # every size of kernel, and none
        state = as_deployed(reparameterize_model(load(build(name), golden["state"])))
    model = build(name)
    model = load(reparameterize_model(model) if folded else model, state)
    assert_golden(model(golden["input"][""]), golden["output"]["logits_reparam"])
    assert_golden(reparameterize_model(model)(golden["input"][""]), golden["output"]["logits_reparam"])


def as_deployed(model: UniRepLKNet) -> dict[str, torch.Tensor]:
    """Name a folded model's tensors as the reference does."""
    out = {}
    for key, value in model.state_dict().items():
        if match := re.fullmatch(r"(stages\.\d)\.blocks(\.\d+\.)(.*)", key):
            name = match[3].replace("se.fc1", "se.down").replace("se.fc2", "se.up").replace("grn.weight", "act.1.gamma")
            name = name.replace("pw1.conv", "pwconv1.1").replace("pw2.conv", "pwconv2.0")
            name = name.replace("branches.0.conv", "lk_origin" if value.shape[-1] > 5 or value.ndim == 1 else "")
            key, value = (
                f"{match[1]}{match[2]}{name}",
                value[:, :, 0, 0] if "pwconv" in name and value.ndim == 4 else value,
            )
        elif match := re.fullmatch(r"stem\.(\d)\.(conv|bn)\.(.*)", key):
            key = f"downsample_layers.0.{3 * int(match[1]) + (match[2] == 'bn')}.{match[3]}"
        elif match := re.fullmatch(r"stages\.(\d)\.downsample\.(conv|bn)\.(.*)", key):
            key = f"downsample_layers.{match[1]}.{int(match[2] == 'bn')}.{match[3]}"
        out[key.replace("..", ".").replace("head.norm", "norm").replace("head.fc", "head")] = value
    return out


def test_folded_tensors_equal_the_reference_tap_by_tap() -> None:
    golden = load_golden("unireplknet_tiny")
    model = reparameterize_model(load(build("tiny"), golden["state"]))
    own = model.state_dict()
    first = {"downsample_layers.0.0.weight": own["stem.0.conv.weight"]}  # by which the naming is known
    expected = checkpoint_filter_fn(first | golden["merged_state"], model)
    assert len(expected) == 1 + len(golden["merged_state"]) > 30
    for key, value in expected.items():
        assert_golden(own[key], value, 2e-6)


def as_timm_port(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a published checkpoint as the port of it in timm's style does, in the order of a safetensors file."""
    out = {}
    for key, value in state.items():
        for number, name in (("0", "conv1"), ("1", "norm1"), ("3", "conv2"), ("4", "norm2")):
            key = key.replace(f"downsample_layers.0.{number}.", f"stem.{name}.")
        key = re.sub(r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.conv.", key)
        key = re.sub(r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.norm.", key)
        key = re.sub(r"^stages\.(\d)\.(\d+)\.(?!conv|norm)", r"stages.\1.blocks.\2.", key)
        key = re.sub(r"^stages\.(\d)\.(\d+)\.norm\.", r"stages.\1.blocks.\2.norm.", key)
        key = key.replace(".se.down.", ".se.fc1.").replace(".se.up.", ".se.fc2.").replace(".pwconv1.1.", ".pwconv1.")
        key = key.replace(".pwconv2.0.", ".pwconv2.").replace(".pwconv2.2.", ".bn.")
        key = key.replace(".act.1.gamma", ".grn.weight").replace(".act.1.beta", ".grn.bias")
        key = re.sub(r"^norm\.", "head.norm.", re.sub(r"^head\.", "head.fc.", key))
        if match := re.fullmatch(r"(.*)\.dil_(conv|bn)_k\d+_(\d+)\.(.*)", key):
            block = re.escape(match[1].replace(".blocks.", "."))
            branches = [re.match(rf"{block}\.dil_conv_k\d+_(\d+)", other) for other in state]
            spread = sorted(int(branch[1]) for branch in branches if branch)
            key = f"{match[1]}.dil_{match[2]}s.{spread.index(int(match[3]))}.{match[4]}"
        out[key] = value.flatten() if ".grn." in key else value
    return dict(sorted(out.items()))


def test_the_timm_ports_checkpoints_load() -> None:
    golden = load_golden("unireplknet_tiny_kernels")
    state = as_timm_port(golden["state"])
    some = {"stem.conv1.weight", "stages.1.downsample.norm.bias", "stages.2.blocks.0.dwconv.dil_convs.4.weight"}
    some |= {"stages.2.blocks.1.dwconv.origin_bn.weight", "stages.0.blocks.0.grn.bias", "stages.0.blocks.0.bn.weight"}
    assert some <= state.keys()
    model = load(build("tiny_kernels"), state)
    assert_golden(model(golden["input"][""]), golden["output"]["logits"])


def test_the_order_of_the_keys_does_not_matter() -> None:
    golden = load_golden("unireplknet_tiny_kernels")
    model = load(build("tiny_kernels"), dict(sorted(golden["state"].items())))
    assert_golden(model(golden["input"][""]), golden["output"]["logits"])


@pytest.mark.parametrize("prefix", ["model", "state_dict"])
def test_wrapped_checkpoints_load(prefix: str) -> None:
    golden = load_golden("unireplknet_tiny")
    state = golden["state"]
    if prefix == "state_dict":  # OpenMMLab's
        state = {f"backbone.{k}" if not k.startswith("head.") else k: v for k, v in state.items()}
    model = load(build("tiny"), {prefix: state})
    assert_golden(model(golden["input"][""]), golden["output"]["logits"])


def test_own_checkpoints_pass_through_unchanged() -> None:
    for model in (build("tiny_kernels"), reparameterize_model(build("tiny_kernels"))):
        state = model.state_dict()
        assert checkpoint_filter_fn(state, model) is state


def test_unknown_keys_reach_the_strict_load() -> None:
    model = build("tiny")
    state = load_golden("unireplknet_tiny")["state"] | {"stages.0.0.typo.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"stages\.0\.blocks\.0\.typo\.weight"):
        model.load_state_dict(checkpoint_filter_fn(state, model))


def test_a_deployed_checkpoint_does_not_fit_other_norms() -> None:
    model = build("tiny", norm_layer="layernorm2d")
    with pytest.raises(RuntimeError, match=r"pw2\.conv\.bias"):
        load(model, deployed_state(load_golden("unireplknet_tiny")))


VARIANTS = ("a", "f", "p", "n", "t", "s", "b", "l", "xl")


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_many_parameters_as_the_reference(variant: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"unireplknet_{variant}", num_classes=1000)
    assert count(model) == load_manifest(f"unireplknet_{variant}")["param_count"]
    folded = lk_backbones.reparameterize(model, inplace=True)
    assert count(folded) == load_manifest(f"unireplknet_{variant}_deploy")["param_count"]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_published_key_is_accounted_for(variant: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"unireplknet_{variant}", num_classes=1000, norm_features=True)
    maps = {name for name in model.state_dict() if name.startswith("feature_norms.")}
    classifier = {name for name in model.state_dict() if name.startswith("head.")}
    assert (len(maps), len(classifier)) == (8, 4)
    for naming, missing in (("", maps), ("_port", maps), ("_backbone", classifier), ("_deploy", maps)):
        manifest = load_manifest(f"unireplknet_{variant}{naming.replace('_port', '')}")
        state = {key: torch.empty(shape, device="meta") for key, shape in manifest["state_dict"].items()}
        if naming == "_port":
            state = as_timm_port(state)
        elif naming == "_deploy":
            model = lk_backbones.reparameterize(model, inplace=True)
        mapped = checkpoint_filter_fn(state, model)
        assert {key: value.shape for key, value in mapped.items()} == {
            key: value.shape for key, value in model.state_dict().items() if key not in missing
        }
        assert len(mapped) == len(state)
        assert bool(checkpoint_arguments(mapped)) is (naming == "_backbone")


@pytest.mark.parametrize("variant", ["a", "t"])
def test_a_deployed_file_fits_the_unfolded_model_at_full_size(variant: str) -> None:
    manifest = load_manifest(f"unireplknet_{variant}_deploy")
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in manifest["state_dict"].items()}
        model = timm.create_model(f"unireplknet_{variant}", num_classes=1000)
        model.load_state_dict(checkpoint_filter_fn(state, model), strict=True, assign=True)


def test_drop_path_grows_linearly_over_blocks() -> None:
    model = build("tiny", drop_path_rate=0.9)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([index / 10 for index in range(10)])


# Variant and layers below the head, as in the authors' configurations of ADE20K (the last for 18 blocks, not 27).
@pytest.mark.parametrize(("variant", "num_layers"), [("s", 12), ("t", 9)])
def test_layers_are_those_that_the_published_decay_counts(variant: str, num_layers: int) -> None:
    with torch.device("meta"):
        task = SegmentationTask(encoder=f"unireplknet_{variant}", encoder_kwargs={"norm_features": True})
    scales, _ = encoder_lr_scales(task.encoder, 0.9, task.hparams["encoder_kwargs"])
    assert scales.keys() == {name for name, _ in task.encoder.named_parameters()}
    for name, scale in scales.items():
        stage, block = re.search(r"stages[._](\d)", name), re.search(r"blocks\.(\d+)", name)
        if "stem" in name:
            layer = 0
        elif stage is None:
            assert "feature_norms" in name
            layer = num_layers + 1
        elif stage[1] == "2":
            layer = 3 + (int(block[1]) // 3 if block else 0)
        else:
            layer = {"0": 1, "1": 2, "3": num_layers}[stage[1]]
        assert scale == pytest.approx(0.9 ** (num_layers + 1 - layer)), name


def test_other_kernels_and_branches() -> None:
    branches = {"31": [[5, 1], [7, 4], [3, 15]]}  # as a configuration file has them
    model = build("tiny", kernel_sizes=31, branches=json.loads(json.dumps(branches)))
    convs = [branch.conv for branch in model.stages[0].blocks[0].dwconv.branches]
    assert [(c.kernel_size[0], c.dilation[0]) for c in convs] == [(31, 1), (5, 1), (7, 4), (3, 15)]
    x = torch.rand(1, 3, 64, 64)
    folded = lk_backbones.reparameterize(model)
    assert len(folded.stages[0].blocks[0].dwconv.branches) == 1
    assert_golden(folded(x), model(x), 1e-4)
    assert len(build("tiny", kernel_sizes=3).stages[3].blocks[1].dwconv.branches) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ({"kernel_sizes": (3, 13, 12, 13)}, "kernel_sizes must be odd, or 0 for no kernel, got 12"),
        ({"kernel_sizes": -3}, "kernel_sizes must be odd, or 0 for no kernel, got -3"),
        ({"kernel_sizes": (3, 13, 13)}, r"for each stage one size or a row of sizes.*got \(3, 13, 13\)"),
        ({"kernel_sizes": (3, 13, (13, 3, 3), 13)}, r"row of sizes that repeats.*depths=\(2, 2, 4, 2\)"),
        ({"kernel_sizes": (3, 13, (), 13)}, "row of sizes that repeats"),
        ({"kernel_sizes": 31}, r"no branches are known for kernels of size 31, only for 7, 9, 11, 13, 15, 17"),
        ({"branches": {13: [(15, 1)]}}, "size 15 and dilation 1 reaches over 15 pixels, beyond .* of size 13"),
        ({"branches": {13: [(5, 4)]}}, "size 5 and dilation 4 reaches over 17 pixels, beyond .* of size 13"),
        ({"branches": {13: [(4, 1)]}}, r"positive odd kernel sizes and dilations, got \(4, 4\)"),
        ({"branches": {13: [(3, 0)]}}, "positive odd kernel sizes and dilations, got .*dilation 0"),
        ({"channels": (8, 16, 32)}, "same four stages"),
        ({"channels": (2, 4, 8, 16)}, "of 4 channels at least"),
    ],
)
def test_nonsense_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("tiny", **kwargs)


def test_a_siblings_weights_are_refused_with_its_name() -> None:
    manifest = load_manifest("unireplknet_a")
    state = {key: torch.zeros(shape) for key, shape in manifest["state_dict"].items()}
    assert fitting_encoders(state) == ["unireplknet_a"]
