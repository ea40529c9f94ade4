from __future__ import annotations

import json
from pathlib import Path

import pytest

from lk_backbones.data.classes import IGNORE_INDEX, load_table, read_classes_file
from lk_backbones.drawing.palette import class_palette

# Of the label definitions that come with Cityscapes: the 19 classes in the order of their train ids.
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip


def test_cityscapes_maps_every_id() -> None:
    table = load_table("cityscapes")
    assert table.names == tuple(CITYSCAPES)
    ids = list(CITYSCAPES.values())
    lookup = table.lookup()
    for label in range(34):
        assert lookup[label] == (ids.index(label) if label in ids else IGNORE_INDEX), label
    assert (lookup[34:] == -1).all()
    assert table.colors[0] == (128, 64, 128)
    assert table.colors[13] == (0, 0, 142)
    assert table.describe_labels().startswith(
        "7..8, 11..13, 17, 19..28, 31..33 (road to bicycle), ignored: 0..6, 9..10"
    )


def test_ade20k_shifts_by_one() -> None:
    table = load_table("ade20k")
    assert len(table) == len(set(table.names)) == 150
    assert (table.names[0], table.names[1], table.names[149]) == ("wall", "building", "flag")
    lookup = table.lookup()
    assert lookup[0] == IGNORE_INDEX
    assert lookup[1:151].tolist() == list(range(150))
    assert (lookup[151:] == -1).all()
    assert table.colors[2] == (6, 230, 230)  # sky


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_json_with_everything(tmp_path: Path) -> None:
    content = {"names": ["a", "b"], "colors": [[1, 2, 3], [4, 5, 6]], "ignore_index": 11, "comment": "kept out"}
    table = read_classes_file(write(tmp_path, "classes.json", json.dumps(content)))
    assert table.names == ("a", "b")
    assert table.colors == ((1, 2, 3), (4, 5, 6))
    assert table.class_of_label == {0: 0, 1: 1, 11: 255, 255: 255}
    assert read_classes_file(tmp_path / "classes.json", ignore_label=7).class_of_label == {0: 0, 1: 1, 7: 255, 255: 255}


def test_lists_and_text(tmp_path: Path) -> None:
    table = read_classes_file(write(tmp_path, "a.json", '["sky", "tree"]'))
    assert table.names == ("sky", "tree")
    assert table.colors == tuple(class_palette(2))
    table = read_classes_file(write(tmp_path, "classes.txt", "\ufeffsky\n traffic light \n\n"))
    assert table.names == ("sky", "traffic light")
    assert table.class_of_label == {0: 0, 1: 1, 255: 255}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not valid JSON: Expecting"),
        ('{"classes": ["a"]}', r'the key "names", but has the keys \[\'classes\'\]'),
        ("3", r"but has a int"),
        ("[]", r'"names" must be a list with at least one class name'),
        ('["a", 3]', r'"names" must be a list with at least one class name, all of them text'),
        ('["a", "b", "a"]', r"names these classes more than once: a\."),
        (json.dumps([str(i) for i in range(256)]), r"names 256 classes, but 255"),
        ('{"names": ["a"], "colors": [[0, 0, 0], [1, 1, 1]]}', r'"colors" must be a list of 1 colours.*got 2'),
        ('{"names": ["a"], "colors": [[0, 0, 256]]}', r'"colors"\[0\] must be \[red, green, blue\] from 0 to 255'),
        ('{"names": ["a", "b"], "ignore_index": 1}', r"the ignored label 1 is also the label of class 'b'"),
        ('{"names": ["a"], "ignore_index": "x"}', r"\"ignore_index\" must be a label value \(0 or more\), got 'x'"),
    ],
)
def test_malformed_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"classes\.json.*{message}"):
        read_classes_file(write(tmp_path, "classes.json", text))


def test_malformed_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"classes\.txt, line 2 is empty"):
        read_classes_file(write(tmp_path, "classes.txt", "a\n\nb\n"))
    with pytest.raises(ValueError, match=r"classes\.txt.*at least one class name"):
        read_classes_file(write(tmp_path, "classes.txt", "\n"))
    (tmp_path / "latin.txt").write_bytes("Gebäude".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        read_classes_file(tmp_path / "latin.txt")
    with pytest.raises(FileNotFoundError, match=r"no classes file .*none\.txt.*one class name per line"):
        read_classes_file(tmp_path / "none.txt")
