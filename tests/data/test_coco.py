"""COCO format: what is read is what pycocotools reads; what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from lk_backbones.data import CocoDataModule
from lk_backbones.data.coco_format import PackedList

from .conftest import BCCD, COCO_MINI, CocoMaker


def make(root: Path, **kwargs: Any) -> CocoDataModule:
    return CocoDataModule(str(root), num_workers=0, **kwargs)


def val_targets(data: CocoDataModule) -> list[dict[str, Any]]:
    data.setup("validate")
    return [target for _, targets in data.val_dataloader() for target in targets]


# --- what is read ---------------------------------------------------------------------------------------------


def test_targets_are_those_of_the_file(coco: CocoMaker) -> None:
    data = make(coco.write(), val_batch_size=2)
    targets = val_targets(data)
    assert data.class_names == ["three", "seven"]
    assert data.category_ids == [3, 7]
    assert data.num_classes == 2
    assert data.has_masks
    assert [target["image_id"] for target in targets] == [10, 11, 12, 13]
    first, second, empty, last = targets
    assert first["boxes"].tolist() == [[10, 10, 30, 40], [10, 10, 80, 60]]
    assert first["boxes"].dtype == torch.float32
    assert first["labels"].tolist() == [2, 1]
    assert first["labels"].dtype == torch.int64
    assert first["area"].tolist() == [600, 700]
    assert first["masks"].dtype == torch.uint8
    assert first["masks"].sum(dim=(1, 2)).tolist() == [600, 700]
    assert second["iscrowd"].tolist() == [0, 1]
    assert second["masks"][1, :, 40:60].all()
    assert second["masks"][1].sum() == 1200
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 60, 80)
    assert last["masks"][0, 5:15, 10:30].all()
    assert last["masks"].sum() == 200
    assert last["path"] == str(coco.root / "val2017" / "13.png")
    assert last["original_size"] == (60, 80)


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="needs the COCO pictures, which are not shipped")
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_annotations_are_read_as_pycocotools_reads_them(split: str) -> None:
    path = COCO_MINI / "annotations" / f"instances_{split}.json"
    reference = COCO(str(path))
    data = make(COCO_MINI, val_images=split, val_annotations=str(path.relative_to(COCO_MINI)))
    targets = val_targets(data)
    assert len(targets) == len(reference.imgs)
    crowds = 0
    for target in targets:
        annotations = reference.loadAnns(reference.getAnnIds(target["image_id"]))
        assert len(annotations) == len(target["labels"])
        for i, annotation in enumerate(annotations):
            assert data.category_ids[int(target["labels"][i]) - 1] == annotation["category_id"]
            x, y, width, height = annotation["bbox"]
            assert target["boxes"][i].tolist() == pytest.approx([x, y, x + width, y + height], abs=1e-4)
            assert target["area"][i].item() == pytest.approx(annotation["area"], rel=1e-6)
            assert np.array_equal(target["masks"][i].numpy(), reference.annToMask(annotation))
            crowds += annotation["iscrowd"]
    assert crowds > 0


@pytest.mark.skipif(not BCCD.is_dir(), reason="needs the blood cell pictures, which are not shipped")
def test_real_boxes_without_masks() -> None:
    files = {f"{split}_annotations": f"annotations/instances_{split}.json" for split in ("train", "val", "test")}
    folders = {f"{split}_images": "images" for split in ("train", "val", "test")}
    data = make(BCCD, **files, **folders)
    data.setup()
    assert not data.has_masks
    assert data.class_names == ["RBC", "WBC", "Platelets"]
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [205, 87, 72]
    assert sum(len(target["labels"]) for _, (target,) in data.test_dataloader()) == 945
    with pytest.raises(ValueError, match=r"instances_train.json, annotation 1 has no segmentation, but masks=True"):
        make(BCCD, masks=True, **files, **folders).setup("fit")


def test_empty_pictures_train_only_if_wanted(coco: CocoMaker) -> None:
    coco.write()
    for keep, count in ((False, 3), (True, 4)):
        data = make(coco.root, keep_empty=keep)
        data.setup("fit")
        assert len(data.dataset("train")) == count
        assert len(data.dataset("val")) == 4


def test_grey_cmyk_and_turned_pictures(coco: CocoMaker) -> None:
    folder = coco.write() / "val2017"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels[..., 0]).save(folder / "10.png")
    Image.fromarray(pixels).convert("CMYK").save(folder / "11.png", "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° for display
    turned = np.ascontiguousarray(np.rot90(pixels))
    Image.fromarray(turned).save(folder / "12.png", exif=exif)  # the annotations are those of what is displayed
    Image.fromarray(pixels).save(folder / "13.png", exif=exif)  # the annotations are those of what is stored
    data = make(coco.root)
    data.setup("validate")
    grey, cmyk, displayed, stored = (images[0] for images, _ in data.val_dataloader())
    assert all(image.shape == (3, 60, 80) for image in (grey, cmyk, displayed, stored))
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.equal(grey, expected[:1].expand(3, -1, -1))
    assert torch.equal(displayed, expected)
    assert torch.equal(stored, expected)
    assert (cmyk - expected).abs().mean() < 0.25


def test_degenerate_boxes_are_dropped_and_counted(coco: CocoMaker) -> None:
    wrong = [[5, 5, 0, 10], [5, 5, 10, -1], [90, 5, 10, 10], [0, -20, 10, 10]]
    boxes = [*wrong, [70, 50, 20, 20]]  # the last one only sticks out
    coco.splits["val2017"]["annotations"] += [
        coco.annotation(50 + i, 12, 3, box, [[0, 0, 9, 0, 9, 9]]) for i, box in enumerate(boxes)
    ]
    coco.write()
    with pytest.warns(UserWarning, match="boxes of 4 of 10 annotations are left out") as warned:
        targets = val_targets(make(coco.root))
    message = next(str(w.message) for w in warned if "left out" in str(w.message))
    assert "2 have no positive size, first annotation 150 with bbox [5, 5, 0, 10] in image 12 (80×60)" in message
    assert "2 lie outside of their image, first annotation 152" in message
    assert targets[2]["boxes"].tolist() == [[70, 50, 90, 70]]
    with pytest.raises(
        ValueError, match=r"instances_val2017.json: boxes must not have no positive size.*annotation 150"
    ):
        make(coco.root, strict=True).setup("validate")


def test_a_test_file_may_list_pictures_only(coco: CocoMaker) -> None:
    root = coco.write()
    content = coco.splits["val2017"]
    listing = {key: content[key] for key in ("images", "categories")}
    (root / "annotations" / "image_info.json").write_text(json.dumps(listing))
    data = make(root, test_images="val2017", test_annotations="annotations/image_info.json")
    assert (data.test_split, data.predict_split) == ("val", "test")
    data.setup("predict")
    assert [len(targets[0]["labels"]) for _, targets in data.predict_dataloader()] == [0] * 4


# --- what is wrong -------------------------------------------------------------------------------------------


def change(**values: Any) -> Any:
    return lambda content: content["annotations"][1].update(values)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (change(category_id=5), r'annotation 101: category_id 5 is not in "categories", which has 3, 7\.'),
        (change(image_id=99), r"annotation 101: its image_id 99 is not among the 4 images"),
        (change(id=100), r"the id 100 stands for more than one annotation"),
        (change(id="a"), r'every annotation must be an object with an integer "id"'),
        (change(bbox=[1, 2, 3]), r"annotation 101: bbox must be \[x, y, width, height\], four numbers"),
        (change(bbox=[1, 2, float("nan"), 3]), r"annotation 101: bbox must be"),
        (change(iscrowd=2), r"annotation 101: iscrowd must be 0 or 1, got 2"),
        (change(area="big"), r"annotation 101: area must be a number"),
        (change(segmentation="polygon"), r"annotation 101: segmentation must be a list of polygons or an RLE object"),
        (change(segmentation=[1, 2, 3, 4, 5, 6]), r"annotation 101: segmentation must be a list of polygons, each a"),
        (change(segmentation=[[1, 2, 3, 4]]), r"annotation 101: segmentation has a polygon of 4 numbers"),
        (change(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), r"annotation 101: segmentation has a polygon of 7 numbers"),
        (
            change(segmentation={"size": [80, 60], "counts": [4800]}),
            r'annotation 101: segmentation as RLE must have "size" \[60, 80\]',
        ),
        (change(segmentation={"size": [60, 80], "counts": [5, 5]}), r"annotation 101: .* its counts sum up to 10, not"),
        (lambda c: c["images"].append(c["images"][0]), r"the id 0 stands for more than one image"),
        (lambda c: c["images"][1].pop("width"), r'image 1: "width" must be a positive integer, got None'),
        (lambda c: c["images"].clear(), r'"images" is empty'),
        (lambda c: c["categories"].append({"id": 3, "name": "x"}), r"more than one category has the id 3"),
        (lambda c: c["categories"].append({"id": 4, "name": "three"}), r"more than one category has the name 'three'"),
        (lambda c: c["categories"].clear(), r'"categories" must be a list of at least one category'),
        (lambda c: c["categories"].append({"id": 9, "name": "nine"}), r"category 9 is 'nine' in one and None in the"),
        (lambda c: c.pop("annotations"), r"must hold an object with the lists 'images', 'categories', 'annotations'"),
        (
            lambda c: c["images"][0].update(height=61),
            r"0.png is 80 wide and 60 high, but .* says 80 and 61 \(image 0\)",
        ),
        (change(segmentation=[]), None),
    ],
)
def test_mistakes_in_the_annotations(coco: CocoMaker, mistake: Any, message: str | None) -> None:
    mistake(coco.train)
    root = coco.write()
    if message is None:  # no mistake unless masks are asked for
        with pytest.warns(UserWarning, match="some annotations have no segmentation, first annotation 101"):
            make(root).setup("fit")
        message = "annotation 101 has no segmentation, but masks=True"
    with pytest.raises(ValueError, match=message) as raised:
        make(root, masks=True).setup("fit")
    assert "train2017" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"), [("not json", "not valid JSON"), ("[1, 2]", "holds a list"), ("", "JSON")]
)
def test_not_a_coco_file(coco: CocoMaker, text: str, message: str) -> None:
    path = coco.write() / "annotations" / "instances_train2017.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"instances_train2017.json is not a COCO annotations file.*{message}"):
        make(coco.root).setup("fit")


def test_missing_files_are_named(coco: CocoMaker, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        make(tmp_path / "nowhere").setup("fit")
    root = coco.write()
    with pytest.raises(FileNotFoundError, match=r"no annotations file .*other.json. In .* instances_val2017.json"):
        make(root, train_annotations="annotations/other.json").setup("fit")
    with pytest.raises(FileNotFoundError, match="no sub-folder 'elsewhere'"):
        make(root, train_images="elsewhere").setup("fit")
    (root / "train2017" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images of .* first 1.png \(image 1\)"):
        make(root).setup("fit")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sizes": []}, "sizes must hold at least one"),
        ({"sizes": [0]}, "sizes must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"crop_range": (600, 384)}, "crop_range must be"),
        ({"crop_probability": 1.5}, "crop_probability must be from 0 to 1, got 1.5"),
        ({"test_images": "test2017"}, "go together"),
    ],
)
def test_impossible_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CocoDataModule(**kwargs)


def test_packed_list_gives_back_what_it_got() -> None:
    items: list[Any] = [{"a": [1.5, "ä"]}, [], None, "text"]
    packed = PackedList(items)
    assert [packed[i] for i in range(4)] == items
    with pytest.raises(IndexError, match="no item 4"):
        packed[4]
