"""ImageNet's layouts: folders of synsets, and flat validation pictures with every form of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from timm.data import ImageNetInfo

from lk_backbones.data import ImageNetDataModule

SYNSETS = ImageNetInfo().label_names()
#: Three classes, of which the development kit numbers the last one first.
CHOSEN = [0, 134, 999]
FILES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 10)]


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 24, 3), value, np.uint8)).save(path, format="JPEG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label in CHOSEN:
        picture(tmp_path / "train" / SYNSETS[label] / f"{SYNSETS[label]}_1.JPEG")
    for file in FILES:
        picture(tmp_path / "val" / file)
    return tmp_path


def module(root: Path, **arguments: Any) -> ImageNetDataModule:
    return ImageNetDataModule(str(root), **({"num_workers": 0, "batch_size": 1} | arguments))


def labels(root: Path, **arguments: Any) -> dict[str, int]:
    data = module(root, **arguments)
    data.setup("validate")
    dataset = data.dataset("val")
    return {Path(dataset.path(i)).name: int(dataset.labels[i]) for i in range(len(dataset))}


EXPECTED = dict(zip(FILES, CHOSEN, strict=True))


def test_classes_are_those_of_every_published_model(root: Path) -> None:
    data = module(root)
    with pytest.warns(UserWarning, match="lacks 997 of the 1000 classes"):
        data.setup("fit") if (root / "val.txt").write_text("") else data.make_dataset("train")
    assert data.num_classes == 1000
    assert len(set(data.class_names)) == 1000, "checkpoints need names that differ"
    assert data.class_names[0].startswith("tench")
    assert {name for name in data.class_names if "crane" in name} >= {"crane (n02012849)", "crane (n03126707)"}
    assert data.test_split == data.predict_split == "val"


def test_folders_of_synsets_may_be_a_part(root: Path) -> None:
    for file in (root / "val").iterdir():
        file.unlink()
    for label in CHOSEN:
        picture(root / "val" / SYNSETS[label] / f"{label}.JPEG")
    with pytest.warns(UserWarning, match="lacks 997"):
        assert labels(root) == {f"{label}.JPEG": label for label in CHOSEN}


def kaggle(root: Path) -> None:
    rows = [f"{Path(file).stem},{SYNSETS[label]} 1 2 3 4 " for file, label in EXPECTED.items()]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")


def pairs(root: Path) -> None:
    (root / "val.txt").write_text("".join(f"{file} {label}\n" for file, label in EXPECTED.items()))


def in_order(root: Path) -> None:
    text = "".join(f"{SYNSETS[label]}\n" for label in EXPECTED.values())
    (root / "imagenet_2012_validation_synset_labels.txt").write_text(text)


def kit(root: Path) -> None:
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    ids = {label: number for number, label in enumerate(reversed(CHOSEN), start=1)}
    rows = [(float(number), SYNSETS[label], "words", 0.0) for label, number in ids.items()]
    rows.append((4.0, "n00001740", "entity", 3.0))  # not a class, but above some
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=kind)[:, None]})
    text = "".join(f"{ids[label]}\n" for label in EXPECTED.values())
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(text)


@pytest.mark.parametrize("write", [kaggle, pairs, in_order, kit])
def test_a_flat_folder_with_every_form_of_labels(root: Path, write: Any) -> None:
    write(root)
    assert labels(root) == EXPECTED


def test_a_file_of_labels_that_is_named(root: Path) -> None:
    pairs(root)
    (root / "val.txt").rename(root / "mine.csv")
    assert labels(root, val_labels="mine.csv") == EXPECTED
    with pytest.raises(FileNotFoundError, match=r"other\.txt"):
        labels(root, val_labels="other.txt")


def test_pictures_are_not_turned(root: Path) -> None:
    pairs(root)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(root / "val" / FILES[0], exif=exif)
    data = module(root)
    data.setup("validate")
    assert data.dataset("val")[0]["original_size"] == (20, 24)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ILSVRC2012_val_00000001 0\n", "no label for 2 of 3 pictures, such as ILSVRC2012_val_00000002"),
        ("a 1000\n", "'1000' is no class"),
        ("a n99999999\n", "'n99999999' is no class"),
        ("n01440764\n", "has 1 labels, but there are 3 pictures"),
        ("a\nb\nc\n", "label 1: 'a' is no class"),
        ("1\n2\n3\n", "meta.mat"),
    ],
)
def test_labels_that_make_no_sense(root: Path, text: str, message: str) -> None:
    (root / "val.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        labels(root)


def test_a_table_of_another_kind(root: Path) -> None:
    (root / "val.txt").write_text("1\n2\n3\n")
    (root / "meta.mat").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"meta\.mat is not the table"):
        labels(root)


def test_what_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file of labels.*LOC_val_solution\.csv"):
        labels(root)
    (root / "train" / "cats").mkdir()
    with pytest.raises(ValueError, match=r"'cats'.*ImageFolderDataModule"):
        module(root).make_dataset("train")
    (root / "train" / "cats").rename(root / "train" / SYNSETS[5])
    with pytest.raises(ValueError, match=f"hold no pictures, such as '{SYNSETS[5]}'"):
        module(root).make_dataset("train")
    data = module(root / "train")
    with pytest.raises(FileNotFoundError, match=r"no sub-folder 'train'.*Did you mean"):
        data.setup("fit")
    (root / "val").rename(root / "validation")
    with pytest.raises(FileNotFoundError, match="no sub-folder 'val'"):
        labels(root)
    with pytest.raises(ValueError, match="subset='imagenet-2k'"):
        module(root, subset="imagenet-2k")
