"""Reading pictures and label maps from disk, with errors that name the file and what would be right."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lk_backbones.data.classes import ClassTable

#: File name endings that are taken for pictures (lower case).
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2", ".avif")

#: File name endings that are taken for label maps: the lossless ones of the above.
MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif", ".pgm")

# What Pillow raises on files that are cut off, are no pictures, or are far too large.
_READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_EXIF_ORIENTATION = 0x0112


def natural_key(path: str | Path) -> list[tuple[int, int, str]]:
    """Returns a sorting key that puts ``frame2`` before ``frame10``, folder by folder, without regard to case."""
    key: list[tuple[int, int, str]] = []
    for part in Path(path).parts:
        for piece in re.split(r"(\d+)", part.lower()):
            if piece:
                key.append((0, int(piece), piece) if piece.isdigit() else (1, 0, piece))
        key.append((-1, 0, ""))  # a folder's own files come before those of a folder whose name goes on
    return key


def find_files(folder: Path, extensions: Iterable[str]) -> list[Path]:
    """Returns all files below ``folder`` with one of the extensions, natural order; hidden ones are left out."""
    wanted = tuple(extensions)
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.lower().endswith(wanted) and not name.startswith(".")]
    return sorted(found, key=natural_key)


def image_size(path: Path) -> tuple[int, int]:
    """Returns ``(height, width)`` as displayed, from the header alone.

    Raises:
        ValueError: The file is no picture.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            # Pillow decodes a whole PNG in search of EXIF data behind the pixels.
            has_exif = image.format != "PNG" or "exif" in image.info
            turned = has_exif and image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from error
    return (width, height) if turned else (height, width)


def read_image(path: Path, turn: bool = True) -> np.ndarray:
    """Reads a picture as RGB, turned as its EXIF orientation says.

    Greyscale is repeated in three channels, palettes are resolved, CMYK is converted, transparency is dropped. Of
    16-bit pictures the upper eight bits are kept. Floating-point pictures must have values in [0, 1].

    Args:
        path: The file.
        turn: False leaves the picture as it is stored, whatever its EXIF orientation.

    Returns:
        uint8 array `(H, W, 3)`, values 0 to 255.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is corrupt, cut off or no picture.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if turn:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = _from_integers(path, np.asarray(image))
            elif image.mode == "F":
                image = _from_floats(path, np.asarray(image))
            elif image.mode in ("P", "PA"):
                image = image.convert("RGBA")  # Pillow resolves palettes with transparency only this way
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"The image {path} does not exist.") from None
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from error


def _from_integers(path: Path, values: np.ndarray) -> Image.Image:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values run from {values.min()} to {values.max()}; 16-bit pictures hold 0 to 65535")
    return Image.fromarray((values // 256).astype(np.uint8))


def _from_floats(path: Path, values: np.ndarray) -> Image.Image:
    if not (values.min() >= 0 and values.max() <= 1):  # written so that NaN fails too
        raise ValueError(f"its values run from {values.min()} to {values.max()}; floating-point pictures hold 0 to 1")
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _unreadable(path: Path, error: BaseException) -> ValueError:
    reason = "it is empty" if path.is_file() and path.stat().st_size == 0 else str(error)
    return ValueError(f"The file {path} cannot be read as a picture: {reason}. Replace it or remove it.")


def read_labels(path: Path) -> np.ndarray:
    """Reads a label map: one channel of ids (8-bit, 16-bit, palette or black-and-white).

    Returns:
        Integer array `(H, W)` of the values in the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is corrupt, or is a colour picture and not a label map.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            image.load()
            labels = np.array(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise FileNotFoundError(f"The mask {path} does not exist.") from None
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from error
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
    """Maps the values of a label file to class indices.

    Args:
        path: The file, for messages.
        labels: Integer array `(H, W)`, the values in the file.
        table: The data set's classes.
        lookup: ``table.lookup()``, made once by the caller.

    Returns:
        uint8 array `(H, W)`: class index or 255.

    Raises:
        ValueError: A value belongs to no class.
    """
    inside = labels if labels.dtype == np.uint8 else np.clip(labels, 0, len(lookup) - 1)
    classes = lookup[inside]
    unknown = (classes < 0) if inside is labels else ((classes < 0) | (inside != labels))
    if unknown.any():
        values, counts = np.unique(labels[unknown], return_counts=True)
        shown = ", ".join(f"{value} ({count} pixels)" for value, count in zip(values[:5], counts[:5], strict=True))
        more = f" and {len(values) - 5} more" if len(values) > 5 else ""
        raise ValueError(
            f"The mask {path} has labels that belong to no class: {shown}{more}. "
            f"Labels may be {table.describe_labels()}. Correct the mask, or add the class to the classes file."
        )
    return classes.astype(np.uint8)
