from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lk_backbones.data import SegmentationFolderDataModule
from tests.data.conftest import CAMVID, random_labels, save_image, save_mask

MakeRoot = Callable[..., Path]


def make(root: Path, **options: object) -> SegmentationFolderDataModule:
    return SegmentationFolderDataModule(str(root), **{"num_workers": 0, "batch_size": 2, "crop_size": 32} | options)


def test_split_folders(folder_root: MakeRoot) -> None:
    data = make(folder_root({"train": 12, "val": 2, "test": 3}))
    data.setup()
    assert (data.num_classes, data.class_names) == (3, ["ground", "water", "wood"])
    names = [Path(data.dataset("train").path(i)).name for i in range(12)]
    assert names == [f"picture_{i}.png" for i in range(12)]  # natural order
    assert len(data.train_dataloader()) == 6
    for i, batch in enumerate(data.test_dataloader()):
        labels = random_labels(40, 56, [0, 1, 2, 9], seed=200 + i)
        assert np.array_equal(batch["mask"][0].numpy(), np.where(labels == 9, 255, labels))
    assert i == 2
    assert [b["path"] for b in data.predict_dataloader()] == [b["path"] for b in data.test_dataloader()]


def test_without_test_split_validation_takes_its_place(folder_root: MakeRoot) -> None:
    data = make(folder_root({"train": 2, "val": 3}))
    data.setup()
    paths = [batch["path"] for batch in data.val_dataloader()]
    assert len(paths) == 3
    assert [b["path"] for b in data.test_dataloader()] == [b["path"] for b in data.predict_dataloader()] == paths


def test_test_pictures_without_masks_are_for_prediction(folder_root: MakeRoot) -> None:
    root = folder_root({"train": 2, "val": 1})
    save_image(root / "images/test/new.jpg", 20, 24, seed=0)
    data = make(root)
    data.setup()
    (batch,) = data.predict_dataloader()
    assert (Path(batch["path"][0]).name, batch["original_size"], "mask" in batch) == ("new.jpg", [(20, 24)], False)
    (batch,) = data.test_dataloader()
    assert Path(batch["path"][0]).parent.name == "val"


def test_drawn_split_depends_on_names_only(folder_root: MakeRoot) -> None:
    root = folder_root(20)

    def split() -> tuple[set[str], set[str]]:
        data = make(root, val_fraction=0.25, seed=np.random.randint(1000))
        data.setup("fit")
        return tuple({data.dataset(s).path(i) for i in range(len(data.dataset(s)))} for s in ("train", "val"))

    train, val = split()
    assert (len(train), len(val), len(train & val)) == (15, 5, 0)
    assert split() == (train, val)
    for i in range(20, 24):
        save_image(root / "images" / f"picture_{i}.png", 40, 56, seed=i)
        save_mask(root / "masks" / f"picture_{i}.png", random_labels(40, 56, [0, 1], seed=i))
    _, more = split()
    assert len(more) == 6
    assert len(val & more) >= 3


def test_names_in_sub_folders_with_a_suffix(folder_root: MakeRoot) -> None:
    root = folder_root(2, extension=".jpg")
    save_image(root / "images/monday/picture_0.webp", 40, 56, seed=5)
    save_mask(root / "masks/monday/picture_0.png", random_labels(40, 56, [0, 1, 2], seed=5))
    for mask in list((root / "masks").rglob("*.png")):
        mask.rename(mask.with_name(f"{mask.stem}_mask.png"))
    with pytest.raises(FileNotFoundError, match="3 of 3 images have no mask"):
        make(root).setup("fit")
    data = make(root, mask_suffix="_mask")
    data.setup("fit")
    assert len(data.dataset("train")) + len(data.dataset("val")) == 3


def test_classes_file_and_ignore_label_can_be_given(folder_root: MakeRoot) -> None:
    root = folder_root({"train": 2, "val": 1})
    (root / "classes.json").rename(root.parent / "names.txt")
    (root.parent / "names.txt").write_text("x\ny\nz\n")
    data = make(root, classes_file=str(root.parent / "names.txt"), ignore_label=9)
    data.setup("fit")
    assert data.class_names == ["x", "y", "z"]
    (root / "classes.txt").write_text("p\nq\nr\n")
    assert make(root).class_names == ["p", "q", "r"]


def break_missing_root(root: Path) -> None:
    root.rename(root.with_name("moved"))


def break_layout(root: Path) -> None:
    (root / "images").rename(root / "pictures")


def break_mask_folder(root: Path) -> None:
    (root / "masks/train").rename(root / "masks/training")


def break_empty(root: Path) -> None:
    for path in (root / "images/train").iterdir():
        path.unlink()


def break_classes(root: Path) -> None:
    (root / "classes.json").unlink()


def break_image(root: Path) -> None:
    path = root / "images/train/picture_1.png"
    path.write_bytes(path.read_bytes()[:-200])


def break_mask(root: Path) -> None:
    (root / "masks/val/picture_0.png").write_bytes(b"")


def break_size(root: Path) -> None:
    save_mask(root / "masks/train/picture_0.png", np.zeros((40, 57)))


def break_label(root: Path) -> None:
    save_mask(root / "masks/train/picture_0.png", np.full((40, 56), 3))


def break_colour(root: Path) -> None:
    save_image(root / "masks/train/picture_0.png", 40, 56, seed=0)


def break_no_mask(root: Path) -> None:
    (root / "masks/train/picture_1.png").unlink()


def break_no_image(root: Path) -> None:
    (root / "images/val/picture_0.png").unlink()
    save_image(root / "images/val/other.png", 40, 56, seed=0)
    save_mask(root / "masks/val/other.png", np.zeros((40, 56)))


