from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from lk_backbones.data.classes import ClassTable
from lk_backbones.data.reading import (
    find_files,
    image_size,
    labels_to_classes,
    natural_key,
    read_image,
    read_labels,
)

RGB = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]], [[0, 0, 0], [255, 255, 255]]], np.uint8)
GREY = np.array([[0, 50], [100, 150], [200, 255]], np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    assert np.array_equal(read_image(save(tmp_path / "a.png", Image.fromarray(RGB))), RGB)


def test_grey_is_repeated(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.png", Image.fromarray(GREY)))
    assert np.array_equal(image, np.repeat(GREY[..., None], 3, 2))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped(tmp_path: Path, mode: str) -> None:
    source = RGB if mode == "RGBA" else GREY[..., None]
    pixels = np.concatenate([source, np.full((3, 2, 1), 7, np.uint8)], axis=2)
    image = read_image(save(tmp_path / "a.png", Image.fromarray(pixels)))
    assert np.array_equal(image, np.broadcast_to(source, (3, 2, 3)))


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_are_resolved(tmp_path: Path, transparent: bool) -> None:
    palette = Image.fromarray(RGB).quantize(6)
    options = {"transparency": 0} if transparent else {}
    assert np.array_equal(read_image(save(tmp_path / "a.png", palette, **options)), RGB)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.tif", Image.fromarray(RGB).convert("CMYK")))
    assert np.array_equal(image, RGB)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_of_16_bits_the_upper_8_are_kept(tmp_path: Path, extension: str) -> None:
    pixels = np.array([[0, 255], [256, 25700], [50000, 65535]], np.uint16)
    image = read_image(save(tmp_path / f"a.{extension}", Image.fromarray(pixels)))
    assert np.array_equal(image[..., 1], [[0, 0], [1, 100], [195, 255]])


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_of_16_bit_colours_the_upper_8_are_kept(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    assert cv2.imwrite(str(path), RGB[..., ::-1].astype(np.uint16) * 256 + 200)
    assert np.array_equal(read_image(path), RGB)


def test_floats_are_taken_as_0_to_1(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)))
    assert read_image(path)[0, :, 0].tolist() == [0, 128, 255]
    path = save(tmp_path / "b.tif", Image.fromarray(np.array([[0.0, 300.0]], np.float32)))
    with pytest.raises(ValueError, match=r"b\.tif cannot be read as a picture: its values run from 0\.0 to 300\.0"):
        read_image(path)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    path = save(tmp_path / "a.png", Image.fromarray(RGB), exif=exif)
    assert np.array_equal(read_image(path), np.rot90(RGB, -1))
    assert image_size(path) == (2, 3)
    path = save(tmp_path / "b.png", Image.fromarray(GREY), exif=exif)
    assert np.array_equal(read_labels(path), np.rot90(GREY, -1))


def test_size_comes_from_the_header(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(np.zeros((300, 200, 3), np.uint8)))
    path.write_bytes(path.read_bytes()[:60])
    assert image_size(path) == (300, 200)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    whole = save(
        tmp_path / "whole.jpg", Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    )
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read as a picture: .*truncated.*Replace it or remove it"):
        read_image(cut)
    text = tmp_path / "text.png"
    text.write_text("hello")
    for read in (read_image, read_labels, image_size):
        with pytest.raises(ValueError, match=r"text\.png cannot be read as a picture"):
            read(text)
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.png cannot be read as a picture: it is empty"):
        read_image(empty)
    with pytest.raises(FileNotFoundError, match=r"The image .*none\.png does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match=r"The mask .*none\.png does not exist"):
        read_labels(tmp_path / "none.png")


def test_labels_of_every_single_channel_mode(tmp_path: Path) -> None:
    assert np.array_equal(read_labels(save(tmp_path / "l.png", Image.fromarray(GREY))), GREY)
    palette = Image.fromarray(GREY % 7)
    palette.putpalette(list(range(21)))
    assert np.array_equal(read_labels(save(tmp_path / "p.png", palette)), GREY % 7)
    wide = GREY.astype(np.uint16) * 100
    assert np.array_equal(read_labels(save(tmp_path / "i.png", Image.fromarray(wide))), wide)
    black_and_white = save(tmp_path / "1.png", Image.fromarray(GREY > 120))
    assert np.array_equal(read_labels(black_and_white), (GREY > 120).astype(np.uint8))


def test_colour_masks_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.png is a RGB picture, but must be a label map.*ids\[\(rgb == c\)"):
        read_labels(save(tmp_path / "a.png", Image.fromarray(RGB)))
    grey = Image.fromarray(np.repeat(GREY[..., None], 3, 2))
    with pytest.raises(ValueError, match=r"b\.png is a RGB picture.*three channels are equal.*getchannel\(0\)"):
        read_labels(save(tmp_path / "b.png", grey))


def test_unknown_labels_are_counted(tmp_path: Path) -> None:
    table = ClassTable(("a", "b"), ((0, 0, 0), (1, 1, 1)), {0: 0, 1: 1, 9: 255, 255: 255})
    lookup = table.lookup()
    labels = np.array([[0, 1, 9, 255]], np.uint8)
    assert labels_to_classes(Path("m.png"), labels, table, lookup).tolist() == [[0, 1, 255, 255]]
    wrong = np.array([[0, 2, 2, 7]], np.uint8)
    message = (
        r"m\.png has labels that belong to no class: 2 \(2 pixels\), 7 \(1 pixels\)\. Labels may be 0\.\.1 \(a to b\)"
    )
    with pytest.raises(ValueError, match=message):
        labels_to_classes(Path("m.png"), wrong, table, lookup)
    for value in (-1, 300, 70000):
        with pytest.raises(ValueError, match=rf"{value} \(1 pixels\)"):
            labels_to_classes(Path("m.png"), np.array([[0, value]], np.int32), table, lookup)


def test_natural_order(tmp_path: Path) -> None:
    names = ["frame10.png", "frame2.png", "Frame1.png", "b/x.png", "b 2/x.png", "frame1b.png", "a/2.png", "a/10.png"]
    ordered = sorted(names, key=natural_key)
    assert ordered == [
        "a/2.png",
        "a/10.png",
        "b/x.png",
        "b 2/x.png",
        "Frame1.png",
        "frame1b.png",
        "frame2.png",
        "frame10.png",
    ]


def test_files_are_found_in_any_depth(tmp_path: Path) -> None:
    wanted = ["10.PNG", "2.png", "deep/er/1.jpg"]
    for name in [*wanted, ".hidden.png", ".cache/3.png", "notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    linked = tmp_path / "else"
    linked.mkdir()
    (tmp_path / "deep" / "link").symlink_to(linked)
    (linked / "4.png").touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path, [".png", ".jpg"])]
    assert found == ["2.png", "10.PNG", "deep/er/1.jpg", "deep/link/4.png", "else/4.png"]
