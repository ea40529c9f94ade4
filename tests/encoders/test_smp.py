"""Every registered encoder inside segmentation-models-pytorch, by our name and as ``tu-``."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from packaging.version import Version
from torch import nn

import lk_backbones
from lk_backbones.encoders._smp import LargeKernelEncoder
from lk_backbones.weights.catalogue import list_published
from tests.conftest import assert_golden, feature_strides, randomize_norms

ARCHITECTURES = [
    "unet",
    "unetplusplus",
    "manet",
    "linknet",
    "fpn",
    "pspnet",
    "pan",
    "deeplabv3",
    "deeplabv3plus",
    "upernet",
    "segformer",
]


NEED_STRIDE_2 = ("unetplusplus", "linknet") if Version(smp.__version__) < Version("0.6") else ()


def test_registered_under_our_name(any_encoder: str) -> None:
    assert any_encoder in smp.encoders.get_encoder_names()
    assert "imagenet" in smp.encoders.encoders[any_encoder]["pretrained_settings"]


def test_a_name_that_smp_owns_stays_smps(monkeypatch: pytest.MonkeyPatch) -> None:
    from lk_backbones.encoders import _smp as module

    before = smp.encoders.encoders["resnet18"]
    monkeypatch.setattr(module, "list_encoders", lambda: ["resnet18"])
    module.register_with_smp()
    assert smp.encoders.encoders["resnet18"] is before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_decoder_trains(small_encoder: str, architecture: str) -> None:
    if architecture in NEED_STRIDE_2 and 2 not in feature_strides(small_encoder):
        pytest.skip("in smp before 0.6 this decoder needs a map of stride 2, which this family does not have")
    torch.manual_seed(0)
    model = smp.create_model(architecture, small_encoder, encoder_weights=None, classes=3)
    size = 128 if architecture == "pan" else 64  # which pools the deepest map three times
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 3, size, size)
    logits.square().mean().backward()
    # PSPNet and the like stop before the deepest level; the stem sees a gradient in all of them.
    assert next(model.encoder.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_depth_and_in_channels(small_encoder: str, depth: int, in_channels: int) -> None:
    encoder = smp.encoders.get_encoder(small_encoder, in_channels=in_channels, depth=depth).eval()
    features = encoder(torch.randn(1, in_channels, 64, 64))
    assert [f.shape[1] for f in features] == list(encoder.out_channels)
    assert [64 // f.shape[-1] for f in features] == [2**i for i in range(depth + 1)]
    # behind a 4x4 patch stem there is nothing of stride 2
    real = [2**i for i, f in enumerate(features) if f.shape[1] > 0]
    assert real == [1, *(stride for stride in feature_strides(small_encoder) if stride <= 2**depth)]
    assert encoder.output_stride == 2**depth


@pytest.mark.parametrize(
    ("architecture", "output_stride"),
    [("deeplabv3", 8), ("deeplabv3", 16), ("deeplabv3plus", 8), ("deeplabv3plus", 16), ("pan", 16)],
)
def test_output_stride(small_encoder: str, architecture: str, output_stride: int) -> None:
    kwargs = {"encoder_output_stride": output_stride}
    model = smp.create_model(architecture, small_encoder, encoder_weights=None, **kwargs).eval()
    assert model.encoder(torch.randn(1, 3, 128, 128))[-1].shape[-1] == 128 // output_stride
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 1, 128, 128)


def test_both_names_build_the_same_function(small_encoder: str) -> None:
    own = randomize_norms(smp.encoders.get_encoder(small_encoder)).eval()
    universal = smp.encoders.get_encoder(f"tu-{small_encoder}", weights=None).eval()
    universal.load_state_dict(own.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for mine, theirs in zip(own(x), universal(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_keyword_arguments_reach_the_encoder_by_the_universal_name(small_encoder: str) -> None:
    model = smp.Unet(f"tu-{small_encoder}", encoder_weights=None, drop_path_rate=0.5)
    rates = [m.drop_prob for m in model.encoder.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.5)


@pytest.mark.parametrize("depth", [3, 5])
def test_timm_state_dict_loads_strictly(small_encoder: str, depth: int) -> None:
    source = randomize_norms(timm.create_model(small_encoder)).eval()
    encoder = smp.encoders.get_encoder(small_encoder, depth=depth).eval()
    encoder.load_state_dict(source.state_dict())
    x = torch.randn(1, 3, 64, 64)
    levels = [level for level, stride in enumerate(feature_strides(small_encoder)) if stride <= 2**depth]
    expected = source.forward_intermediates(x, levels, intermediates_only=True)
    for mine, timms in zip([maps for maps in encoder(x)[1:] if maps.shape[1] > 0], expected, strict=True):
        torch.testing.assert_close(mine, timms, rtol=0, atol=1e-5)


def test_foreign_keys_are_refused(small_encoder: str) -> None:
    state = timm.create_model(small_encoder).state_dict() | {"stages.0.typo": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"stages\.0\.typo"):
        smp.encoders.get_encoder(small_encoder).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("replknet_31n", "nobody published"), ("replknet_31b", "load_weights.*replknet_31b.in1k.*LK_BACKBONES_NAMESPACE")],
)
def test_default_weights_say_what_to_do_instead(name: str, advice: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){name} has no weights.*encoder_weights=None.*{advice}"):
        smp.Unet(name)


def test_script_compile_and_export(small_encoder: str) -> None:
    encoder = smp.encoders.get_encoder(small_encoder).eval()
    for stage in (module for module in encoder.modules() if isinstance(getattr(module, "blocks", None), nn.Sequential)):
        stage.blocks = stage.blocks[:1]  # compilers take their time
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(x)
        variants = [
            torch.jit.script(encoder),
            torch.compile(encoder, fullgraph=True, dynamic=True, backend="eager"),
            torch.export.export(encoder, (x,), strict=True).module(),
        ]
        for variant in variants:
            for mine, other in zip(expected, variant(x), strict=True):
                torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-5)


def test_folding_inside_a_segmentation_model(small_encoder: str) -> None:
    model = randomize_norms(smp.Unet(small_encoder, encoder_weights=None)).eval()
    x = torch.rand(1, 3, 64, 64)
    assert_golden(lk_backbones.reparameterize(model)(x), model(x), 1e-4)


def test_save_and_load_pretrained(small_encoder: str, tmp_path) -> None:
    model = randomize_norms(smp.FPN(small_encoder, encoder_weights=None)).eval()
    model.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path).eval()
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["unet", "pan"])
def test_arguments_that_smp_drops_are_named(small_encoder: str, architecture: str) -> None:
    with pytest.warns(
        UserWarning, match=rf"drops kernel_sizes=13, drop_rate=0.5: .* here 'tu-{small_encoder}'"
    ) as seen:
        smp.create_model(architecture, small_encoder, encoder_weights=None, kernel_sizes=13, drop_rate=0.5)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = smp.create_model(architecture, small_encoder, encoder_weights=None)
        smp.create_model(architecture, f"tu-{small_encoder}", encoder_weights=None, drop_path_rate=0.5)
        smp.encoders.get_encoder(small_encoder, depth=4)
        LargeKernelEncoder(small_encoder)
    assert type(model.encoder) is LargeKernelEncoder


def test_preprocessing_parameters(any_encoder: str) -> None:
    config = timm.get_pretrained_cfg(any_encoder)
    expected = {"input_space": "RGB", "input_range": [0, 1], "mean": list(config.mean), "std": list(config.std)}
    assert smp.encoders.get_preprocessing_params(any_encoder) == expected
    assert smp.encoders.get_preprocessing_params(any_encoder, pretrained="imagenet") == expected
    pixels = np.full((2, 2, 3), 255, dtype=np.uint8)
    preprocessed = smp.encoders.get_preprocessing_fn(any_encoder)(pixels)
    np.testing.assert_allclose(preprocessed[0, 0], (1 - np.array(config.mean)) / np.array(config.std))
    for weights in list_published(f"{any_encoder}.*"):
        tag = weights.name.partition(".")[2]
        config = timm.get_pretrained_cfg(weights.name)
        params = smp.encoders.get_preprocessing_params(any_encoder, pretrained=tag)
        assert (params["mean"], params["std"]) == (list(config.mean), list(config.std))


def test_preprocessing_parameters_of_others_are_smps(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    with pytest.raises(ValueError, match="Available pretrained options"):
        smp.encoders.get_preprocessing_params(lk_backbones.list_encoders()[0], pretrained="nonsense")
    with pytest.raises(KeyError):
        smp.encoders.get_preprocessing_params("nonsense")
    asked = []

    def fetch(repo_id: str, filename: str, revision: str) -> str:
        asked.append(repo_id)
        file = tmp_path / filename
        file.write_text('{"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}')
        return str(file)

    monkeypatch.setattr(smp.encoders, "hf_hub_download", fetch)
    assert smp.encoders.get_preprocessing_params("resnet18")["mean"] == [0.1, 0.2, 0.3]
    assert asked == [smp.encoders.encoders["resnet18"]["pretrained_settings"]["imagenet"]["repo_id"]]
