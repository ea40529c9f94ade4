"""Published checkpoints load as they are, into whatever contains an encoder, and every tensor is accounted for."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lk_backbones import hub as lk_hub
from lk_backbones.cli import main
from lk_backbones.encoders._names import translate
from lk_backbones.repository.build import build_model
from lk_backbones.tasks import DetectionTask, SegmentationTask
from lk_backbones.tasks.openmmlab import openmmlab_state_dict
from lk_backbones.weights import Weights
from lk_backbones.weights.report import follow
from tests.conftest import assert_golden, load_golden, load_manifest

TINY = {"depths": (1, 1, 2, 1), "channels": (8, 16, 32, 64), "kernel_sizes": (31, 29, 27, 13)}
SMALL = {"kernel_sizes": 3, "depths": (1, 1, 1, 1)}
CASCADE_TINY = {"box_head_channels": 16, "box_head_fc_channels": 32, "mask_head_channels": 16}
FIRST_CONV = "backbone.stem.0.conv.weight"


def tiny(**kwargs) -> nn.Module:
    return timm.create_model("replknet_31n", **(TINY | {"num_classes": 10} | kwargs)).eval()


def openmmlab(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OpenMMLab's names of the classifier: a backbone, whose last stage has the norm, and a head."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("norm.", "stages.3.norm.") if key.startswith("norm.") else key
        renamed[key.replace("head.", "head.fc.") if key.startswith("head.") else f"backbone.{key}"] = value
    return renamed


def merged(golden: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    branches = ("lkb_origin", "small_conv")
    return {k: v for k, v in golden["state"].items() if not any(b in k for b in branches)} | golden["merged_state"]


NAMINGS = {
    "reference": lambda golden: {"model": golden["state"], "optimizer": {"state": {}}, "epoch": 300},
    "bare": lambda golden: golden["state"],
    "data parallel": lambda golden: {"state_dict": {f"module.{k}": v for k, v in golden["state"].items()}},
    "mmpretrain": lambda golden: {"state_dict": openmmlab(golden["state"]), "meta": {"mmpretrain_version": "1.0"}},
    "merged": merged,
}


@pytest.mark.parametrize(
    ("naming", "suffix"), [*((naming, ".pth") for naming in NAMINGS), ("reference", ".safetensors")]
)
def test_every_published_naming_of_a_classifier(tmp_path: Path, naming: str, suffix: str) -> None:
    golden = load_golden("replknet_tiny")
    content, file = NAMINGS[naming](golden), tmp_path / f"published{suffix}"
    if suffix == ".pth":
        torch.save(content, file)
    else:
        save_file({key: value.contiguous() for key, value in content["model"].items()}, file)
    model = tiny()
    report = lk_hub.load_weights(model, file)
    assert report.missing == []
    assert_golden(model(golden["input"][""]), golden["output"]["logits"])


def test_a_classifier_into_an_encoder_and_into_other_classes(tmp_path: Path) -> None:
    golden = load_golden("replknet_tiny")
    torch.save({"state_dict": openmmlab(golden["state"])}, tmp_path / "published.pth")
    model = tiny(num_classes=3)
    before = model.head.fc.weight.clone()
    report = lk_hub.load_weights(model, tmp_path / "published.pth")
    assert "a classifier of 10 classes; the model keeps its own, of 3" in report.skipped
    assert torch.equal(model.head.fc.weight, before)
    encoder = smp.encoders.get_encoder("tu-replknet_31n", weights=None, **TINY).eval()
    lk_hub.load_weights(encoder, tmp_path / "published.pth")
    for level, features in enumerate(encoder(golden["input"][""])[2:]):
        assert_golden(features, golden["output"][f"features.{level}"])


def test_what_is_skipped_is_named(tmp_path: Path) -> None:
    golden = load_golden("replknet_tiny")
    file = tmp_path / "training.pth"
    state = golden["state"] | {"ema_backbone_stem": torch.ones(1)}
    torch.save({"model": state, "model_ema": {"a": torch.ones(1)}, "optimizer": {}, "epoch": 3, "args": "lr"}, file)
    encoder = smp.encoders.get_encoder("tu-replknet_31n", weights=None, **TINY)
    report = lk_hub.load_weights(encoder, file)
    assert report.skipped["optimizer state"] == ["optimizer"]
    assert report.skipped["EMA copy of the weights"] == ["model_ema", "ema_backbone_stem"]
    assert report.skipped["settings and counters of the training"] == ["epoch", "args"]
    elsewhere = next(keys for reason, keys in report.skipped.items() if reason.startswith("not part of this encoder"))
    assert {key.partition(".")[0] for key in elsewhere} == {"norm", "head"}
    assert len(report.loaded) + len(elsewhere) == len(golden["state"])
    text = str(report)
    assert f"{file}: {len(report.loaded)} tensors loaded" in text
    assert "skipped: model_ema, ema_backbone_stem: EMA copy of the weights" in text


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_input_channels_as_timm_does(tmp_path: Path, in_chans: int) -> None:
    source = timm.create_model("replknet_31n", **SMALL)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors")}
    expected = timm.create_model(
        "replknet_31n", pretrained=True, in_chans=in_chans, pretrained_cfg_overlay=overlay, **SMALL
    )
    for model in (
        timm.create_model("replknet_31n", in_chans=in_chans, **SMALL),
        smp.Unet("tu-replknet_31n", encoder_weights=None, in_channels=in_chans, **SMALL),
    ):
        report = lk_hub.load_weights(model, tmp_path / "w.safetensors")
        assert report.adapted == [f"stem.0.conv: from 3 to {in_chans} input channels"]
        weight = next(value for key, value in model.state_dict().items() if "stem" in key)
        assert torch.equal(weight, expected.stem[0].conv.weight)


class Detector(nn.Module):
    """The shape of torchvision's: the encoder is two levels down."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "body": timm.create_model("replknet_31n", features_only=True, **(SMALL | kwargs)),
                "fpn": nn.Conv2d(32, 8, 1),
            }
        )
        self.head = nn.Conv2d(8, 1, 1)


