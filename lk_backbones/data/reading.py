"""Reading pictures and label maps from disk, with errors that name the file and what would be right."""

import os
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from lk_backbones.data.classes import ClassTable

#: File name endings that are taken for pictures (lower case).
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2", ".avif")

#: File name endings that are taken for label maps: the lossless ones of the above.
MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm")

#: What Pillow raises on files that are cut off, are no pictures, or are far too large.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_EXIF_ORIENTATION = 0x0112

# What a PNG file may hold beside its pixels without being more than a plain one: nothing that changes a pixel or turns
# the picture. Texts may hold an orientation; see _is_plain_png.
_PLAIN_CHUNKS = frozenset(b"IHDR IDAT IEND pHYs tIME gAMA cHRM sRGB iCCP tEXt zTXt iTXt".split())


def natural_key(path: str | Path) -> list[tuple[int, int, str]]:
    """Return a sorting key that puts ``frame2`` before ``frame10``, folder by folder, without regard to case."""
    key: list[tuple[int, int, str]] = []
    for part in Path(path).parts:
        for piece in re.split(r"(\d+)", part.lower()):
            if piece:
                key.append((0, int(piece), piece) if piece.isdigit() else (1, 0, piece))
        key.append((-1, 0, ""))  # a folder's own files come before those of a folder whose name goes on
    return key


def find_files(folder: Path, extensions: Iterable[str]) -> list[Path]:
    """Return all files below ``folder`` with one of the extensions, natural order; hidden ones are left out."""
    wanted = tuple(extensions)
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.lower().endswith(wanted) and not name.startswith(".")]
    return sorted(found, key=natural_key)


def image_size(path: Path) -> tuple[int, int]:
    """Return ``(height, width)`` as displayed, from the header alone.

    Raises:
        ValueError: If the file is no picture.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            # Pillow decodes a whole PNG in search of EXIF data behind the pixels.
            has_exif = image.format != "PNG" or "exif" in image.info
            turned = has_exif and image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
    return (width, height) if turned else (height, width)


def read_image(path: Path, turn: bool = True) -> np.ndarray:
    """Read a picture as RGB, turned as its EXIF orientation says.

    Greyscale is repeated in three channels, palettes are resolved, CMYK is converted, transparency is dropped. Of
    16-bit pictures the upper eight bits are kept. Floating-point pictures must have values in [0, 1].

    Args:
        path: The file.
        turn: False leaves the picture as it is stored, whatever its EXIF orientation.

    Returns:
        uint8 array ``(H, W, 3)``, values 0 to 255.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt, cut off or no picture.
    """
    try:
        plain = _read_plain_png(path)
        if plain is not None:
            return plain if plain.ndim == 3 else cv2.cvtColor(plain, cv2.COLOR_GRAY2RGB)
        with Image.open(path) as image:
            image.load()
            if turn:
                image = _turned(image)
            if image.mode.startswith("I"):
                image = _from_integers(path, np.asarray(image))
            elif image.mode == "F":
                image = _from_floats(path, np.asarray(image))
            elif image.mode in ("P", "PA"):
                image = image.convert("RGBA")  # Pillow resolves palettes with transparency only this way
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"The image {path} does not exist.") from None
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def open_image(path: str | Path, turn: bool = True) -> Image.Image:
    """Open a picture as RGB; of a usual JPEG file only the header is read, and the pixels when they are asked for.

    Whoever wants a part of a large JPEG picture, or a small copy, can then have it decoded at a fraction of its size
    (`PIL.Image.Image.draft`), which saves most of the time.

    Args:
        path: The file.
        turn: False leaves the picture as it is stored, whatever its EXIF orientation.

    Returns:
        The picture; grey or RGB if it is not decoded yet, else RGB. What is wrong with the pixels of one that is not
        decoded comes up later, as an error for `unreadable`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt, cut off or no picture.
    """
    path = Path(path)
    try:
        image = Image.open(path)
        upright = image.format == "JPEG" and (not turn or image.getexif().get(_EXIF_ORIENTATION, 1) == 1)
        if upright and image.mode in ("L", "RGB"):
            return image
        image.close()
    except FileNotFoundError:
        raise FileNotFoundError(f"The image {path} does not exist.") from None
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
    return Image.fromarray(read_image(path, turn))


def _turned(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF orientation says; one that is upright is not copied."""
    upright = image.getexif().get(_EXIF_ORIENTATION, 1) == 1
    return image if upright else ImageOps.exif_transpose(image)


def _read_plain_png(path: Path, grey: bool = False) -> np.ndarray | None:
    """Read a PNG file of the usual kind with OpenCV, which takes three quarters of Pillow's time.

    Usual are 8 bits of grey or RGB, without transparency and orientation, and without damage: OpenCV takes some damaged
    files for whole ones, and says nothing of what is wrong with others.

    Args:
        path: The file.
        grey: Read only grey ones.

    Returns:
        uint8 array, grey ``(H, W)`` or RGB ``(H, W, 3)``; None leaves the file to Pillow.
    """
    with open(path, "rb") as file:
        header = file.read(33)
        if len(header) < 33 or header[:8] != b"\x89PNG\r\n\x1a\n":
            return None
        _, kind, width, height, bits, colour, *_, interlaced = struct.unpack_from(">I4sIIBBBBB", header, 8)
        if kind != b"IHDR" or bits != 8 or colour not in ((0,) if grey else (0, 2)) or interlaced:
            return None
        if not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 2**30):  # Pillow warns of more, and refuses much more
            return None
        content = header + file.read()
    if not _is_plain_png(content):
        return None
    flags = cv2.IMREAD_GRAYSCALE if colour == 0 else cv2.IMREAD_COLOR
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    if pixels is None or pixels.shape[:2] != (height, width):
        return None
    return pixels if colour == 0 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


