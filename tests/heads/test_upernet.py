"""The published UPerNet and its auxiliary head against the reference's own numbers and keys."""

import gzip
import json
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lk_backbones.heads import FCNHead, OpenMMLabUPerNet
from lk_backbones.heads.upernet import UPerNetDecoder
from lk_backbones.weights.files import unwrap
from lk_backbones.weights.openmmlab import rename_upernet

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOLERANCE = 2e-5  # of the largest value, as the fixtures' authors state it
PUBLISHED = ["31b_ade20k", "31b_cityscapes", "31l_ade20k", "xl_ade20k"]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


class Heads(torch.nn.Module):
    """The modules of an `OpenMMLabUPerNet` and of the auxiliary head, without an encoder, under their usual names."""

    def __init__(self, in_channels, channels, aux_channels, num_classes, align_corners, pool_scales=(1, 2, 3, 6)):
        super().__init__()
        self.decoder = UPerNetDecoder([3, 0, *in_channels], channels, pool_scales, align_corners)
        self.segmentation_head = smp.base.SegmentationHead(channels, num_classes, kernel_size=1)
        self.auxiliary_head = FCNHead(in_channels[2], num_classes, aux_channels)


@pytest.mark.parametrize("name", ["upernet_tiny", "upernet_tiny_align_corners"])
def test_same_numbers_as_the_reference(name: str) -> None:
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    info = json.loads((FIXTURES / f"{name}.json").read_text())
    decode, auxiliary = info["config"]["decode_head"], info["config"]["auxiliary_head"]
    align_corners = decode["align_corners"]
    heads = Heads(
        decode["in_channels"], decode["channels"], auxiliary["channels"], decode["num_classes"], align_corners
    ).eval()
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    heads.load_state_dict(rename_upernet(state), strict=True)
    maps = [tensors[f"input.{i}"] for i in range(4)]
    features = [torch.empty(2, 3, *info["image_size"]), torch.empty(2, 0, 1, 1), *maps]

    with torch.no_grad():
        logits = heads.segmentation_head(heads.decoder(features))
        assert_close(heads.decoder.pyramid_pooling(maps[3]), tensors["output.psp_out"])
        assert_close(logits, tensors["output.decode_logits"])
        assert_close(heads.auxiliary_head(maps[2]), tensors["output.aux_logits"])
        upsampled = F.interpolate(logits[:1], tuple(info["image_size"]), mode="bilinear", align_corners=align_corners)
        assert_close(upsampled, tensors["output.decode_logits_upsampled_first_image"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_key_of_the_heads_has_a_place(name: str) -> None:
    manifest = json.loads(gzip.decompress((FIXTURES / f"keys_upernet_replknet_{name}.json.gz").read_bytes()))
    config, shapes = manifest["config"], manifest["state_dict"]
    with torch.device("meta"):
        heads = Heads(
            config["in_channels"],
            config["channels"],
            config["aux_channels"],
            config["num_classes"],
            config["align_corners"],
            config["pool_scales"],
        )
    published = {k: torch.empty(v, device="meta") for k, v in shapes.items() if not k.startswith("backbone.")}
    renamed = rename_upernet(published)
    assert len(renamed) == len(published) == 82
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in heads.state_dict().items()}


def test_filter_keeps_our_own_names_and_refuses_unknown_ones() -> None:
    heads = Heads([8, 16, 32, 64], 16, 8, 7, False)
    assert rename_upernet(heads.state_dict()).keys() == heads.state_dict().keys()
    assert rename_upernet(unwrap({"state_dict": {"backbone.stem.0.conv.weight": torch.ones(1)}})[0]).keys() == {
        "backbone.stem.0.conv.weight"
    }
    for key in ("decode_head.mystery.weight", "auxiliary_head.mystery.weight"):
        with pytest.raises(KeyError, match=key):
            rename_upernet({key: torch.ones(1)})


@pytest.mark.parametrize("align_corners", [False, True])
def test_any_image_size_and_any_depth(align_corners: bool) -> None:
    torch.manual_seed(0)
    for depth in (3, 4, 5):
        model = OpenMMLabUPerNet(
            "resnet18", depth, None, decoder_channels=8, classes=5, align_corners=align_corners
        ).eval()
        image = torch.randn(1, 3, 65, 97)
        with torch.no_grad():
            logits = model(image)
            coarse = model.segmentation_head(model.decoder(model.encoder(image)))
        assert logits.shape == (1, 5, 65, 97)
        expected = F.interpolate(coarse, (65, 97), mode="bilinear", align_corners=align_corners)
        torch.testing.assert_close(logits, expected)
    with pytest.raises(ValueError, match="encoder_depth >= 3, got 2"):
        OpenMMLabUPerNet("resnet18", 2, None)


def test_is_an_ordinary_smp_model(tmp_path: Path) -> None:
    model = smp.create_model("upernet_openmmlab", "resnet18", None, in_channels=4, classes=5, decoder_channels=8)
    assert isinstance(model, OpenMMLabUPerNet)
    model.eval().save_pretrained(tmp_path)
    again = OpenMMLabUPerNet.from_pretrained(tmp_path).eval()
    image = torch.randn(2, 4, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(image), again(image))


def test_compile_export_and_script() -> None:
    model = OpenMMLabUPerNet("resnet18", 5, None, decoder_channels=8, classes=5).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image)
        exported = torch.export.export(model, (image,)).module()(image)
        torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(image)
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
        scripted = torch.jit.script(model)(image)
        torch.testing.assert_close(scripted, expected, rtol=1e-4, atol=1e-4)


def test_every_parameter_of_both_heads_is_trained() -> None:
    torch.manual_seed(0)
    heads = Heads([8, 16, 32, 64], 16, 8, 7, False)
    features = [torch.empty(2, 3, 64, 96), torch.empty(2, 0, 1, 1)]
    features += [torch.randn(2, c, 16 >> i, 24 >> i) for i, c in enumerate([8, 16, 32, 64])]
    loss = heads.segmentation_head(heads.decoder(features)).square().sum()
    (loss + heads.auxiliary_head(features[4]).square().sum()).backward()
    assert [name for name, p in heads.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_fcn_head_refuses_no_convolution() -> None:
    with pytest.raises(ValueError, match="num_convs must be at least 1, got 0"):
        FCNHead(8, 3, num_convs=0)