TARGETS = {
    "timm": lambda: timm.create_model("replknet_31n", num_classes=0, **SMALL),
    "smp encoder": lambda: smp.encoders.get_encoder("tu-replknet_31n", weights=None, **SMALL),
    "smp": lambda: smp.Unet("tu-replknet_31n", encoder_weights=None, classes=2, **SMALL),
    "task": lambda: SegmentationTask("unet", "replknet_31n", encoder_kwargs=SMALL, num_classes=2),
    "detector": Detector,
}


LAST_CONV = re.compile(r"stages[._](\d)\.blocks\.1\.pw2\.conv\.weight$")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", TARGETS)
def test_an_encoder_from_anything_into_anything(tmp_path: Path, source: str, target: str) -> None:
    torch.manual_seed(0)
    giver, taker = TARGETS[source](), TARGETS[target]()
    state = {key: value.clone() for key, value in giver.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    whole = source == target or {source, target} == {"smp", "task"}
    into = taker if whole or target not in ("smp", "task") else taker.encoder
    strict = target != "timm" or source == "timm"  # only a whole timm model has the norm before the classifier
    report = lk_hub.load_weights(into, tmp_path / "w.safetensors", strict=strict)
    given, taken = ({m[1]: v for k, v in s.items() if (m := LAST_CONV.search(k))} for s in (state, taker.state_dict()))
    assert given.keys() == taken.keys() == set("0123")
    assert all(torch.equal(given[stage], taken[stage]) for stage in taken)
    if whole:
        assert all(torch.equal(value, taker.state_dict()[k]) for k, value in taker.state_dict().items())
        assert len(report.loaded) == len(taker.state_dict())
    accounted = len(report.loaded) + sum(map(len, report.skipped.values()))
    assert accounted == len(state)


def meta_weights(name: str, source: str = "published.pth") -> Weights:
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in load_manifest(name)["state_dict"].items()}
    return Weights(state, {}, source, Path(source))


