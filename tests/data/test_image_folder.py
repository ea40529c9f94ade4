"""Folders of classes: which pictures are found, what timm would make of them, and what is said of bad ones."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_dataset, create_transform

from lk_backbones._random import seeded
from lk_backbones.data import ImageFolderDataModule, PictureFolderDataModule
from lk_backbones.data.classification_transforms import Augmentation, PictureSettings, posterize, train_transform
from lk_backbones.data.sampling import SampleKey
from tests.class_folders import COLORS, draw_folders, draw_picture

SMALL: dict[str, Any] = {"num_workers": 0, "batch_size": 4, "val_batch_size": 4, "seed": 0}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folders(tmp_path_factory.mktemp("drawn"), {"train": 3, "val": 2})


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(drawn, tmp_path / "root"))


def module(root: Path, **arguments: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **(SMALL | arguments))


def set_up(root: Path, **arguments: Any) -> ImageFolderDataModule:
    data = module(root, **arguments)
    data.setup()
    return data


def files_of(dataset: Any) -> list[str]:
    return [Path(dataset.path(i)).name for i in range(len(dataset))]


# --- what is found --------------------------------------------------------------------------------------------------


def test_classes_and_labels_are_those_of_timm(root: Path) -> None:
    for split in ("train", "val"):  # an order in which plain sorting differs
        (root / split / "red").rename(root / split / "class10")
        (root / split / "green").rename(root / split / "Class2")
    data = set_up(root)
    for split in ("train", "val"):
        reference = create_dataset("", str(root / split)).reader
        ours = data.dataset(split)
        expected = {str(Path(path).relative_to(root)): label for path, label in reference.samples}
        found = {str(Path(ours.path(i)).relative_to(root)): int(ours.labels[i]) for i in range(len(ours))}
        assert found == expected
    assert data.class_names == ["blue", "Class2", "class10", "grey", "violet", "yellow"]
    assert (data.num_classes, len(data.class_colors), data.test_split) == (6, 6, "val")


def test_a_test_folder_is_used_and_may_lack_classes(root: Path) -> None:
    shutil.copytree(root / "val", root / "test")
    shutil.rmtree(root / "test" / "green")
    data = set_up(root)
    assert data.test_split == data.predict_split == "test"
    labels = sorted({int(label) for label in data.dataset("test").labels})
    assert labels == [0, 2, 3, 4, 5]


def test_sub_folders_hidden_files_and_other_files(root: Path) -> None:
    (root / "train" / "blue" / "more").mkdir()
    draw_picture("blue", 1).save(root / "train" / "blue" / "more" / "deep.PNG")
    (root / "train" / "blue" / "notes.txt").write_text("no picture")
    (root / "train" / ".cache").mkdir()
    draw_picture("blue", 1).save(root / "train" / "blue" / ".hidden.png")
    data = set_up(root)
    assert len(data.dataset("train")) == 19
    assert "deep.PNG" in files_of(data.dataset("train"))


def test_one_folder_is_split_by_names_class_by_class(tmp_path: Path) -> None:
    root = draw_folders(tmp_path, {".": 5})
    data = set_up(root, val_fraction=0.4)
    train, val = (set(files_of(data.dataset(split))) for split in ("train", "val"))
    assert not train & val
    assert len(train | val) == 30
    for name in COLORS:
        assert sum(file.startswith(name) for file in val) == 2
    again = set_up(root, val_fraction=0.4, batch_size=2, seed=5)
    assert set(files_of(again.dataset("val"))) == val, "the order's seed has nothing to do with it"
    assert set(files_of(set_up(root, val_fraction=0.4, split_seed=1).dataset("val"))) != val
    draw_picture("red", 99).save(root / "red" / "red_new.jpg")
    grown = set(files_of(set_up(root, val_fraction=0.4).dataset("val")))
    assert {file for file in val if not file.startswith("red")} <= grown


# --- what a sample is -----------------------------------------------------------------------------------------------


def test_evaluated_pictures_are_those_of_timm(root: Path) -> None:
    data = set_up(root)
    settings = {"input_size": (24, 32), "crop_pct": 0.8, "crop_mode": "center", "interpolation": "bilinear"}
    data.set_picture_settings(train_size=(16, 16), **settings)
    transform = create_transform(
        (3, 24, 32), crop_pct=0.8, crop_mode="center", interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)
    )
    seen = 0
    for batch in data.val_dataloader():
        assert batch["image"].dtype == torch.float32
        for image, path, size in zip(batch["image"], batch["path"], batch["original_size"], strict=True):
            with Image.open(path) as picture:
                assert size == (picture.height, picture.width)
                assert torch.equal(image, transform(picture.convert("RGB")))
            seen += 1
    assert seen == 12


def test_training_pictures_are_those_of_timm_with_the_same_chance(root: Path) -> None:
    augmentation = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", vflip=0.3)
    settings = PictureSettings(train_size=(24, 32))
    ours = train_transform(settings, augmentation)
    timms = create_transform(
        (24, 32), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", vflip=0.3, interpolation="random",
        normalize=False,
    )  # fmt: skip
    path = next((root / "train" / "blue").iterdir())
    compared = 0
    for seed in range(20):
        with Image.open(path) as lazy, Image.open(path) as whole, seeded(seed):
            mine = ours(lazy)
            with seeded(seed):
                try:
                    expected = timms(whole.convert("RGB"))
                except ValueError:  # of Pillow 13 in timm, see posterize
                    continue
        assert torch.equal(mine, expected)
        compared += 1
    assert compared >= 15


def test_a_picture_of_which_no_bit_is_kept_is_black() -> None:
    picture = draw_picture("red", 0)
    assert not np.array(posterize(picture, 0)).any()
    assert np.array_equal(posterize(picture, 2), ImageOps.posterize(picture, 2))
    for kind in ("rand-m10-inc1-n5", "original", "augmix-m5"):  # every kind of timm's has its operations elsewhere
        augment = train_transform(PictureSettings(train_size=(24, 24)), Augmentation(auto_augment=kind))
        for seed in range(30):
            with seeded(seed):
                assert augment(picture).shape == (3, 24, 24)


def test_a_large_picture_is_decoded_small_and_shows_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (12, 16, 3), np.uint8).repeat(64, 0).repeat(64, 1)
    Image.fromarray(blocks).save(tmp_path / "large.jpg", quality=95, subsampling=0)
    settings = PictureSettings(train_size=(48, 64))
    transform = train_transform(settings, Augmentation(color_jitter=0.0, interpolation="bilinear", scale=(0.5, 1.0)))
    whole = create_transform(
        (48, 64), is_training=True, color_jitter=0.0, interpolation="bilinear", scale=(0.5, 1.0), normalize=False
    )
    for seed in range(5):
        lazy, full = Image.open(tmp_path / "large.jpg"), Image.open(tmp_path / "large.jpg").convert("RGB")
        with seeded(seed):
            small = transform(lazy).float()
        with seeded(seed):
            expected = whole(full).float()
        assert lazy.size[0] <= 512, "it was decoded whole"
        assert (small - expected).abs().mean() < 3, "of 255"


def test_chance_follows_the_seed_of_a_sample_and_leaves_the_generators_alone(root: Path) -> None:
    dataset = set_up(root, auto_augment="rand-m9-mstd0.5-inc1").dataset("train")
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = dataset[SampleKey(0, 7)]["image"]
    drawn = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert (random.random(), np.random.rand(), torch.rand(())) == drawn
    assert torch.equal(dataset[SampleKey(0, 7)]["image"], first)
    assert not torch.equal(dataset[SampleKey(0, 8)]["image"], first)
    assert first.dtype == torch.uint8


def test_pictures_are_turned_and_every_mode_becomes_rgb(root: Path) -> None:
    folder = root / "val" / "red"
    shutil.rmtree(folder)
    folder.mkdir()
    picture = draw_picture("red", 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.quantize().save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "transparent.png")
    dataset = set_up(root).dataset("val")
    samples = {Path(dataset.path(i)).name: dataset[i] for i in range(len(dataset)) if dataset.labels[i] == 3}
    assert len(samples) == 5
    assert samples["turned.jpg"]["original_size"] == (52, 40)
    assert samples["cmyk.jpg"]["original_size"] == (40, 52)
    assert all(sample["image"].shape == (3, 224, 224) for sample in samples.values())
    train = root / "train" / "red"
    for file in folder.iterdir():
        shutil.copy(file, train)
    training = set_up(root).dataset("train")
    assert all(training[i]["image"].shape == (3, 224, 224) for i in range(len(training)))


def test_prediction_sees_a_picture_as_the_evaluation_does(root: Path) -> None:
    settings: dict[str, Any] = {"input_size": (24, 24), "train_size": (24, 24), "crop_pct": 0.9}
    data, pictures = set_up(root), PictureFolderDataModule(str(root / "val" / "red"), num_workers=0, batch_size=2)
    pictures.setup("predict")
    for each in (data, pictures):
        each.set_picture_settings(**settings)
    dataset = data.dataset("val")
    expected = {dataset.path(i): dataset[i]["image"] for i in range(len(dataset))}
    (batch,) = [batch for batch, _ in torch.utils.data.DataLoader.__iter__(pictures.predict_dataloader())]
    for image, path in zip(batch["image"], batch["path"], strict=True):
        assert torch.equal(image, expected[path].float() / 255)


# --- bad input ------------------------------------------------------------------------------------------------------


def refused(root: Path, *names: str, error: type[Exception] = ValueError, **arguments: Any) -> str:
    with pytest.raises(error) as caught:
        set_up(root, **arguments)
    for name in names:
        assert name in str(caught.value)
    return str(caught.value)


def test_a_class_in_one_split_only_is_named(root: Path) -> None:
    shutil.rmtree(root / "val" / "green")
    (root / "val" / "violett").mkdir()
    message = refused(root, "'green'", "'violett'", str(root / "train"), str(root / "val"))
    assert "val has no 'green'" in message
    assert "train has no 'violett'" in message


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_is_named(root: Path, split: str) -> None:
    for file in (root / split / "grey").iterdir():
        file.unlink()
    refused(root, "'grey'", str(root / split), "hold no pictures")


def test_too_few_to_split(tmp_path: Path) -> None:
    root = draw_folders(tmp_path, {".": 2})
    (root / "red" / "red_1.jpg").unlink()
    refused(root, "'red'", "fewer than 2")


def test_folders_that_are_missing(root: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", error=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "train/CLASS/NAME.jpg", error=FileNotFoundError)
    shutil.rmtree(root / "val")
    refused(root, "'val'", error=FileNotFoundError)
    (tmp_path / "single" / "cat").mkdir(parents=True)
    refused(tmp_path / "single", "1 class folders", "'cat'")


def spoil(root: Path) -> list[Path]:
    """Three pictures that cannot be read, of which one begins as a picture."""
    truncated, text, empty = (root / "train" / name / f"{name}_0.jpg" for name in ("blue", "green", "red"))
    content = truncated.read_bytes()
    truncated.write_bytes(content[: len(content) // 2])
    text.write_text("no picture")
    empty.write_bytes(b"")
    return [truncated, text, empty]


def test_unreadable_pictures_are_counted_and_named(root: Path) -> None:
    broken = spoil(root)
    message = refused(root, "3 of 18 pictures cannot be read", "strict=False", *map(str, broken))
    assert "it is empty" in message
    refused(root, "2 of 18", check_files="headers")
    data = set_up(root, check_files="off")  # then they are named when they are needed
    dataset = data.dataset("train")
    for path in broken:
        with pytest.raises(ValueError, match=path.name):
            dataset[next(i for i in range(len(dataset)) if dataset.path(i) == str(path))]


def test_unreadable_pictures_are_left_out_if_that_is_asked_for(root: Path) -> None:
    broken = spoil(root)
    with pytest.warns(UserWarning, match="3 of 18 pictures cannot be read") as caught:
        data = set_up(root, strict=False)
    assert any("left out" in str(warning.message) for warning in caught)
    assert len(data.dataset("train")) == 15
    assert not {str(path) for path in broken} & {data.dataset("train").path(i) for i in range(15)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(data.train_dataloader())) == 3
    for file in (root / "val").rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="12 of 12 pictures"), pytest.warns(UserWarning, match="3 of 18"):
        set_up(root, strict=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"split_seed": -1}, "split_seed"),
        ({"scale": (0.5, 0.1)}, "scale must be"),
        ({"scale": (0.5, 1.5)}, "scale must be"),
        ({"ratio": (0, 1)}, "ratio must be"),
        ({"hflip": 1.5}, "hflip"),
        ({"color_jitter": -1.0}, "color_jitter"),
        ({"auto_augment": "random"}, "auto_augment='random'"),
        ({"auto_augment": "rand-x9"}, "auto_augment='rand-x9'"),
        ({"train_interpolation": "cubic"}, "interpolation='cubic'"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **arguments)
