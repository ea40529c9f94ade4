"""COCO files that lie: absurd numbers, which would kill the process inside of pycocotools, and names of other files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lk_backbones.data import CocoDataModule
from tests.data.conftest import CocoMaker, save_image
from tests.hostile.conftest import Refused

FILE = "instances_val2017.json"
COMMAND = [
    *("validate", "--data", "CocoDataModule", "--data.root", "coco", "--data.num_workers", "0"),
    *("--model", "DetectionTask", "--model.architecture", "mask_rcnn", "--model.num_classes", "2"),
    *("--model.encoder", "replknet_31n", "--model.encoder_kwargs", '{"kernel_sizes": 3}'),
    *("--trainer.logger", "false", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
]


def annotation(**values: Any) -> Callable[[Any], None]:
    return lambda content: content["annotations"][1].update(values)


def image(**values: Any) -> Callable[[Any], None]:
    return lambda content: content["images"][1].update(values)


def polygon(*numbers: Any) -> Callable[[Any], None]:
    return annotation(segmentation=[list(numbers)])


def rle(counts: Any, *size: Any) -> Callable[[Any], None]:
    return annotation(segmentation={"size": list(size or (60, 80)), "counts": counts})


HERE = "annotation 101: segmentation"
ROWS: dict[str, tuple[Callable[[Any], None], str]] = {
    "far polygon": (polygon(0, 0, 1e30, 0, 10, 10), HERE + " has the coordinate 1e+30"),
    "far negative polygon": (polygon(0, 0, -1e9, 0, 10, 10), HERE + " has the coordinate -1000000000.0"),
    "huge integer": (polygon(0, 0, 10**400, 0, 10, 10), HERE + " has the coordinate 1000000"),
    "NaN in a polygon": (polygon(0, 0, float("nan"), 0, 10, 10), HERE + " must be a list of polygons"),
    "infinite polygon": (polygon(0, 0, float("inf"), 0, 10, 10), HERE + " has the coordinate inf"),
    "endless outline": (polygon(*[0, 0, 500000, 500000] * 20), HERE + " has a polygon of 40 corners whose outline is"),
    "millions of corners": (polygon(*[0, 0, 79, 59] * 100_000), HERE + " has a polygon of 200000 corners"),
    "odd polygon": (polygon(0, 0, 10, 0, 10, 10, 5), HERE + " has a polygon of 7 numbers"),
    "text in a polygon": (polygon(0, 0, "10", 0, 10, 10), HERE + " must be a list of polygons"),
    "truth in a polygon": (polygon(0, 0, True, 0, 10, 10), HERE + " must be a list of polygons"),
    "nested polygon": (polygon([0, 0, 10, 0, 10, 10]), HERE + " must be a list of polygons"),
    "flat polygon": (annotation(segmentation=[0, 0, 10, 0, 10, 10]), HERE + " must be a list of polygons"),
    "run lengths of text": (rle("~~~~"), HERE + ' has "counts" that are no run lengths'),
    "run lengths cut off": (rle("PPYo"), HERE + ' has "counts" that are no run lengths: it is cut off'),
    "no run lengths": (rle(""), HERE + ' has "counts" that are no run lengths: it is empty'),
    "short run lengths": (rle("52"), HERE + " cannot be decoded: its counts sum up to 7, not 60×80"),
    "short counts": (rle([10, 10]), HERE + " cannot be decoded: its counts sum up to 20, not 60×80"),
    "negative counts": (rle([5000, -200]), HERE + ' must have "counts" of integers from 0 on'),
    "huge counts": (rle([10**15]), HERE + ' must have "counts" of integers from 0 on'),
    "counts of fractions": (rle([4799.5, 0.5]), HERE + ' must have "counts" of integers from 0 on'),
    "RLE of another size": (rle([10000], 100, 100), HERE + ' as RLE must have "size" [60, 80]'),
    "RLE of an absurd size": (rle([10**18], 10**9, 10**9), HERE + ' as RLE must have "size"'),
    "RLE without a size": (annotation(segmentation={"counts": "52"}), HERE + ' as RLE must have "size"'),
    "NaN in a box": (annotation(bbox=[0, 0, float("nan"), 9]), "annotation 101: bbox must be"),
    "absurd box": (annotation(bbox=[0, 0, 1e300, 9]), "annotation 101: bbox must be"),
    "infinite area": (annotation(area=float("inf")), "annotation 101: area must be a number"),
    "image of a list": (annotation(image_id=[10]), "annotation 101: image_id must be the integer id of an image"),
    "category of an object": (annotation(category_id={}), "annotation 101: category_id must be the integer id"),
    "crowd of a list": (annotation(iscrowd=[1]), "annotation 101: iscrowd must be 0 or 1"),
    "huge id": (annotation(id=2**63), 'every annotation must be an object with an integer "id"'),
    "absurd picture": (image(width=10**9), 'image 11: "width" must be a positive integer'),
    "picture of another size": (
        lambda content: content["images"][2].update(width=81),
        "12.png is 80 wide and 60 high",
    ),
    "picture of a fraction": (image(height=60.0), 'image 11: "height" must be a positive integer'),
    "picture above": (image(file_name="../secret.png"), "image 11: \"file_name\" '../secret.png' leads out"),
    "picture far above": (image(file_name="a/../../secret.png"), "leads out of the folder"),
    "absolute picture": (image(file_name="/etc/secret.png"), "'/etc/secret.png' leads out of the folder"),
    "picture on a drive": (image(file_name="C:secret.png"), "'C:secret.png' leads out of the folder"),
    "picture on a server": (image(file_name="\\\\server\\secret.png"), "leads out of the folder"),
    "picture behind a backslash": (image(file_name="a\\secret.png"), "has a backslash"),
    "picture of control characters": (image(file_name="a\x1b[31m.png"), "has control characters"),
    "picture with a zero byte": (image(file_name="11.png\0"), "has control characters"),
}


def write(root: Path, mistake: Callable[[Any], None]) -> None:
    maker = CocoMaker(root)
    maker.write()
    content = maker.splits["val2017"]
    mistake(content)
    (root / "annotations" / FILE).write_text(json.dumps(content))


@pytest.mark.parametrize(("mistake", "message"), ROWS.values(), ids=ROWS)
def test_a_lying_file_is_refused(mistake: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    write(tmp_path, mistake)
    with pytest.raises(ValueError, match=re.escape(FILE)) as refusal:
        CocoDataModule(str(tmp_path), num_workers=0).setup("validate")
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 800


@pytest.mark.parametrize(
    "row", ["far polygon", "run lengths of text", "picture above", "picture of control characters"]
)
def test_a_command_refuses_it(row: str, workspace: Path, refused: Refused) -> None:
    mistake, message = ROWS[row]
    write(workspace / "coco", mistake)
    refused(COMMAND, FILE, message)


@pytest.mark.parametrize(
    "text",
    ['{"images": ' + "[" * 100_000, '{"images": [' + "9" * 5000 + "]}", '{"images": [{"id": 1', '{"images": []} {}'],
    ids=["deep", "endless number", "cut off", "twice"],
)
def test_json_that_cannot_be_read_is_named(text: str, workspace: Path, refused: Refused) -> None:
    root = CocoMaker(workspace / "coco").write()
    (root / "annotations" / FILE).write_text(text)
    refused(COMMAND, f"{FILE} is not a COCO annotations file")


def test_links_that_lead_outside_are_refused_and_linked_folders_are_not(tmp_path: Path) -> None:
    maker = CocoMaker(tmp_path / "coco")
    folder = maker.write() / "val2017"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    data = CocoDataModule(str(maker.root), num_workers=0)
    data.setup("validate")
    save_image(tmp_path / "secret.png", 60, 80, seed=5)
    (folder / "11.png").unlink()
    (folder / "11.png").symlink_to(tmp_path / "secret.png")
    message = r"instances_val2017.json, image 11: .* leads out of .*allow_outside=True"
    with pytest.raises(ValueError, match=message):
        CocoDataModule(str(maker.root), num_workers=0).setup("validate")
    data = CocoDataModule(str(maker.root), num_workers=0, check_files="off")
    data.setup("validate")
    with pytest.raises(ValueError, match=message):
        data.dataset("val").load(1)
    data = CocoDataModule(str(maker.root), num_workers=0, allow_outside=True)
    data.setup("validate")
    assert data.dataset("val").load(1)[0].shape == (60, 80, 3)
    maker.splits["val2017"]["images"][1]["file_name"] = "../../secret.png"
    maker.write()
    data = CocoDataModule(str(maker.root), num_workers=0, allow_outside=True)
    data.setup("validate")
    assert data.dataset("val").path(1) == str(folder / "../../secret.png")