@pytest.mark.parametrize(
    ("manifest", "model", "expected"),
    [
        ("replknet_31l", "replknet_31b",
         r"'published\.pth' does not hold weights of 'replknet_31b': \d+ of another shape, "
         r"first \['stem\.0\.conv\.weight \(192, 3, 3, 3\) instead of \(128, 3, 3, 3\)'.*those of 'replknet_31l'"),
        ("replknet_31b", "replknet_13b", r"large_kernel.*31, 31\) instead of .*13, 13\).*those of 'replknet_31b'"),
        ("replknet_xl_backbone", "replknet_31b",
         r"missing in the file, first \['stages\.0\.blocks\.0\.large_kernel\.small.*"
         r"those of 'replknet_xl'"),
        ("upernet_replknet_31l_ade20k", "replknet_31b", r"those of 'replknet_31l'"),
    ],
)  # fmt: skip
def test_a_mismatch_names_the_first_keys_and_the_right_model(manifest: str, model: str, expected: str) -> None:
    with torch.device("meta"):
        target = timm.create_model(model)
    with pytest.raises(lk_hub.WeightMismatchError, match=expected):
        lk_hub.load_weights(target, meta_weights(manifest))


def test_weights_of_something_else_entirely() -> None:
    with pytest.raises(
        lk_hub.WeightMismatchError, match=r"missing in the file, first .*unexpected, first \['fc\.bias'\]"
    ):
        lk_hub.load_weights(
            timm.create_model("replknet_31n", **SMALL), Weights({"fc.bias": torch.ones(1)}, {}, "x.pth", Path("x.pth"))
        )
    with pytest.raises(lk_hub.WeightMismatchError, match=r"fc\.bias"):  # not even if little is asked
        lk_hub.load_weights(
            timm.create_model("replknet_31n", **SMALL),
            Weights({"fc.bias": torch.ones(1)}, {}, "x.pth", Path("x.pth")),
            False,
        )


def test_partial_loading_takes_what_fits(tmp_path: Path) -> None:
    source = timm.create_model("replknet_31n", **(SMALL | {"kernel_sizes": 5}))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = timm.create_model("replknet_31n", **SMALL)
    with pytest.raises(lk_hub.WeightMismatchError, match="of another shape"):
        lk_hub.load_weights(model, tmp_path / "w.safetensors")
    report = lk_hub.load_weights(model, tmp_path / "w.safetensors", strict=False)
    (kernels,) = (keys for reason, keys in report.skipped.items() if reason.startswith("of another shape"))
    assert len(kernels) == 4
    assert all(key.endswith("large_kernel.large.conv.weight") for key in kernels)
    assert torch.equal(model.stem[0].conv.weight, source.stem[0].conv.weight)


