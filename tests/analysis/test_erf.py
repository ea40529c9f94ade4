"""The effective receptive field: by hand, beside the authors' script, of every kind of model, in a training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from safetensors import safe_open
from torch import nn

import lk_backbones
from lk_backbones.analysis import area_ratios, effective_receptive_field
from lk_backbones.analysis import memory as memory_module
from lk_backbones.analysis.memory import needed_memory, require_memory
from lk_backbones.analysis.pictures import folder_pictures, noise_pictures, scene_pictures
from lk_backbones.encoders.replknet import RepLKNet, checkpoint_filter_fn
from lk_backbones.tasks import DetectionTask, SegmentationTask
from tests.conftest import FIXTURES, load_golden
from tests.encoders.test_replknet import TINY


def ones(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    nn.init.ones_(conv.weight)
    return conv


# ---- by hand ----


def test_stack_of_boxes_is_their_convolution() -> None:
    model = nn.Sequential(ones(3, 2, 3), ones(2, 2, 5), ones(2, 1, 3))
    field = effective_receptive_field(model, torch.rand(2, 3, 16, 21))
    line = np.convolve(np.convolve(np.ones(3), np.ones(5)), np.ones(3))  # 9 long
    expected = np.zeros((16, 21))
    # one path for every pair of hidden channels; three colours
    expected[8 - 4 : 8 + 5, 10 - 4 : 10 + 5] = 3 * 2 * 2 * np.outer(line, line)
    np.testing.assert_allclose(field.contribution, expected, rtol=1e-6)
    logarithm = np.log10(1 + expected)
    np.testing.assert_allclose(field.matrix, logarithm / logarithm.max(), rtol=1e-6)
    assert (field.map_size, field.num_images, field.level) == ((16, 21), 2, "level 0, 2")
    assert field.ratios == area_ratios(field.matrix)
    assert field.ratios[0.99] == 81 / (16 * 21)


def test_strides_shift_the_centre_as_published() -> None:
    """Of a map of 4 x 4 the centre is (2, 2), which a stride of 4 puts to 8 of 16, and 3 × 3 ones around it."""
    field = effective_receptive_field(ones(1, 1, 3, stride=4), torch.rand(1, 1, 16, 16))
    expected = np.zeros((16, 16))
    expected[7:10, 7:10] = 1
    np.testing.assert_array_equal(field.contribution, expected)
    assert field.map_size == (4, 4)


def test_without_relu_nothing_is_cut_off() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    conv.weight.data = torch.tensor([[[[1.0, -2, 0], [0, 3, 0], [0, 0, -4]]]])
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 1  # so that the output is positive
    cut = effective_receptive_field(conv, image).contribution[1:4, 1:4]
    whole = effective_receptive_field(conv, image, relu=False).contribution[1:4, 1:4]
    np.testing.assert_array_equal(cut, [[1, 0, 0], [0, 3, 0], [0, 0, 0]])
    np.testing.assert_array_equal(whole, [[1, 2, 0], [0, 3, 0], [0, 0, 4]])
    # a negative output is cut off with all that it depends on
    dead = effective_receptive_field(conv, -image)
    assert not dead.contribution.any()
    assert not dead.matrix.any()
    assert np.isnan(list(dead.ratios.values())).all()
    assert effective_receptive_field(conv, -image, relu=False).contribution.any()


def test_images_are_averaged_and_those_without_finite_gradients_skipped() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.detach().amax()

    images = torch.stack([torch.full((1, 4, 4), value) for value in (1.0, float("inf"), 3.0, 8.0)])
    field = effective_receptive_field(Scaled(), iter(images), num_images=2)
    assert (field.contribution[2, 2], field.num_images, field.num_skipped) == (2.0, 2, 1)
    with pytest.raises(ValueError, match="gradients of all 1 images are infinite or not a number"):
        effective_receptive_field(Scaled(), images[1:2])


# ---- the authors' script ----


def test_same_numbers_as_the_authors_script() -> None:
    """Made by RLK's visualize_erf.py and analyze_erf.py (functions get_input_grad, get_rectangle) from this model."""
    model = RepLKNet(**TINY, num_classes=10)
    model.load_state_dict(checkpoint_filter_fn(load_golden("replknet_tiny")["state"], model))
    numbers = torch.arange(2 * 3 * 128 * 128)
    images = ((numbers * 7919 + numbers // 128 * 104729) % 33 - 16).float().div(16).view(2, 3, 128, 128)
    with safe_open(FIXTURES / "erf_replknet_tiny.safetensors", "np") as file:
        expected, ratios = file.get_tensor("contribution"), json.loads(file.metadata()["ratios"])
    for options in ({}, {"gradient_checkpointing": True}, {"level": "stages.3"}):
        field = effective_receptive_field(model, images, **options)
        np.testing.assert_allclose(field.contribution, expected, rtol=0, atol=2e-5 * expected.max())
        assert field.ratios == {float(share): area for share, area in ratios.items()}


# ---- areas ----


def by_hand(matrix: np.ndarray, threshold: float) -> float:
    """Grow a square around the centre until it holds more than the share."""
    height, width = matrix.shape
    for reach in range(max(height, width)):
        rows = [i for i in range(height) if abs(i - height // 2) <= reach]
        columns = [j for j in range(width) if abs(j - width // 2) <= reach]
        if matrix[np.ix_(rows, columns)].sum() > threshold * matrix.sum() or (len(rows), len(columns)) == matrix.shape:
            return len(rows) * len(columns) / matrix.size
    raise AssertionError


@pytest.mark.parametrize("shape", [(7, 7), (8, 8), (9, 4), (6, 11), (1, 1), (1, 6), (2, 2)])
def test_areas_by_hand(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).random(shape) ** 3
    thresholds = (0.0, 0.2, 0.5, 0.9, 0.999)
    assert area_ratios(matrix, thresholds) == pytest.approx({t: by_hand(matrix, t) for t in thresholds}, rel=1e-12)


def test_areas_of_matrices_that_everybody_can_count() -> None:
    point = np.zeros((8, 8))
    point[4, 4] = 5
    assert area_ratios(point) == dict.fromkeys((0.2, 0.3, 0.5, 0.99), 1 / 64)
    corner = np.zeros((8, 8))  # row 0 is in no centred square of an even matrix but the whole
    corner[0, 0] = 5
    assert area_ratios(corner) == dict.fromkeys((0.2, 0.3, 0.5, 0.99), 1.0)
    even = np.ones((5, 5))
    assert area_ratios(even, [0.03, 0.04, 0.36, 0.37]) == {0.03: 1 / 25, 0.04: 9 / 25, 0.36: 1.0, 0.37: 1.0}
    assert np.isnan(list(area_ratios(np.zeros((4, 6))).values())).all()


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.array([[0, np.nan]]), "negative, infinite or not a number"),
        (np.array([[0, np.inf]]), "negative, infinite or not a number"),
        (np.array([[1.0, -1e-9]]), "negative, infinite or not a number"),
        (np.zeros((0, 3)), r"\(0, 3\)"),
        (np.zeros(3), r"\(3,\)"),
    ],
)
def test_matrices_that_have_no_areas(matrix: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        area_ratios(matrix)


def test_thresholds_are_shares() -> None:
    with pytest.raises(ValueError, match="shares of the sum"):
        area_ratios(np.ones((3, 3)), [1.0])


# ---- models of every kind ----


def segmentation_task(**arguments: Any) -> SegmentationTask:
    kwargs = {"kernel_sizes": 3, "drop_path_rate": 0.2}
    return SegmentationTask("fpn", "replknet_31n", encoder_kwargs=kwargs, num_classes=3, **arguments)


def detector(name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, weights_backbone=None)


MODELS = {
    "timm": (lambda: timm.create_model("resnet18", zero_init_last=False), 2),
    "ours": (lambda: timm.create_model("replknet_31n", kernel_sizes=3), 2),
    "features only": (lambda: timm.create_model("convnext_atto", features_only=True), 2),
    "vision transformer": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), 4),
    "torchvision": (lambda: torchvision.models.resnet18(), 2),
    "torchvision, channels last": (lambda: torchvision.models.convnext_tiny(), 2),
    "torchvision segmentation": (lambda: detector("lraspp_mobilenet_v3_large"), 4),
    "torchvision detection": (lambda: detector("ssdlite320_mobilenet_v3_large"), 1),
    "smp encoder": (lambda: smp.encoders.get_encoder("mit_b0", weights=None), 2),
    "smp": (lambda: smp.Unet("resnet18", encoder_weights=None), 2),
    "segmentation task": (segmentation_task, 2),
    "sliding windows": (lambda: segmentation_task(inference="slide", slide_crop=(32, 32), slide_stride=(16, 16)), 2),
    "detection task": (lambda: DetectionTask("fcos", "replknet_31n", encoder_kwargs={"kernel_sizes": 3}), 2),
    "bare convolutions": (lambda: nn.Sequential(ones(3, 2, 3, 2), nn.ReLU(inplace=True), ones(2, 2, 3, 2)), 16),
}


@pytest.fixture(scope="module", params=MODELS)
def any_model(request: pytest.FixtureRequest) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    make, side = MODELS[request.param]
    return make(), side


def test_any_model_is_measured_and_left_as_it_was(any_model: tuple[nn.Module, int]) -> None:
    model, side = any_model
    model.train()
    next(model.children()).eval()  # as a frozen part is
    parameter = next(model.parameters())
    parameter.requires_grad_(False)
    for other in list(model.parameters())[1:]:
        other.grad = torch.full_like(other, 0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    image, generator = torch.rand(1, 3, 64, 64), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # as in a callback of a validation
        field = effective_receptive_field(model, image)
    assert field.map_size == (side, side)
    assert field.contribution.shape == (64, 64)
    assert field.contribution.max() > 0
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert parameter.grad is None
    assert all((p.grad == 0.5).all() for p in list(model.parameters())[1:])
    assert not any(module._forward_hooks for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    np.testing.assert_array_equal(effective_receptive_field(model, image).contribution, field.contribution)
    parameter.requires_grad_(True)


def test_every_level_says_how_large_it_is() -> None:
    model = timm.create_model("replknet_31n", kernel_sizes=3)
    image = torch.rand(3, 64, 96)
    for level, side in enumerate((32, 16, 8, 4, 2)):
        sizes = [effective_receptive_field(model, [image], index).map_size for index in (level, level - 5)]
        assert sizes == [(side, side * 3 // 2)] * 2
    assert effective_receptive_field(model, image[None], "stages.1.blocks.0").map_size == (8, 12)


@pytest.mark.parametrize("name", ["replknet_31n", "tu-convnext_atto"])
def test_levels_of_smp_are_numbered_as_those_of_timm(name: str) -> None:
    """The image and the empty map in front of a patch stem, which smp's encoders return too, are none."""
    encoder = smp.encoders.get_encoder(name, weights=None)
    alone = timm.create_model(name.removeprefix("tu-"))
    for level in range(len(alone.feature_info)):
        fields = [effective_receptive_field(model, torch.rand(1, 3, 64, 64), level) for model in (encoder, alone)]
        assert fields[0].map_size == fields[1].map_size
        assert {field.level for field in fields} == {f"level {level}"}


def test_a_task_is_measured_on_normalised_images() -> None:
    """As its encoder alone is, whatever else the task does; its logits through all of it."""
    task = segmentation_task(mean=[0.2, 0.4, 0.6], std=[0.1, 0.2, 0.3]).eval()
    image = torch.rand(1, 3, 64, 64)
    own, alone = (
        effective_receptive_field(model, images).contribution
        for model, images in ((task, image), (task.encoder, task.normalize(image)))
    )
    np.testing.assert_array_equal(own, alone)
    of_path = effective_receptive_field(task, image, "model.encoder.model.stages_3")
    np.testing.assert_array_equal(of_path.contribution, alone)
    logits = effective_receptive_field(task, image, "output")
    x = task.normalize(image).requires_grad_()
    task.model(x)[:, :, 32, 32].relu().sum().backward()
    assert logits.map_size == (64, 64)
    expected = x.grad.relu().sum((0, 1)).numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(logits.contribution, expected, rtol=0, atol=1e-5 * expected.max())


def test_outputs_of_several_maps_are_chosen_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = ones(1, 1, 3), ones(1, 1, 5)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"out": self.small(x), "aux": [self.large(x), x.mean()]}

    image = torch.rand(1, 1, 9, 9)
    assert effective_receptive_field(Two(), image, "output.out").contribution.sum() == 9
    assert effective_receptive_field(Two(), image, "output.aux.0").contribution.sum() == 25
    with pytest.raises(ValueError, match=r"'output\.out', 'output\.aux\.0'"):
        effective_receptive_field(Two(), image, "output")


def test_activations_in_place_do_not_change_a_layer_before_them() -> None:
    conv = nn.Conv2d(1, 1, 1)
    nn.init.constant_(conv.weight, -1.0)
    model = nn.Sequential(conv, nn.ReLU(inplace=True))
    of_conv = effective_receptive_field(model, torch.ones(1, 1, 5, 5), "0", relu=False)
    assert of_conv.contribution[2, 2] == 1  # what comes after would be 0


def test_folded_packed_compiled_and_wrapped_models_have_the_same_field() -> None:
    torch.manual_seed(0)
    model = timm.create_model("replknet_31n", kernel_sizes=5).eval()
    image = torch.rand(1, 3, 64, 64)
    expected = effective_receptive_field(model, image).contribution
    folded = lk_backbones.reparameterize(copy.deepcopy(model))
    packed = lk_backbones.prepack_weights(copy.deepcopy(folded))
    for other in (folded, packed, torch.compile(model, backend="eager"), nn.DataParallel(model)):
        field = effective_receptive_field(other, image)
        assert field.level == "level 4"
        np.testing.assert_allclose(field.contribution, expected, rtol=0, atol=1e-5 * expected.max())


def test_half_precision_and_copies() -> None:
    model = timm.create_model("replknet_31n", kernel_sizes=3).eval()
    image = torch.rand(1, 3, 64, 64)
    field = effective_receptive_field(copy.deepcopy(model).bfloat16(), image)
    exact = effective_receptive_field(model.to(memory_format=torch.channels_last), image)
    assert np.corrcoef(field.contribution.ravel(), exact.contribution.ravel())[0, 1] > 0.9


# ---- what cannot be measured ----

RESNET = timm.create_model("resnet18")
ERRORS: dict[str, tuple[Any, Any, Any, str]] = {
    "no such level": (RESNET, 5, 64, r"level 5: ResNet has the levels 0 \(32 × 32\), .*4 \(2 × 2\).* -1 for the last"),
    "no such path": (RESNET, "layer5", 64, "no module of this path.*consists of 'conv1'.*; did you mean 'layer4'"),
    "no path": (RESNET, "", 64, "no module of this path"),
    "no level": (RESNET, 1.5, 64, "a number, the path of a module or 'output', got 1.5"),
    "logits": (RESNET, "output", 64, r"output of ResNet is a tensor \(1, 1000\), no spatial map.*feature level"),
    "a vector": (RESNET, "global_pool", 64, r"'global_pool' of ResNet is a tensor \(1, 512\), no spatial map"),
    "not called": (timm.create_model("resnet18", features_only=True), "fc", 64, "no module of this path"),
    "tokens": (
        timm.create_model("vit_tiny_patch16_224", img_size=64),
        "blocks.1",
        64,
        r"\(1, 17, 192\), no spatial map",
    ),
    "no maps": (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)), -1, 64, "has no spatial maps"),
    "the size": (
        timm.create_model("vit_tiny_patch16_224"),
        -1,
        64,
        "cannot be run on images of 3 channels and 64 × 64",
    ),
    "a detector's output": (
        detector("ssdlite320_mobilenet_v3_large"),
        "output",
        64,
        "of a detector, SSD, only the enco",
    ),
    "a detector's head": (detector("ssdlite320_mobilenet_v3_large"), "head", 64, "'head' is outside of the encoder"),
    "smp's image": (
        smp.encoders.get_encoder("mit_b0", weights=None),
        4,
        64,
        r"has the levels 0 \(16 × 16\), .*3 \(2 × 2",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_looked_at(case: str) -> None:
    model, level, size, words = ERRORS[case]
    with pytest.raises(ValueError, match=words):
        effective_receptive_field(model, torch.rand(1, 3, size, size), level)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_maps_that_do_not_depend_on_the_image() -> None:
    class Detached(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach()

    with pytest.raises(ValueError, match="does not depend on the image"):
        effective_receptive_field(Detached(), torch.rand(1, 3, 8, 8), "output")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(0, 3, 8, 8), "no image"),
        ([], "no image"),
        (torch.zeros(8, 8), r"got torch.float32 \(8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "got torch.uint8"),
        (["a.png"], "got str"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], r"one size are expected, got \(8, 9\) after \(8, 8\)"),
    ],
)
def test_what_is_no_image(images: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        effective_receptive_field(ones(3, 1, 3), images)


def test_options_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="on the meta device"):
        effective_receptive_field(timm.create_model("resnet10t", device="meta"), torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="num_images=0"):
        effective_receptive_field(ones(3, 1, 3), torch.zeros(1, 3, 8, 8), num_images=0)
    with pytest.raises(ValueError, match="no blocks to repeat"):
        effective_receptive_field(ones(3, 1, 3), torch.zeros(1, 3, 8, 8), gradient_checkpointing=True)


# ---- memory ----


def test_memory_is_told_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("replknet_31n")
    needed = needed_memory(model, (512, 512))
    assert needed == pytest.approx(4 * needed_memory(model, (256, 256)), rel=1e-6)
    assert needed_memory(model, (512, 512), gradient_checkpointing=True) < 0.8 * needed
    monkeypatch.setattr(memory_module, "available_memory", lambda device: needed // 4 - 1)
    with pytest.raises(
        ValueError, match=r"512 × 512 need about .* GiB for RepLKNet.* 224 × 224 would fit, and gradient c"
    ):
        require_memory(model, (512, 512))
    require_memory(model, (224, 224))
    monkeypatch.undo()
    assert memory_module.available_memory(torch.device("meta")) is None
    assert memory_module.available_memory(torch.device("cpu")) > 0  # type: ignore[operator]
    of_one_size = timm.create_model("vit_tiny_patch16_224")
    assert needed_memory(of_one_size, (224, 224)) > 224 * 224


def test_what_is_kept_is_what_autograd_keeps() -> None:
    model = nn.Sequential(ones(1, 4, 3), nn.Sigmoid(), ones(4, 4, 3), nn.Sigmoid())
    numbers = 128 * 128 * (1 + 2 * 4)  # convolutions keep the input, sigmoids their outputs
    assert needed_memory(model, (128, 128), channels=1) == round(1.3 * 4 * numbers)


# ---- pictures ----


def test_pictures_are_resized_as_in_the_authors_script(tmp_path: Path) -> None:
    from PIL import Image
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    for name in ("b10.png", "b9.png"):
        Image.fromarray(pixels if name == "b9.png" else 255 - pixels).save(tmp_path / name)
    series = folder_pictures(tmp_path, (32, 48), 50)
    first, second = series.make(3)
    published = transforms.Compose([transforms.Resize((32, 48), Image.BICUBIC), transforms.ToTensor()])
    assert torch.equal(first, published(Image.fromarray(pixels)))
    assert torch.equal(second, published(Image.fromarray(255 - pixels)))
    assert series.description == f"2 pictures of {tmp_path}"


@pytest.mark.parametrize("make", [scene_pictures, noise_pictures])
@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_drawn_pictures_are_the_same_every_time(make: Any, size: tuple[int, int]) -> None:
    series = make(size, 2)
    first, again = (torch.stack(list(series.make(3))) for _ in range(2))
    assert first.shape == (2, 3, *size)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, torch.stack(list(make(size, 2, 1).make(3))))
    assert 0 <= first.min() < first.max() <= 1


def test_pictures_for_other_channels(tmp_path: Path) -> None:
    assert next(noise_pictures((8, 8), 1).make(5)).shape == (5, 8, 8)
    with pytest.raises(ValueError, match="5 channels, pictures and scenes have 3: use noise"):
        next(scene_pictures((64, 64), 1).make(5))
    with pytest.raises(ValueError, match="64 × 64 pixels and more"):
        scene_pictures((32, 64), 1)
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        folder_pictures(tmp_path, (8, 8))
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        folder_pictures(tmp_path / "not", (8, 8))
