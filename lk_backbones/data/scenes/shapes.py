"""Drawn pictures whose class is told by an outline and by a texture; and ones in which the two disagree.

After the cue-conflict pictures of Geirhos et al., "ImageNet-trained CNNs are biased towards texture" (ICLR 2019). The
outline can only be told from the whole of a shape; the texture can be told from any few pixels inside it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from lk_backbones.data.classes import ClassTable
from lk_backbones.data.classification import ClassificationDataModule, ClassificationDataset, table_of
from lk_backbones.data.datamodule import Split, require_at_least
from lk_backbones.data.sampling import evaluation_loader

__all__ = ["OUTLINES", "TEXTURES", "SyntheticShapesDataModule", "draw_shape"]

_SERIES = {"train": 0, "val": 1, "test": 2, "conflict": 3}


# ---- outlines: polygons in the unit square around 0, whatever their size ----


def _regular(corners: int, first: float = -0.5) -> np.ndarray:
    angles = (np.arange(corners) * 2 / corners + first) * math.pi
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(points: int, inner: float) -> np.ndarray:
    star = _regular(2 * points)
    star[1::2] *= inner
    return star


def _cross(width: float) -> np.ndarray:
    quarter = np.array([[-width, -1], [width, -1], [width, -width]])
    turn = np.array([[0, 1], [-1, 0]])  # by a right angle, clockwise in pictures
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)]) / math.hypot(1, width)


def _crescent() -> np.ndarray:
    outer = np.linspace(0.25 * math.pi, 1.75 * math.pi, 40)
    inner = outer[::-1]
    bow = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    hollow = np.stack([0.42 + 0.72 * np.cos(inner), 0.87 * np.sin(inner)], axis=1)
    return np.concatenate([bow, hollow])


def _arrow() -> np.ndarray:
    return np.array([[0, -1], [0.8, -0.1], [0.3, -0.1], [0.3, 0.95], [-0.3, 0.95], [-0.3, -0.1], [-0.8, -0.1]])


#: Outlines by name, in the order of the classes.
OUTLINES: dict[str, np.ndarray] = {
    "disc": _regular(60),
    "triangle": _regular(3),
    "square": _regular(4, 0.25),
    "star": _star(5, 0.45),
    "cross": _cross(0.33),
    "crescent": _crescent(),
    "arrow": _arrow(),
    "gear": _star(9, 0.72),
}


# ---- textures: 0 to 1, of turned and shifted coordinates in pixels ----


def _stripes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (x % 6 < 3).astype(np.float32)


def _checks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ((x // 4 + y // 4) % 2).astype(np.float32)


def _dots(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (np.hypot(x % 7 - 3.5, y % 7 - 3.5) < 2.1).astype(np.float32)


def _grid(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ((x % 6 < 1.5) | (y % 6 < 1.5)).astype(np.float32)


def _waves(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ((x + 2 * np.sin(y * 2 * math.pi / 9)) % 7 < 3.5).astype(np.float32)


def _bricks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = y // 5
    return ((y % 5 < 1.3) | ((x + 5 * (row % 2)) % 10 < 1.3)).astype(np.float32)


def _speckles(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2, x.shape).astype(np.float32)


def _clouds(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = cv2.GaussianBlur(rng.normal(size=x.shape).astype(np.float32), (0, 0), 2.5)
    return np.clip(0.5 + 1.2 * noise / noise.std() / 2, 0, 1)


#: Textures by name, in the order of the classes.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "grid": _grid,
    "waves": _waves,
    "bricks": _bricks,
    "speckles": _speckles,
    "clouds": _clouds,
}


def draw_shape(rng: np.random.Generator, size: int, outline: int, texture: int) -> np.ndarray:
    """Draw a shape on a plain ground; place, size, turn and colours are up to chance and tell nothing of the class.

    Args:
        rng: Chance.
        size: Height and width of the picture.
        outline: Which of `OUTLINES`.
        texture: Which of `TEXTURES`.

    Returns:
        uint8 RGB ``(size, size, 3)``.
    """
    radius = size * rng.uniform(0.3, 0.42)
    center = size / 2 + rng.uniform(-1, 1, 2) * (size / 2 - radius - 2)
    angle = rng.uniform(-0.35, 0.35)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = (list(OUTLINES.values())[outline] * radius) @ turn.T + center
    mask = np.zeros((size, size), np.uint8)
    # in sixteenths of a pixel, without edges of steps
    cv2.fillPoly(mask, [np.round(corners * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)

    angle = rng.uniform(0, math.pi)
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    shift = rng.uniform(0, 100, 2)
    x = columns * math.cos(angle) + rows * math.sin(angle) + shift[0] + 10 * size
    y = rows * math.cos(angle) - columns * math.sin(angle) + shift[1] + 10 * size
    pattern = list(TEXTURES.values())[texture](x, y, rng)[..., None]

    ground = rng.uniform(0, 255, 3)
    light, dark = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
    # the two colours of the texture differ from each other and from the ground: all of the outline is to be seen
    while abs((light - dark).mean()) < 70 or min(np.abs(light - ground).max(), np.abs(dark - ground).max()) < 70:
        light, dark = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
    inside = (mask / 255.0)[..., None]
    pixels = ground * (1 - inside) + (light * pattern + dark * (1 - pattern)) * inside
    return (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class _Drawn:
    """Pictures of one of the disjoint series; picture ``index`` is always the same."""

    series: str
    length: int
    size: int
    seed: int

    def __post_init__(self) -> None:
        require_at_least(f"{self.series}_images", self.length, 1)
        require_at_least("image_size", self.size, 32)

    def cues(self, index: int) -> tuple[int, int]:
        """Outline and texture of a picture: the same class or, in the series of conflicts, every pair in turn."""
        classes = len(OUTLINES)
        outline = index % classes
        if self.series != "conflict":
            return outline, outline
        return outline, (outline + 1 + index // classes % (classes - 1)) % classes

    def draw(self, index: int) -> np.ndarray:
        if not 0 <= index < self.length:
            raise IndexError(f"There are {self.length} pictures, numbered from 0; there is no picture {index}.")
        rng = np.random.default_rng((self.seed, _SERIES[self.series], index))
        return draw_shape(rng, self.size, *self.cues(index))


class ShapesDataset(ClassificationDataset):
    """Drawn shapes; the label is the outline's class, and ``texture`` the texture's.

    Args:
        drawn: Which pictures.
        transform: See `ClassificationDataset`.
        training: See `ClassificationDataset`.
    """

    def __init__(self, drawn: _Drawn, transform: Any, training: bool):
        super().__init__(transform, training)
        self.drawn = drawn

    def __len__(self) -> int:
        return self.drawn.length

    def path(self, index: int) -> str:
        """Return the name of a picture; there is no file."""
        return f"shape_{self.drawn.series}_{index:05d}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See `ClassificationDataset.load`."""
        return Image.fromarray(self.drawn.draw(index)), self.drawn.cues(index)[0]

    def __getitem__(self, key: Any) -> dict[str, Any]:
        """Return one sample; with a `SampleKey` the augmentation is the one of that seed."""
        index = getattr(key, "sample", key)
        return super().__getitem__(key) | {"texture": self.drawn.cues(index)[1]}


