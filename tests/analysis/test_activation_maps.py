"""Class activation maps and feature pyramids: the numbers are the grad-cam package's, and the model is left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from lk_backbones.analysis import activation_maps, feature_pyramid
from lk_backbones.analysis.activation_maps import METHODS
from lk_backbones.analysis.features import mean_magnitude, principal_colors
from lk_backbones.cli import main
from lk_backbones.tasks import DetectionTask, SegmentationTask

pytest.importorskip("pytorch_grad_cam", reason='grad-cam is not installed: pip install "lk-backbones[analysis]"')

SMALL = {"kernel_sizes": 3}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("replknet_31n", num_classes=7, **SMALL).eval()


@pytest.fixture(scope="module")
def segmentation() -> SegmentationTask:
    torch.manual_seed(0)
    window = {"inference": "slide", "slide_crop": (32, 32), "slide_stride": (16, 16)}
    return SegmentationTask("fpn", "replknet_31n", encoder_kwargs=SMALL, num_classes=9, **window).eval()


@pytest.mark.parametrize("method", METHODS)
def test_classifiers_agree_with_the_package(method: str, classifier: nn.Module, images: torch.Tensor) -> None:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    found = activation_maps(classifier, images, 4, 2, method)
    assert found[0].module == "stages.1"  # level 0 is the stem
    with getattr(pytorch_grad_cam, METHODS[method])(classifier, [classifier.get_submodule("stages.1")]) as cam:
        expected = cam(images, [ClassifierOutputTarget(4)] * 2)
    assert expected.max() > 0.9
    np.testing.assert_allclose(np.stack([one.matrix for one in found]), expected, atol=1e-3)
    if method != "eigencam":
        assert found[1].score == pytest.approx(classifier(images)[1, 4].item(), abs=1e-5)


def test_segmentation_agrees_with_the_package(segmentation: SegmentationTask, images: torch.Tensor) -> None:
    from pytorch_grad_cam import LayerCAM
    from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget

    (found,) = activation_maps(segmentation, images[:1], level=2, method="layercam")
    x = segmentation.normalize(images[:1])
    with torch.inference_mode():
        logits = segmentation.model(x)[0]
    chosen = int(logits.argmax(0).flatten().mode().values)
    mask = (logits.argmax(0) == chosen).float().numpy()
    with LayerCAM(segmentation.model, [segmentation.get_submodule(found.module)]) as cam:
        expected = cam(x, [SemanticSegmentationTarget(chosen, mask)])[0]
    assert (found.target, found.everywhere) == (chosen, False)
    np.testing.assert_allclose(found.matrix, expected, atol=1e-3)


def test_what_is_padded_is_no_part_of_the_map(segmentation: SegmentationTask, images: torch.Tensor) -> None:
    (odd,) = activation_maps(segmentation, images[:1, :, :40, :70], 3, method="hirescam")
    assert odd.matrix.shape == (40, 70)
    assert odd.map_size == (2, 3)  # of 64 × 96
    nowhere = int((segmentation(images[:1])[0].argmax(0).flatten().bincount(minlength=9) == 0).nonzero()[0])
    assert activation_maps(segmentation, images[:1], nowhere)[0].everywhere


def test_the_score_of_a_box_is_explained() -> None:
    torch.manual_seed(0)
    options = {"fpn_channels": 16, "score_thresh": 0.0}
    task = DetectionTask(
        "fcos",
        "replknet_31n",
        encoder_kwargs=SMALL,
        num_classes=3,
        min_size=64,
        max_size=128,
        architecture_kwargs=options,
    ).eval()
    image = torch.rand(1, 3, 40, 60)
    (best,) = activation_maps(task, image, level=1, method="layercam")
    detected = task(list(image))[0]
    assert best.box == pytest.approx(detected["boxes"][0].tolist(), abs=1e-3)
    assert (best.target, best.score) == (
        int(detected["labels"][0]),
        pytest.approx(float(detected["scores"][0]), abs=1e-5),
    )
    assert best.matrix.shape == (40, 60)
    assert np.isfinite(best.matrix).all()
    with pytest.raises(ValueError, match="there is no box 100000: "):
        activation_maps(task, image, box=100_000)
    assert activation_maps(task, image, method="eigencam")[0].target is None


def test_the_model_is_left_as_it_was(images: torch.Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).train()
    model(images).sum().backward()
    before = {name: (p.clone(), p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    random = torch.get_rng_state()
    activation_maps(model, images, level="0", method="gradcam++")  # what follows changes the map in place
    assert all(module.training for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    for name, p in model.named_parameters():
        assert p.requires_grad
        assert torch.equal(p, before[name][0])
        assert torch.equal(p.grad, before[name][1])
    assert not model[0]._forward_hooks


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(self.conv(x)))


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (Twice(), {"level": "conv"}, "calls this module 2 times"),
        (Twice(), {"level": "output"}, "an activation map is of a map inside the model"),
        (Twice(), {"level": "conf"}, "has no module of this path, it consists of 'conv', 'head'"),
        (Twice(), {"target": 2}, "there is no class 2: Twice has 2, from 0"),
        (Twice(), {"method": "cam"}, "method 'cam': there are gradcam, gradcam\\+\\+, hirescam"),
        (Twice(), {"level": "head", "method": "eigencam"}, "at most 4096 positions, 'head' has 64 × 96"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64 * 96 * 3, 3)), {}, "has no spatial maps"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0)), {"level": "0"}, "gives no answer to be explained"),
        (nn.Conv2d(3, 3, 3, device="meta"), {}, "is on the meta device"),
    ],
)
def test_what_cannot_be_looked_at(
    model: nn.Module, options: dict[str, object], words: str, images: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=words):
        activation_maps(model, images, **options)


def test_levels_whose_channels_come_last_and_tokens(images: torch.Tensor) -> None:
    swin = torchvision.models.swin_t(weights=None, num_classes=3)
    block = activation_maps(swin, images[:1], 0, "features.1")
    assert block[0].matrix.shape == (64, 96)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), depth=1)
    with pytest.raises(ValueError, match="is not what one of its modules returns: give the path"):
        activation_maps(vit, images)


class Computed(nn.Module):
    """A level that no module returns, in memory that was a module's map of the same size."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 2, 1)
        self.steps = steps

    def forward_intermediates(self, x: torch.Tensor, **_: object) -> list[torch.Tensor]:
        y = self.conv(x)
        if self.steps == 0:
            return [y.mul_(2)]
        for _ in range(self.steps):  # the memory of the convolution's map is free from the first step on
            y = y * 2
        return [y]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_intermediates(x)[0])


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_level_is_not_a_map_that_lay_in_the_same_memory(steps: int, images: torch.Tensor) -> None:
    kept: list[torch.Tensor] = []
    for i in range(40 if steps else 1):  # the allocator decides which memory is used again
        kept.append(torch.rand(1, 16, 4, 6)) if i % 5 else kept.clear()
        with pytest.raises(ValueError, match=r"is not what one of its modules returns.* same size are those of 'conv'"):
            activation_maps(Computed(steps), images[:1, :, :4, :6])