PUBLISHED = {
    "31b_ade20k": ("replknet_31b", {}),
    "31b_cityscapes": ("replknet_31b", {}),
    "31l_ade20k": ("replknet_31l", {}),
    "xl_ade20k": ("replknet_xl", {"norm_features": True}),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("auxiliary_weight", [0.4, 0.0])
def test_every_key_of_the_published_segmentation_models(name: str, auxiliary_weight: float) -> None:
    encoder, kwargs = PUBLISHED[name]
    weights = meta_weights(f"upernet_replknet_{name}")
    num_classes = len(weights.state_dict["decode_head.conv_seg.bias"])
    with torch.device("meta"):
        task = SegmentationTask(
            "upernet_openmmlab",
            encoder,
            encoder_kwargs=kwargs,
            num_classes=num_classes,
            auxiliary_weight=auxiliary_weight,
        )
    report = lk_hub.load_weights(task, weights)
    assert set(report.loaded) == task.state_dict().keys()
    skipped = [key for keys in report.skipped.values() for key in keys]
    assert len(skipped) == (0 if auxiliary_weight else 8)
    assert len(report.loaded) + len(skipped) == len(weights.state_dict)


@pytest.mark.parametrize("head", ["upernet_tiny", "upernet_tiny_align_corners"])
def test_a_whole_published_segmentation_model(tmp_path: Path, head: str) -> None:
    backbone, heads = load_golden("replknet_tiny"), load_golden(head)
    state = {f"backbone.{k}": v for k, v in backbone["state"].items() if not k.startswith(("head.", "norm."))}
    file = tmp_path / "upernet.pth"
    torch.save({"state_dict": state | heads["state"], "meta": {"epoch": 1}, "optimizer": {}}, file)
    task = SegmentationTask(
        "upernet_openmmlab",
        "replknet_31n",
        encoder_kwargs=TINY,
        architecture_kwargs={"decoder_channels": 16, "align_corners": "align" in head},
        num_classes=7,
        auxiliary_weight=0.4,
        auxiliary_channels=8,
    ).eval()
    report = lk_hub.load_weights(task, file)
    assert len(report.loaded) == len(state | heads["state"])
    for level, features in enumerate(task.encoder(backbone["input"][""])[2:]):
        assert_golden(features, backbone["output"][f"features.{level}"])
    maps = [heads["input"][key] for key in sorted(heads["input"])]
    logits = task.model.segmentation_head(task.model.decoder([torch.empty(0), torch.empty(0), *maps]))
    names = {name: value for name, value in heads["output"].items() if value.shape == logits.shape}
    assert any((logits - value).abs().max() <= 2e-5 * value.abs().max() for value in names.values()), list(names)
    auxiliary = task.auxiliary_head(maps[2])
    names = {name: value for name, value in heads["output"].items() if value.shape == auxiliary.shape}
    assert any((auxiliary - value).abs().max() <= 2e-5 * value.abs().max() for value in names.values())


def published_detector(fixture: str, part: str) -> dict[str, torch.Tensor]:
    """A whole OpenMMLab detector on the tiny RepLKNet: the golden backbone under golden pyramid and heads."""
    backbone = load_golden("replknet_tiny")["state"]
    state = {f"backbone.{k}": v for k, v in backbone.items() if not k.startswith(("head.", "norm."))}
    heads = load_golden(fixture)["state"]
    assert any(key.startswith(part) for key in heads)
    return state | heads


def test_published_cascade_into_a_task(tmp_path: Path) -> None:
    state = published_detector("cascade_tiny", "roi_head.mask_head.")
    weights = Weights(state, {}, "cascade.pth", Path("cascade.pth"))
    arguments = {"encoder_kwargs": TINY, "architecture_kwargs": {"fpn_channels": 16, **CASCADE_TINY}, "num_classes": 5}
    task = DetectionTask("cascade_mask_rcnn", "replknet_31n", **arguments).eval()
    report = lk_hub.load_weights(task, weights)
    assert not report.missing
    assert not report.skipped
    assert torch.equal(task.model.backbone.state_dict()["encoder.model.stem_0.conv.weight"], state[FIRST_CONV])
    ours = task.model.roi_heads.stages[2].box_predictor.cls_score.bias
    assert torch.equal(ours.roll(-1, dims=0), state["roi_head.bbox_head.2.fc_cls.bias"])  # the background comes first

    without = DetectionTask("cascade_rcnn", "replknet_31n", **arguments)
    report = lk_hub.load_weights(without, weights)
    assert sorted(key for keys in report.skipped.values() for key in keys) == sorted(
        key for key in state if ".mask_head." in key
    )
    # a whole one goes nowhere else, but its backbone does
    encoder = smp.encoders.get_encoder("tu-replknet_31n", weights=None, **TINY)
    report = lk_hub.load_weights(encoder, weights)
    assert set(next(iter(report.skipped.values()))) == {key for key in state if not key.startswith("backbone.")}
    task = SegmentationTask("unet", "replknet_31n", encoder_kwargs=TINY, num_classes=2)
    with pytest.raises(
        lk_hub.WeightMismatchError, match=r"whole OpenMMLab model.*'(neck|rpn_head|roi_head)\..*load_weights\(model"
    ):
        lk_hub.load_weights(task, weights)


def test_full_size_detectors_are_told_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "published.pth").touch()  # it is looked up by its checksum
    for manifest, expected in (
        ("cascade_replknet_31b_coco", ("cascade_mask_rcnn", "replknet_31b", 80)),
        ("fcos_replknet_31b_coco", ("fcos", "replknet_31b", 80)),
        ("cascade_unireplknet_t_coco", ("cascade_mask_rcnn", "unireplknet_t", 80)),
        ("cascade_slak_tiny_coco", ("cascade_mask_rcnn", "slak_tiny", 80)),
    ):
        shapes = load_manifest(manifest)["state_dict"]
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        with torch.device("meta"):
            task = build_model(Weights(state, {}, "published.pth", tmp_path / "published.pth"))
        assert isinstance(task, DetectionTask)
        assert tuple(task.hparams[key] for key in ("architecture", "encoder", "num_classes")) == expected
        renamed, origins = follow(partial(openmmlab_state_dict, task), state)
        assert renamed.keys() == task.state_dict().keys()
        assert {key: v.shape for key, v in renamed.items()} == {k: v.shape for k, v in task.state_dict().items()}
        assert set().union(*origins.values()) == state.keys()