class SyntheticShapesDataModule(ClassificationDataModule):
    """Drawn shapes of eight classes, each of which has an outline and a texture of its own.

    In training, validation and test the two agree: a disc is always striped, a triangle always chequered. What a
    network has learned to look at shows in further pictures, in which they disagree (`cue_conflict_dataloader`): a disc
    with the triangle's checks. `ShapeDecisions` counts whether it goes by the outline or by the texture. Place, size,
    turn and colours tell nothing of the class.

    Pictures are drawn when they are needed, and picture ``index`` of a split is always the same. They have the size
    that the model takes if its ``input_size`` is ``image_size`` and its ``crop_pct`` 1.

    Args:
        image_size: Height and width in pixels.
        train_images: Number of training pictures.
        val_images: Number of validation pictures.
        test_images: Number of test pictures.
        conflict_images: Number of pictures in which outline and texture disagree; of 56, and multiples, every pair
            comes as often as every other.
        shape_seed: Another number gives other pictures.
        batch_size: Training pictures per device.
        val_batch_size: Pictures per device in validation, test and prediction.
        num_workers: Loading processes per loader. None: as many as there are CPU cores for this process, at most 4.
        scale: Smallest and largest share of a picture's area that is cropped in training; small crops would leave no
            outline.
        ratio: Smallest and largest width / height of a training crop.
        color_jitter: Strength of changes of brightness, contrast and saturation.
        seed: Of the order and the augmentation; see `ClassificationDataModule`.
        pin_memory: Whether to load into pinned memory. None: if there is a CUDA device.
    """

    def __init__(
        self,
        image_size: int = 96,
        train_images: int = 2000,
        val_images: int = 200,
        test_images: int = 400,
        conflict_images: int = 560,
        shape_seed: int = 0,
        batch_size: int = 32,
        val_batch_size: int = 32,
        num_workers: int | None = None,
        scale: tuple[float, float] = (0.8, 1.0),
        ratio: tuple[float, float] = (0.9, 1.1),
        color_jitter: float = 0.2,
        seed: int | None = None,
        pin_memory: bool | None = None,
    ):
        lengths = {"train": train_images, "val": val_images, "test": test_images, "conflict": conflict_images}
        drawn = {series: _Drawn(series, length, image_size, shape_seed) for series, length in lengths.items()}
        super().__init__(
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            scale=scale,
            ratio=ratio,
            color_jitter=color_jitter,
            seed=seed,
            pin_memory=pin_memory,
        )
        self.drawn = drawn

    def load_classes(self) -> ClassTable:
        """Return the 8 classes, named after outline and texture."""
        return table_of([f"{outline}, {texture}" for outline, texture in zip(OUTLINES, TEXTURES, strict=True)])

    @property
    def test_split(self) -> Split:
        """There is a test split."""
        return "test"

    def make_dataset(self, split: Split) -> ShapesDataset:
        """See `ClassificationDataModule.make_dataset`."""
        training = split == "train"
        return ShapesDataset(self.drawn[split], self.transform(training), training)

    def cue_conflict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of pictures in which outline (``label``) and texture (``texture``) disagree."""
        dataset = ShapesDataset(self.drawn["conflict"], self.transform(False), training=False)
        # without processes: it is asked for once, at the end of a run
        return evaluation_loader(dataset, self.val_batch_size, 0, False, self.collate)
