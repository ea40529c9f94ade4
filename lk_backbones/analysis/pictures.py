"""Pictures to look at a model with: a folder's, drawn scenes, noise. All are float32 ``(C, H, W)`` in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lk_backbones.data.checks import require_files, require_folders
from lk_backbones.data.reading import IMAGE_EXTENSIONS, find_files, read_image
from lk_backbones.data.scenes.drawing import draw_scene

__all__ = ["Pictures", "folder_pictures", "noise_pictures", "scene_pictures"]

#: Added to the seed of scenes, so that they are none of those of the data modules.
_SERIES = 3


@dataclass(frozen=True)
class Pictures:
    """A series of pictures, made one at a time, each time anew.

    Attributes:
        description: What they are, to be told with every result.
        make: Starts the series; the number of channels is given.
    """

    description: str
    make: Callable[[int], Iterator[torch.Tensor]]


def folder_pictures(folder: str | Path, size: tuple[int, int], number: int | None = None) -> Pictures:
    """Take all pictures below a folder in natural order, resized as RepLKNet's ``visualize_erf.py`` does.

    Args:
        folder: The folder, or one picture.
        size: ``(height, width)`` that each is resized to, bicubic, whatever its shape: nothing is cut off.
        number: How many will be used, for the description.

    Raises:
        FileNotFoundError: If there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if folder.is_file():
        files = [folder]
    else:
        require_folders(folder, [], "pictures")
        files = find_files(folder, IMAGE_EXTENSIONS)
        require_files(files, folder)
    count = len(files) if number is None else min(number, len(files))

    def make(channels: int) -> Iterator[torch.Tensor]:
        _require_rgb(channels)
        for file in files:
            picture = Image.fromarray(read_image(file))
            yield _to_tensor(np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)))

    return Pictures(f"{count} {'picture' if count == 1 else 'pictures'} of {folder}", make)


def scene_pictures(size: tuple[int, int], number: int, seed: int = 0) -> Pictures:
    """Draw street scenes, as `lk_backbones.data.SyntheticScenesDataModule` has them but others than its own.

    Args:
        size: ``(height, width)``, both at least 64.
        number: How many.
        seed: Another number gives other scenes.

    Raises:
        ValueError: If the size is too small.
    """
    height, width = size
    if min(size) < 64:
        raise ValueError(f"scenes are drawn at 64 × 64 pixels and more, not at {height} × {width}: use noise")

    def make(channels: int) -> Iterator[torch.Tensor]:
        _require_rgb(channels)
        for index in range(number):
            scene = draw_scene(np.random.default_rng((seed, _SERIES, index)), height, max(height, width))
            left = (max(height, width) - width) // 2  # scenes are no narrower than high
            yield _to_tensor(scene.image[:, left : left + width])

    return Pictures(f"{number} drawn {'scene' if number == 1 else 'scenes'}", make)


def noise_pictures(size: tuple[int, int], number: int, seed: int = 0) -> Pictures:
    """Make pictures of evenly distributed noise, for models of any number of channels.

    Args:
        size: ``(height, width)``.
        number: How many.
        seed: Another number gives other noise.
    """

    def make(channels: int) -> Iterator[torch.Tensor]:
        for index in range(number):
            noise = np.random.default_rng((seed, _SERIES, index)).random((channels, *size), dtype=np.float32)
            yield torch.from_numpy(noise)

    return Pictures(f"{number} {'picture' if number == 1 else 'pictures'} of noise", make)


def _require_rgb(channels: int) -> None:
    if channels != 3:
        raise ValueError(f"the model takes images of {channels} channels, pictures and scenes have 3: use noise")


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