@pytest.mark.parametrize("architecture", ["cascade_mask_rcnn", "fcos"])
def test_a_detection_task_comes_back_from_its_repository(tmp_path: Path, architecture: str) -> None:
    torch.manual_seed(0)
    names = ("score_thresh", "detections_per_img")
    names = names if architecture == "fcos" else tuple(f"box_{name}" for name in names)
    task = DetectionTask(
        architecture, "replknet_31n", encoder_kwargs=SMALL, num_classes=3, min_size=64, max_size=96,
        architecture_kwargs=dict(zip(names, (0.0, 5), strict=True)),
    ).eval()  # fmt: skip
    folder = lk_hub.push(task, "me/detector", folder=tmp_path / "detector", dry_run=True)
    again = lk_hub.load_model(folder)
    assert isinstance(again, DetectionTask)
    image = torch.rand(3, 64, 80)
    (expected,), (actual,) = task([image]), again([image])
    assert expected.keys() == actual.keys()
    assert len(expected["boxes"])
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
    assert "object-detection" in (tmp_path / "detector" / "README.md").read_text()


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    golden = load_golden("replknet_tiny")
    torch.save({"model": golden["state"], "optimizer": {}}, "published.pth")
    kwargs = '{"depths": [1, 1, 2, 1], "channels": [8, 16, 32, 64]}'
    main(["convert", "published.pth", "--model", "replknet_31n", "--model-kwargs", kwargs, "--license", "mit"])
    out = capsys.readouterr().out
    assert "published.pth: 297 tensors loaded" in out
    assert "skipped: optimizer: optimizer state" in out
    assert_golden(lk_hub.load_model("published")(golden["input"][""]), golden["output"]["logits"])
    card = Path("published/README.md").read_text()
    assert "license: mit" in card
    assert "Converted from `published.pth`, SHA-256" in card


def test_convert_tells_the_model_by_its_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    architecture = {"decoder_channels": 8, "align_corners": True}
    source = SegmentationTask(num_classes=19, architecture_kwargs=architecture)
    renamed = {}  # back to OpenMMLab's names, for a model as its training would have left it
    for key, value in source.model.state_dict().items():
        if key.startswith("encoder."):
            key = key.replace("encoder.model.stages_", "backbone.stages.").replace(
                "encoder.model.stem_", "backbone.stem."
            )
            renamed[key] = value
        else:
            key = key.replace("segmentation_head.0.", "decode_head.conv_seg.").replace(
                "decoder.fusion.", "decoder.fpn_bottleneck."
            )
            key = key.replace("decoder.pyramid_pooling.branches.", "decode_head.psp_modules.")
            key = key.replace("decoder.pyramid_pooling.", "decode_head.").replace("decoder.", "decode_head.")
            renamed[key] = value

    def block(key: str) -> str:
        if not key.startswith("decode_head.") or "conv_seg" in key:
            return key
        head, part, rest = re.fullmatch(r"(.*)\.([01])\.(\w+)", key).groups()
        return f"{head}.{'conv' if part == '0' else 'bn'}.{rest}"

    torch.save({"state_dict": {block(key): value for key, value in renamed.items()}}, tmp_path / "upernet.pth")
    main(["convert", str(tmp_path / "upernet.pth")])
    task = lk_hub.load_model(tmp_path / "upernet")
    assert task.hparams["encoder"] == "replknet_31n"
    assert task.align_corners  # 19 classes: Cityscapes
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(task(x), source.eval()(x))


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        ({"a": torch.ones(2)}, [], "does not say what model it is of, and it fits none of our encoders"),
        ({"a": torch.ones(2)}, ["--model", "replknet_31n"], "does not hold weights of 'replknet_31n'"),
        ({"a": 3}, [], "holds no tensors by name"),
        ([1], [], "holds a list, not weights by name"),
        ({"a": torch.ones(2)}, ["--model-kwargs", "kernel_sizes=7"], "JSON is expected"),
        ({"a": torch.ones(2)}, ["--metric", "good"], "NAME=VALUE with a number is expected"),
    ],
)
def test_convert_refuses_with_one_error(
    tmp_path: Path, content: object, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "x.pth"), *args])
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("x")] == ["x.pth"]