def break_twins(root: Path) -> None:
    save_image(root / "images/train/picture_0.jpg", 40, 56, seed=0)


def break_lossy(root: Path) -> None:
    mask = root / "masks/train/picture_0.png"
    Image.open(mask).save(mask.with_suffix(".jpg"))
    mask.unlink()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (break_missing_root, FileNotFoundError, r"There is no folder .*/own\. In .* there is: moved/"),
        (
            break_layout,
            FileNotFoundError,
            r"no sub-folder 'images.*there is: classes\.json, masks/, pictures/\. Expected",
        ),
        (break_mask_folder, FileNotFoundError, r"no sub-folder 'masks/train'\. In .*/masks there is: training/, val/"),
        (break_empty, FileNotFoundError, r"images/train holds no pictures \(\.jpg, .*It holds: nothing"),
        (break_classes, FileNotFoundError, r"no classes file .*own/classes\.json\. Write one: classes\.txt with one"),
        (
            break_image,
            ValueError,
            r"images/train/picture_1\.png cannot be read as a picture: .*Replace it or remove it",
        ),
        (break_mask, ValueError, r"masks/val/picture_0\.png cannot be read as a picture: it is empty"),
        (
            break_size,
            ValueError,
            r"train/picture_0\.png is 56 wide and 40 high, but its mask .* is 57 wide and 40 high",
        ),
        (
            break_label,
            ValueError,
            r"train/picture_0\.png has labels .*no class: 3 \(2240 pixels\).*0\.\.2.*ignored: 9, 255",
        ),
        (break_colour, ValueError, r"masks/train/picture_0\.png is a RGB picture, but must be a label map.*To convert"),
        (break_no_mask, FileNotFoundError, r"1 of 2 images have no mask.*should be .*masks/train/picture_1\.png"),
        (break_no_image, FileNotFoundError, r"1 of 2 masks have no image: .*masks/val/picture_0\.png"),
        (break_twins, ValueError, r"Two images have the same name: .*picture_0\.(jpg|png) and .*picture_0\.(jpg|png)"),
        (break_lossy, ValueError, r"picture_0\.jpg is in a format that may change values\. Masks must be one of \.png"),
    ],
)
def test_bad_input_is_found_before_training(
    folder_root: MakeRoot, spoil: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    root = folder_root({"train": 2, "val": 1})
    make(root).setup("fit")
    spoil(root)
    with pytest.raises(error, match=message):
        make(root).setup("fit")


@pytest.mark.parametrize(
    ("spoil", "num_workers"), [(break_size, 0), (break_colour, 0), (break_label, 0), (break_image, 0)]
)
def test_bad_files_are_also_found_when_they_are_loaded(
    folder_root: MakeRoot, spoil: Callable[[Path], None], num_workers: int
) -> None:
    root = folder_root({"train": 2, "val": 1})
    spoil(root)
    data = make(root, check_files="off", num_workers=num_workers)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"train/picture_\d\.png"):
        list(data.train_dataloader())


def test_headers_alone_show_wrong_sizes(folder_root: MakeRoot) -> None:
    root = folder_root({"train": 2, "val": 1})
    break_size(root)
    with pytest.raises(ValueError, match="Both must have the same size"):
        make(root, check_files="headers").setup("fit")


def test_every_setting_is_checked(folder_root: MakeRoot) -> None:
    for options, message in (
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1, got 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"crop_size": (0, 5)}, r"crop_size must be two lengths in pixels, each at least 1, got \(0, 5\)"),
        ({"scale_range": (2.0, 0.5)}, "scale_range must be"),
        ({"cat_max_ratio": 0.0}, "cat_max_ratio must be a share"),
        ({"image_fill": (124.0, 116.0, 104.0)}, r"image_fill must be RGB in \[0, 1\].*Divide 8-bit colours by 255"),
        ({"check_files": "some"}, "check_files must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make(Path("x"), **options)
    data = make(folder_root({"train": 3, "val": 1}), batch_size=4)
    with pytest.raises(RuntimeError, match=r"train split is not set up: call setup\(\)"):
        data.train_dataloader()
    data.setup("fit")
    with pytest.raises(ValueError, match=r"3 training pictures per process, fewer than batch_size=4.*Use batch_size=3"):
        data.train_dataloader()


def test_checkpoint_keeps_plain_arguments(folder_root: MakeRoot) -> None:
    root = folder_root({"train": 2, "val": 1})
    data = SegmentationFolderDataModule(root, crop_size=(32, 48), num_workers=0)  # type: ignore[arg-type]
    kept = dict(data.hparams)
    assert kept["root"] == str(root)
    assert kept["crop_size"] == (32, 48)
    assert kept["num_workers"] == 0
    assert SegmentationFolderDataModule(**kept).crop_size == (32, 48)


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID}")
def test_camvid() -> None:
    data = make(CAMVID, crop_size=(128, 160), batch_size=4, check_files="headers")
    data.setup()
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [367, 101, 233]
    assert data.class_names[0] == "Sky"
    assert data.class_colors[10] == (0, 128, 192)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 128, 160)
    counts = torch.zeros(256, dtype=torch.int64)
    for i in range(101):
        counts += torch.bincount(torch.from_numpy(data.dataset("val").load(i)[1]).flatten().long(), minlength=256)
    share = (counts / counts.sum() * 100).tolist()
    # As in the data set's README: sky, road, bicyclist and void of the validation split, in percent.
    assert [round(share[i], 2) for i in (0, 3, 10, 255)] == [9.18, 28.95, 2.22, 1.70]
    assert counts[11:255].sum() == 0
