"""Shape bias: the published decisions, the mapping, and drawn stimuli whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from timm.data import ImageNetInfo
from torch import nn

from lk_backbones.analysis import ShapeBias, draw_shape_bias, find_stimuli, shape_bias
from lk_backbones.analysis.shape_bias import Decision, Stimulus, sixteen_classes, to_sixteen
from lk_backbones.drawing.palette import plot_palette
from tests.conftest import FIXTURES

PUBLISHED = {  # percent; README of texture-vs-shape, for humans the paper's figure 4
    "resnet50": 21.4,
    "resnet50 trained on SIN (model A)": 81.37,
    "resnet50 trained on SIN and IN, then IN (model C)": 20.54,
    "alexnet": 25.3,
    "vgg16": 9.2,
    "humans": 95.9,
}
COUNTS = json.loads((FIXTURES / "shape_bias_counts.json").read_text())["counts"]


def decided(counts: dict[str, list[int]]) -> list[Decision]:
    """Make decisions of which there are so many; a stimulus without a conflict beside them counts for nothing."""
    names = list(counts)
    decisions = []
    for i, (shape, numbers) in enumerate(counts.items()):
        texture, other = names[i - 1], names[i - 2]
        stimulus = Stimulus(Path("a.png"), shape, texture)
        for answer, number in zip((shape, texture, other), numbers, strict=True):
            decisions += [Decision(stimulus, answer)] * number
        decisions.append(Decision(Stimulus(Path("b.png"), shape, shape), shape))
    return decisions


@pytest.mark.parametrize("observer", PUBLISHED)
def test_published_decisions_give_the_published_shape_bias(observer: str) -> None:
    counts = COUNTS[observer]
    bias = ShapeBias.of_decisions(decided(counts))
    digits = len(str(PUBLISHED[observer]).partition(".")[2])
    assert round(100 * bias.shape_bias, digits) == PUBLISHED[observer]
    assert bias.classes == tuple(sixteen_classes())
    assert dict(zip(bias.classes, bias.counts.tolist(), strict=True)) == counts
    for name, (shape, texture, _) in counts.items():
        assert bias.per_class[name] == shape / (shape + texture)
    share, low, high = bias.interval()
    assert share == bias.shape_bias
    # about what the normal approximation gives
    expected = 1.96 * np.sqrt(share * (1 - share) / bias.counts[:, :2].sum())
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    assert bias.interval() == bias.interval()
    for name, (value, lower, upper) in bias.class_intervals().items():
        assert lower <= value == bias.per_class[name] <= upper


def test_without_any_decision_for_either_there_is_no_share() -> None:
    bias = ShapeBias.of_decisions(decided({"a": [0, 0, 5], "b": [0, 0, 2], "c": [1, 0, 0]}))
    assert np.isnan(bias.per_class["a"])
    assert bias.shape_bias == 1
    assert np.isnan(bias.class_intervals()["a"]).all()
    assert bias.interval()[1:] == (1, 1)
    assert np.isnan(ShapeBias.of_decisions([]).interval()).all()


# ---- the mapping ----


def test_the_classes_are_what_their_names_say() -> None:
    """By WordNet: model-vs-human also has its mapping as WordNet ids, of which these are the first and last."""
    assert list(sixteen_classes()) == sorted(sixteen_classes())
    sizes = {name: len(indices) for name, indices in sixteen_classes().items()}
    assert sizes == {
        "airplane": 1, "bear": 4, "bicycle": 2, "bird": 49, "boat": 5, "bottle": 7, "car": 3, "cat": 6, "chair": 4,
        "clock": 3, "dog": 109, "elephant": 2, "keyboard": 2, "knife": 1, "oven": 1, "truck": 8,
    }  # fmt: skip
    every = [index for indices in sixteen_classes().values() for index in indices]
    assert len(set(every)) == len(every)
    names = ImageNetInfo().label_names()
    ends = {name: (names[indices[0]], names[indices[-1]]) for name, indices in sixteen_classes().items()}
    assert ends["airplane"] == ("n02690373",) * 2
    assert ends["bear"] == ("n02132136", "n02134418")
    assert ends["bird"] == ("n01514859", "n02056570")
    assert ends["dog"] == ("n02085782", "n02113978")
    assert ends["knife"] == ("n03041632",) * 2
    assert ends["truck"] == ("n03345487", "n04467665")


def test_the_mean_favours_no_class_with_many_kinds() -> None:
    probabilities = torch.full((2, 1000), 0.5 / 999, dtype=torch.float64)
    probabilities[:, 404] = 0.5  # the airliner
    probabilities[1, list(sixteen_classes()["dog"])] = 0.009  # in sum nearly 1, each less likely than the airliner
    mapped = to_sixteen(probabilities)
    assert mapped.shape == (2, 16)
    assert [list(sixteen_classes())[i] for i in mapped.argmax(1)] == ["airplane", "airplane"]
    assert mapped[1, list(sixteen_classes()).index("dog")] == pytest.approx(0.009)


# ---- drawn stimuli ----

SHAPES = ("bottle", "clock", "knife")


def draw_stimulus(shape: str, texture: str) -> Image.Image:
    """Draw an outline that is filled with stripes: lying, upright or none, by the texture."""
    picture = Image.new("RGB", (64, 64), (255, 255, 255))
    mask = Image.new("1", picture.size)
    draw = ImageDraw.Draw(mask)
    if shape == "bottle":
        draw.rectangle((24, 8, 40, 56), fill=1)
    elif shape == "clock":
        draw.ellipse((8, 8, 56, 56), fill=1)
    else:
        draw.rectangle((4, 28, 60, 36), fill=1)
    pixels = np.zeros((64, 64, 3), np.uint8)
    if texture == "clock":
        pixels[::4] = 200
    elif texture == "knife":
        pixels[:, ::4] = 200
    picture.paste(Image.fromarray(pixels), mask=mask)
    return picture


class Oracle(nn.Module):
    """Goes by the outline or the stripes, for a share of the pictures; gives logits of the 16 classes or of ImageNet's.

    It sees pixels only: what is not white is the thing, how wide and high it is tells its shape, where neighbours
    differ its texture.
    """

    def __init__(self, by_shape: Any, num_classes: int = 16, names: tuple[str, ...] = tuple(sixteen_classes())) -> None:
        super().__init__()
        self.by_shape, self.num_classes, self.names = by_shape, num_classes, names
        self.seen = 0
        self.pretrained_cfg = {"input_size": (3, 64, 64), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.25,) * 3}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(images), self.num_classes)
        for image, row in zip(images, logits, strict=True):
            pixels = image[0] * 0.25 + 0.5
            inside = pixels < 0.99
            width, height = int(inside.any(0).sum()), int(inside.any(1).sum())
            shape = "clock" if abs(width - height) < 5 else "bottle" if height > width else "knife"
            part = pixels[28:36, 26:38]
            lying, upright = part.diff(dim=0).abs().max() > 0.5, part.diff(dim=1).abs().max() > 0.5
            texture = "clock" if lying else "knife" if upright else "bottle"
            answer = shape if self.by_shape(self.seen) else texture
            self.seen += 1
            index = self.names.index(answer)
            row[sixteen_classes()[answer][-1] if self.num_classes == 1000 else index] = 9
        return logits


@pytest.fixture(scope="module")
def stimuli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stimuli")
    for shape in SHAPES:
        (folder / shape).mkdir()
        for texture in SHAPES:
            draw_stimulus(shape, texture).save(folder / shape / f"{shape}1-{texture}2.png")
    return folder


@pytest.mark.parametrize("num_classes", [16, 1000])
@pytest.mark.parametrize(("by_shape", "expected"), [(lambda i: True, 1.0), (lambda i: False, 0.0)])
def test_an_oracle_has_the_bias_that_it_is_made_for(
    by_shape: Any, expected: float, num_classes: int, stimuli: Path
) -> None:
    oracle = Oracle(by_shape, num_classes).train()
    bias = shape_bias(oracle, stimuli, batch_size=4)
    assert oracle.training
    assert bias.shape_bias == expected
    assert bias.per_class == dict.fromkeys(SHAPES, expected)
    assert bias.counts.tolist() == [[2 * expected, 2 - 2 * expected, 0]] * 3
    assert len(bias.decisions) == 9
    assert all(d.answer == d.stimulus.shape for d in bias.decisions if d.stimulus.shape == d.stimulus.texture)


def test_half_and_half(stimuli: Path) -> None:
    """In natural order the pictures of each shape are three; of the six with a conflict every other goes by shape."""
    conflicts = [one for one in find_stimuli(stimuli) if one.shape != one.texture]
    bias = shape_bias(Oracle(lambda i: i % 2 == 0), conflicts)
    assert bias.shape_bias == 0.5
    assert bias.per_class == dict.fromkeys(SHAPES, 0.5)


def test_own_classes_by_name(stimuli: Path, tmp_path: Path) -> None:
    names = ("moving knife", "odd_clock", "bottle")
    for shape in names:
        for texture in names:
            picture = draw_stimulus(shape[-5:].strip("_"), texture[-5:].strip("_"))
            if shape.endswith("bottle"):
                picture = draw_stimulus("bottle", texture[-5:].strip("_"))
            picture.save(tmp_path / f"0001_{shape}12-{texture}3.png")
    found = find_stimuli(tmp_path, names)
    assert {(one.shape, one.texture) for one in found} == {(shape, texture) for shape in names for texture in names}

    class Own(Oracle):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images)[:, [2, 1, 0]]

    bias = shape_bias(Own(lambda i: True, 3, ("bottle", "clock", "knife")), tmp_path, names)
    assert bias.classes == ("bottle", "moving knife", "odd_clock")
    assert bias.shape_bias == 1


def test_a_timm_model_is_preprocessed_as_timm_evaluates_it(stimuli: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained_cfg_overlay={"input_size": (3, 48, 48), "crop_pct": 0.5}).eval()
    (first, *_) = found = find_stimuli(stimuli)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        expected = to_sixteen(model(transform(Image.open(first.path)).unsqueeze(0)).softmax(1)).argmax()
    assert shape_bias(model, found[:1]).decisions[0].answer == list(sixteen_classes())[int(expected)]


# ---- bad input ----


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cat.png", r"cat\.png: the name does not say what the picture shows: <shape><number>-<texture><number>\.png"),
        ("cat1_dog2.png", "does not say"),
        ("cat-dog2.png", "does not say"),
        ("cats1-dog2.png", "the shape 'cats' is none of the classes airplane.*; did you mean 'cat'"),
        ("cat1-fog2.png", "the texture 'fog' is none of the classes .*; did you mean 'dog'"),
    ],
)
def test_names_that_say_nothing(name: str, words: str, tmp_path: Path) -> None:
    draw_stimulus("clock", "knife").save(tmp_path / "clock1-knife1.png")
    draw_stimulus("clock", "knife").save(tmp_path / name)
    with pytest.raises(ValueError, match=words):
        find_stimuli(tmp_path)


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        find_stimuli(tmp_path / "not")
    with pytest.raises(FileNotFoundError, match=r"holds no pictures.*rgeirhos/texture-vs-shape .*CC-BY-4\.0"):
        find_stimuli(tmp_path)


class Answers(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: torch.Tensor) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "names", "words"),
    [
        (torch.zeros(9, 10), None, "10 classes: without names of its classes it must have ImageNet's 1000, or the 16"),
        (torch.zeros(9, 10), SHAPES, "10 classes: 3 names were given"),
        (torch.zeros(9, 16, 2, 2), None, r"returns a tensor \(9, 16, 2, 2\): a classifier's logits"),
        ([torch.zeros(9, 16)], None, "returns a list: a classifier's logits"),
        (torch.full((9, 16), float("nan")), None, "infinite or not a number"),
        (torch.zeros(9, 3), ("bottle", "clock", "bottle", "knife"), "a name occurs twice"),
    ],
)
def test_what_is_no_classifier(answer: Any, names: Any, words: str, stimuli: Path) -> None:
    with pytest.raises(ValueError, match=words):
        shape_bias(Answers(answer), stimuli, names)


def test_logits_by_name(stimuli: Path) -> None:
    bias = shape_bias(Answers({"logits": torch.eye(16)[[list(sixteen_classes()).index("knife")] * 9]}), stimuli)
    assert bias.counts.tolist() == [[0, 1, 1], [0, 1, 1], [2, 0, 0]]


# ---- the plot ----


def test_the_plot_shows_each_share_at_its_place() -> None:
    """The line at the share of all is where most of a series' colour is: 1 on the left, 0 on the right."""
    known = {"shape": [7, 0, 1], "half": [4, 4, 0], "texture": [0, 3, 2]}
    results = [(name, ShapeBias.of_decisions(decided(dict.fromkeys("abc", row)))) for name, row in known.items()]
    results.append(("resnet50", ShapeBias.of_decisions(decided(COUNTS["resnet50"]))))
    figure = np.asarray(draw_shape_bias(results, "1200 pictures"))
    place = {}
    for (name, _), color in zip(results, plot_palette(4), strict=True):
        columns, counts = np.unique(np.argwhere((figure == color).all(-1))[:, 1], return_counts=True)
        place[name] = columns[counts.argmax()]
    assert place["shape"] < place["half"] < place["resnet50"] < place["texture"]
    width = place["texture"] - place["shape"]
    assert (place["texture"] - place["half"]) / width == pytest.approx(0.5, abs=0.01)
    assert (place["texture"] - place["resnet50"]) / width == pytest.approx(0.214, abs=0.01)
    nothing = ShapeBias.of_decisions(decided({"a": [0, 0, 1], "b": [0, 0, 1], "c": [0, 0, 1]}))
    assert draw_shape_bias([("nothing", nothing)]).size[0] > 400