def test_a_tensor_under_two_names_is_accounted_for_by_name() -> None:
    torch.manual_seed(0)
    giver = SegmentationTask("unet", "replknet_31n", encoder_kwargs=SMALL, num_classes=2)
    taker = smp.Unet("tu-replknet_31n", encoder_weights=None, classes=2, **SMALL)
    state = dict(giver.state_dict())
    state["teacher.bias"] = state["model.segmentation_head.0.bias"]  # the same tensor, which the model has no place for
    report = lk_hub.load_weights(taker, Weights(state, {}, "w.pth", Path("w.pth")))
    assert "teacher.bias" in report.skipped["the model has no such part"]
    assert len(report.loaded) + sum(map(len, report.skipped.values())) == len(state)


@pytest.mark.parametrize(
    ("manifest", "classes"),
    [("replknet_xl_backbone", 0), ("replknet_31b", 1000), ("unireplknet_a_backbone", 0), ("slak_small_backbone", 0)],
)
def test_the_family_says_what_a_checkpoint_needs(manifest: str, classes: int, tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()  # it is looked up by its checksum
    shapes = load_manifest(manifest)["state_dict"]
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with torch.device("meta"):
        model = build_model(Weights(state, {}, "w.pth", tmp_path / "w.pth"))
    assert model.num_classes == classes
    assert (model.feature_norms is not None) is manifest.endswith("_backbone")
    renamed, origins = follow(lambda named: translate(named, model), state)
    assert renamed.keys() <= model.state_dict().keys()
    assert set().union(*origins.values()) == state.keys()


@pytest.mark.parametrize("container", ["timm", "timm features", "smp", "smp by our name"])
@pytest.mark.parametrize("around", ["", "backbone.", "model.encoder.", "net.body."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_one_translation_for_every_container(container: str, around: str, wrapper: str | None) -> None:
    """Out of whatever is around them, published names reach every container of an encoder alike."""
    name, kwargs = "replknet_31n", {} if container == "smp by our name" else SMALL
    containers = {
        "timm": lambda: timm.create_model(name, num_classes=0, **kwargs),
        "timm features": lambda: timm.create_model(name, features_only=True, **kwargs),
        "smp": lambda: smp.encoders.get_encoder(f"tu-{name}", weights=None, **kwargs),
        "smp by our name": lambda: smp.encoders.get_encoder(name, weights=None),
    }
    source = timm.create_model(name, num_classes=0, **kwargs)
    own = {key: value for key, value in source.state_dict().items() if not key.startswith("norm.")}
    published = {reference(key): value for key, value in own.items()}
    state: dict = {around + key: value for key, value in (own if around == "net.body." else published).items()}
    content = state if wrapper is None else {wrapper: state}
    encoder = containers[container]()
    renamed = translate(content, encoder)
    assert len(renamed) == len(state)
    assert renamed.keys() <= encoder.state_dict().keys()
    if container == "smp by our name":
        encoder.load_state_dict(content)  # smp's own way is the same one
        assert all(torch.equal(encoder.state_dict()[key], value) for key, value in renamed.items())


def reference(key: str) -> str:
    """The authors' name of one of our keys."""
    key = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"transitions.{int(m[1]) - 1}.", key)
    norm = {0: ".prelkb_bn.", 1: ".preffn_bn."}
    key = re.sub(r"(\.blocks\.(\d+))\.norm\.", lambda m: m[1] + norm[int(m[2]) % 2], key)
    return key.replace(".large_kernel.large.", ".large_kernel.lkb_origin.").replace(
        ".large_kernel.small.", ".large_kernel.small_conv."
    )