# ---- features ----


def test_principal_colors_are_those_of_a_plane() -> None:
    ramp = torch.linspace(-1, 1, 40)
    features = torch.zeros(6, 10, 40)
    features[2] += 3 * ramp  # the first component: from left to right
    features[4] += torch.linspace(-1, 1, 10)[:, None]  # the second, from the top to the bottom
    colors = principal_colors(features).astype(int)
    assert (np.diff(colors[5, :, 0]) >= 0).all()
    assert colors[5, 0, 0] == 0
    assert colors[5, -1, 0] == 255
    assert (np.diff(colors[:, 5, 1]) >= 0).all()
    assert np.ptp(colors[:, :, 2]) == 0  # there is no third
    wide = torch.cat([features, torch.zeros(500, 10, 40)])  # more channels than positions
    np.testing.assert_array_equal(principal_colors(wide)[..., :2], colors[..., :2])


def test_a_pyramid_is_what_the_encoder_gives(segmentation: SegmentationTask, images: torch.Tensor) -> None:
    pyramid = feature_pyramid(segmentation, images[0])
    with torch.inference_mode():
        expected = [m for m in segmentation.encoder(segmentation.normalize(images[:1]))[1:] if m.shape[1]]
    for found, wanted in zip(pyramid.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted[0])
    magnitude = mean_magnitude(pyramid["1"])
    assert magnitude.max() == 1
    with pytest.raises(ValueError, match="has no spatial maps"):
        feature_pyramid(nn.Flatten(), images[0])


# ---- commands ----


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit):
        main([*args])
    return " ".join(capsys.readouterr().err.split())


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)).save("a.png")
    model = ["--model", "replknet_31n,kernel_sizes=3,num_classes=3", "--size", "64"]
    main(["cam", "a.png", *model, "--class", "class_2", "--method", "layercam", "--with-erf"])
    assert "a.png: layercam for 'class_2', logit " in capsys.readouterr().out
    assert np.load("cam/a.npy").shape == (64, 64)
    assert Image.open("cam/a.png").width > 3 * 320
    before = Path("cam/a.npy").read_bytes()
    assert "cam/a.png and 1 more exists: choose another folder" in refused(capsys, "cam", "a.png", *model)
    assert Path("cam/a.npy").read_bytes() == before
    main(["features", "a.png", *model, "--show", "mean"])
    assert "0 (32×32, 32 channels), 1 (16×16" in capsys.readouterr().out
    assert Image.open("features/a.png").width > 4 * 280
    to = ["--to", "new"]
    assert "empty holds no pictures" in refused(capsys, "cam", "empty", *model, *to)
    assert "The image b.png does not exist" in refused(capsys, "features", "b.png", *model, *to)
    assert "broken.png" in refused(capsys, "cam", "broken.png", *model, *to)
    assert "has no class 'clas_2'; did you mean 'class_2'" in refused(
        capsys, "cam", "a.png", *model, *to, "--class", "clas_2"
    )
    assert "level 9: RepLKNet has the levels 0 (32 × 32)" in refused(
        capsys, "cam", "a.png", *model, *to, "--level", "9"
    )
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    assert 'pip install "lk-backbones[analysis]"' in refused(capsys, "cam", "a.png", *model, *to)
    assert not Path("new").exists()