def _is_plain_png(content: bytes) -> bool:
    """Return whether all chunks of a PNG file are there, undamaged, and of the plain kinds."""
    view, place = memoryview(content), 8
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length
        if kind not in _PLAIN_CHUNKS or end > len(content):
            return False
        data = view[place + 4 : end - 4]
        if zlib.crc32(data) != int.from_bytes(view[end - 4 : end], "big"):
            return False
        if bytes(data[4:16]).startswith((b"Raw profile", b"XML:")) and kind in (b"tEXt", b"zTXt", b"iTXt"):
            return False  # EXIF data or XMP, in which an orientation may be
        if kind == b"IEND":
            return True
        place = end
    return False


def _from_integers(path: Path, values: np.ndarray) -> Image.Image:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values run from {values.min()} to {values.max()}; 16-bit pictures hold 0 to 65535")
    return Image.fromarray((values // 256).astype(np.uint8))


def _from_floats(path: Path, values: np.ndarray) -> Image.Image:
    if not (values.min() >= 0 and values.max() <= 1):  # written so that NaN fails too
        raise ValueError(f"its values run from {values.min()} to {values.max()}; floating-point pictures hold 0 to 1")
    return Image.fromarray((values * 255).round().astype(np.uint8))


def unreadable(path: Path, error: BaseException) -> ValueError:
    """Return the error that says of a file that it is no picture, or no whole one.

    Args:
        path: The file.
        error: One of `READ_ERRORS`.
    """
    reason = "it is empty" if path.is_file() and path.stat().st_size == 0 else str(error)
    return ValueError(f"The file {path} cannot be read as a picture: {reason}. Replace it or remove it.")


def read_labels(path: Path) -> np.ndarray:
    """Read a label map: one channel of ids (8-bit, 16-bit, palette or black-and-white).

    Returns:
        Integer array ``(H, W)`` of the values in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt, or is a colour picture and not a label map.
    """
    try:
        plain = _read_plain_png(path, grey=True)
        if plain is not None:
            return plain
        with Image.open(path) as image:
            mode = image.mode
            image.load()
            labels = np.array(_turned(image))
    except FileNotFoundError:
        raise FileNotFoundError(f"The mask {path} does not exist.") from None
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
    if mode == "1":
        return labels.astype(np.uint8)
    if mode not in ("L", "P") and not mode.startswith("I"):
        raise ValueError(
            f"The mask {path} is a {mode} picture, but must be a label map: one channel whose values are class ids. "
            + _conversion_hint(labels)
        )
    return labels


def _conversion_hint(pixels: np.ndarray) -> str:
    if pixels.ndim == 3 and pixels.shape[2] >= 3 and (pixels[..., :1] == pixels[..., 1:3]).all():
        return (
            "Its three channels are equal, so it is probably an id map that was saved as RGB: save one channel, "
            'e.g. Image.open(path).getchannel(0).save(path), with "from PIL import Image".'
        )
    return (
        "To convert a map of colours: ids = np.full(rgb.shape[:2], 255, np.uint8); for every class i with colour c "
        "ids[(rgb == c).all(-1)] = i; then Image.fromarray(ids).save(path)."
    )


def labels_to_classes(path: Path, labels: np.ndarray, table: ClassTable, lookup: np.ndarray) -> np.ndarray:
    """Map the values of a label file to class indices.

    Args:
        path: The file, for messages.
        labels: Integer array ``(H, W)``, the values in the file.
        table: The data set's classes.
        lookup: ``table.lookup()``, made once by the caller.

    Returns:
        uint8 array ``(H, W)``: class index or 255.

    Raises:
        ValueError: If a value belongs to no class.
    """
    if labels.dtype == np.uint8:  # by far the most common, and the tables of OpenCV are much faster than NumPy's
        table_of_bytes = lookup[:256]
        classes = cv2.LUT(labels, table_of_bytes.astype(np.uint8))
        unknown = cv2.LUT(labels, (table_of_bytes < 0).astype(np.uint8)).view(bool)
    else:
        inside = np.clip(labels, 0, len(lookup) - 1)
        found = lookup[inside]
        classes, unknown = found.astype(np.uint8), (found < 0) | (inside != labels)
    if unknown.any():
        values, counts = np.unique(labels[unknown], return_counts=True)
        shown = ", ".join(f"{value} ({count} pixels)" for value, count in zip(values[:5], counts[:5], strict=True))
        more = f" and {len(values) - 5} more" if len(values) > 5 else ""
        raise ValueError(
            f"The mask {path} has labels that belong to no class: {shown}{more}. "
            f"Labels may be {table.describe_labels()}. Correct the mask, or add the class to the classes file."
        )
    return classes
