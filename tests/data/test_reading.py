from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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


# --- PNG files that OpenCV reads ------------------------------------------------------------------------------------

SMOOTH = np.add.outer(np.arange(41), np.arange(67)).astype(np.uint8)
PLAIN = {"L": SMOOTH, "RGB": np.stack([SMOOTH, SMOOTH[::-1], 255 - SMOOTH], axis=2)}


def chunks_of(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        chunks.append((kind, content[place + 8 : place + 8 + length]))
        place += 12 + length
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def interlaced(pixels: np.ndarray) -> bytes:
    """A PNG file of grey or RGB pixels in the seven passes of Adam7."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [b"\0" + row.tobytes() for top, left, dy, dx in passes for row in pixels[top::dy, left::dx]]
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 1)
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")])


@pytest.mark.parametrize("mode", PLAIN)
def test_plain_png_files_do_not_take_the_slow_way(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ä b.png"
    text = PngInfo()
    text.add_text("Comment", "of no importance")
    Image.fromarray(PLAIN[mode]).save(path, pnginfo=text, dpi=(72, 72))
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("read by Pillow"))
    image = read_image(path)
    assert np.array_equal(image, np.broadcast_to(PLAIN[mode].reshape(41, 67, -1), (41, 67, 3)))
    assert image.flags.writeable
    assert image.flags.c_contiguous
    if mode == "L":
        assert np.array_equal(read_labels(path), SMOOTH)


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("kind", ["exif", "xmp", "transparent", "interlaced", "interlaced grey", "trailing bytes"])
def test_other_png_files_are_read_as_pillow_reads_them(tmp_path: Path, kind: str) -> None:
    path, image = tmp_path / "a.png", Image.fromarray(PLAIN["RGB"])
    expected = PLAIN["RGB"]
    if kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
        expected = np.rot90(expected, -1)
    elif kind == "xmp":
        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", XMP)
        image.save(path, pnginfo=text)
        with Image.open(path) as stored:
            turned = stored.getexif().get(0x0112, 1) == 6  # newer releases of Pillow look into XMP
        expected = np.rot90(expected, -1) if turned else expected
    elif kind == "transparent":
        image.save(path, transparency=tuple(int(v) for v in PLAIN["RGB"][0, 0]))
    elif kind == "trailing bytes":
        image.save(path)
        path.write_bytes(path.read_bytes() + bytes(100))
    else:
        grey = kind.endswith("grey")
        path.write_bytes(interlaced(SMOOTH if grey else expected))
        if grey:
            assert np.array_equal(read_labels(path), SMOOTH)
            expected = np.repeat(SMOOTH[..., None], 3, 2)
    assert np.array_equal(read_image(path), expected)


def by_pillow(path: Path) -> np.ndarray | None:
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


@pytest.mark.parametrize("mode", PLAIN)
def test_damaged_png_files_are_judged_as_ever(tmp_path: Path, mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PLAIN[mode]).save(path)
    content = path.read_bytes()
    chunks = chunks_of(content)
    pixels = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
    header = chunks[0][1]
    rng = np.random.default_rng(0)
    damaged = [content[: int(cut)] for cut in rng.integers(0, len(content), 40)]
    for place in rng.integers(8, len(content), 60):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    usual = len(damaged)
    # whole chunks, checksums and all, that do not hold what they should
    for rows in (pixels[: len(pixels) // 2], b"", b"\x09" + pixels[1:]):
        damaged.append(png_of([chunks[0], (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]))
    damaged.append(png_of([chunks[0], (b"IDAT", zlib.compress(pixels)[:50]), (b"IEND", b"")]))
    damaged.append(png_of([chunks[0], (b"IEND", b"")]))
    damaged.append(png_of([(b"IHDR", bytes(8) + header[8:]), *chunks[1:]]))
    damaged.append(png_of([(b"IHDR", struct.pack(">II", 70000, 70000) + header[8:]), *chunks[1:]]))
    refused = 0
    for i, data in enumerate(damaged):
        if i == usual:
            assert capfd.readouterr().err == ""  # OpenCV sees, and complains of, nothing that is cut or flipped
        path.write_bytes(data)
        expected = by_pillow(path)
        if expected is None:
            refused += 1
            with pytest.raises(ValueError, match=rf"{re.escape(str(path))} cannot be read as a picture"):
                read_image(path)
        else:
            assert np.array_equal(read_image(path), expected)
    assert refused > 75
