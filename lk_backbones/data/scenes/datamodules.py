"""Street scenes that are drawn on the fly: a data set that needs no download."""

from dataclasses import dataclass

import albumentations as A
import numpy as np
from albumentations.pytorch import ToTensorV2

from lk_backbones.data.classes import ClassTable
from lk_backbones.data.datamodule import PictureDataset, Split, require_at_least
from lk_backbones.data.detection import DetectionDataModule, DetectionDataset, Objects
from lk_backbones.data.detection_transforms import box_pipeline
from lk_backbones.data.scenes.drawing import (
    MOVING_VEHICLE,
    PERSON,
    SCENE_CLASSES,
    SIGNAL,
    STOPPED_VEHICLE,
    TREE,
    Scene,
    draw_scene,
)
from lk_backbones.data.segmentation import SegmentationDataModule, SegmentationDataset

_SPLIT_NUMBERS: dict[Split, int] = {"train": 0, "val": 1, "test": 2}

#: Classes of which scenes have objects to detect, in the order of their labels.
_THINGS = (TREE, PERSON, SIGNAL, MOVING_VEHICLE, STOPPED_VEHICLE)

#: Objects of which fewer pixels are to be seen are no objects for detection.
_LEAST_PIXELS = 12


@dataclass(frozen=True)
class SceneSeries:
    """One of the disjoint series of scenes; scene ``index`` is always the same.

    Attributes:
        split: Which series.
        length: Number of scenes.
        image_size: ``(height, width)``.
        scene_seed: Another number gives other scenes.

    Raises:
        ValueError: If there would be no scene, or the size is too small.
    """

    split: Split
    length: int
    image_size: tuple[int, int]
    scene_seed: int

    def __post_init__(self) -> None:
        require_at_least(f"{self.split}_images", self.length, 1)
        height, width = self.image_size
        if height < 64 or width < height:
            raise ValueError(
                f"image_size must be (height, width), height >= 64, width >= height, got {self.image_size}."
            )

    def scene(self, index: int) -> Scene:
        """Draw a scene, with its list of objects."""
        if not 0 <= index < self.length:
            raise IndexError(f"There are {self.length} scenes, numbered from 0; there is no scene {index}.")
        rng = np.random.default_rng((self.scene_seed, _SPLIT_NUMBERS[self.split], index))
        return draw_scene(rng, *self.image_size)


class _SceneDataset(PictureDataset):
    """What both kinds of data sets of scenes have in common."""

    def __init__(self, series: SceneSeries, transform: A.Compose, training: bool):
        super().__init__(transform, training)
        self.series = series

    def __len__(self) -> int:
        return self.series.length

    def path(self, index: int) -> str:
        """Return the name of a scene; there is no file."""
        return f"scene_{self.series.split}_{index:05d}"


class SyntheticScenesDataset(_SceneDataset, SegmentationDataset):
    """Drawn scenes with label maps.

    Args:
        series: Which scenes.
        transform: See `SegmentationDataset`.
        training: See `SegmentationDataset`.
    """

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See `load`."""
        scene = self.series.scene(index)
        return scene.image, scene.mask


class SyntheticScenesDetectionDataset(_SceneDataset, DetectionDataset):
    """Drawn scenes with the boxes and masks of trees, people, signals and vehicles.

    Args:
        series: Which scenes.
        transform: See `DetectionDataset`.
        training: See `DetectionDataset`.
    """

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        """See `load`. Masks are of what is to be seen."""
        scene = self.series.scene(index)
        visible = np.bincount(scene.instances.ravel(), minlength=len(scene.objects) + 1)[1:]
        places = np.flatnonzero(visible >= _LEAST_PIXELS)
        masks = (scene.instances == places[:, None, None] + 1).astype(np.uint8)
        boxes = np.zeros((len(places), 4), np.float32)
        for box, mask in zip(boxes, masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        labels = np.array([_THINGS.index(scene.objects[place]) + 1 for place in places], np.int64)
        crowds = np.zeros(len(places), np.int64)
        return scene.image, Objects(boxes, labels, crowds, visible[places].astype(np.float32), masks)

    def image_id(self, index: int) -> int:
        """Return the number of the scene, from 1."""
        return index + 1

    def aspect_ratio(self, index: int) -> float:
        """Return width / height, which is the same for all."""
        return self.series.image_size[1] / self.series.image_size[0]


def _slight_changes() -> list[A.BasicTransform]:
    """Flip, slight changes of brightness and contrast; no cropping, which would cut off the signals."""
    return [
        A.HorizontalFlip(p=0.5),
        A.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0.1, p=0.5),
    ]


class SyntheticScenesDataModule(SegmentationDataModule):
    """Drawn street scenes whose labels cannot all be told from local texture.

    A road of two or four lanes runs towards the horizon. Above it stands a gantry with one signal per lane: a green
    arrow or a red cross. Every vehicle is drawn in the same way, but in a lane under a green arrow it is a ``moving
    vehicle``, in a lane under a red cross a ``stopped vehicle``. So the class of about one pixel in eight depends on a
    few pixels that are far away: half the height of the picture, 40 to 100 pixels at the default size.

    The relation is local-but-far, not global: in every scene half of the signals are green, and their order, the places
    and colours of the vehicles and everything else are independent of it. A network that only knows how many signals
    are green, or only sees the surroundings of a vehicle, is right half of the time. One has to look from the vehicle
    along its lane to its own signal. All other classes (sky, building, road, sidewalk, tree, person, signal) can be
    told locally.

    Scenes are drawn when they are needed, in a few milliseconds, and scene ``index`` of a split is always the same.
    Augmentation is a flip and a slight change of brightness and contrast; there is no cropping, which would cut off the
    signals.

    Args:
        image_size: ``(height, width)`` in pixels; at least 64 high and no narrower than high.
        train_images: Number of training scenes.
        val_images: Number of validation scenes.
        test_images: Number of test scenes.
        scene_seed: Another number gives other scenes.
        batch_size: Training scenes per device.
        val_batch_size: Scenes per device in validation, test and prediction.
        num_workers: Loading processes per loader. None: as many as there are CPU cores for this process, at most 4.
        seed: Of the order and the augmentation; see `SegmentationDataModule`.
        pin_memory: Whether to load into pinned memory. None: if there is a CUDA device.
    """

    def __init__(
        self,
        image_size: tuple[int, int] = (128, 192),
        train_images: int = 1000,
        val_images: int = 100,
        test_images: int = 100,
        scene_seed: int = 0,
        batch_size: int = 8,
        val_batch_size: int = 8,
        num_workers: int | None = None,
        seed: int | None = None,
        pin_memory: bool | None = None,
    ):
        size = (image_size[0], image_size[1])
        series = _series(train_images, val_images, test_images, size, scene_seed)  # checks them by these names
        super().__init__(
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            crop_size=size,
            seed=seed,
            pin_memory=pin_memory,
        )
        self.series = series

    def load_classes(self) -> ClassTable:
        """Return the 9 classes."""
        return SCENE_CLASSES

    @property
    def test_split(self) -> Split:
        """There is a test split."""
        return "test"

    def train_transform(self) -> A.Compose:
        """Return the training pipeline: flip, slight changes of brightness and contrast."""
        return A.Compose([*_slight_changes(), A.ToFloat(max_value=255), ToTensorV2()])

    def make_dataset(self, split: Split) -> SyntheticScenesDataset:
        """See `SegmentationDataModule.make_dataset`."""
        training = split == "train"
        transform = self.train_transform() if training else self.eval_transform()
        return SyntheticScenesDataset(self.series[split], transform, training)


class SyntheticScenesDetectionDataModule(DetectionDataModule):
    """Drawn street scenes with the boxes and masks of trees, people, signals, moving and stopped vehicles.

    The scenes of `SyntheticScenesDataModule`, which explains them, for detection. Boxes and masks are of what is
    to be seen of an object: far vehicles are partly hidden by near ones. Of an object that hardly shows (fewer than 12
    pixels) there is none.

    Args:
        image_size: ``(height, width)`` in pixels; at least 64 high and no narrower than high.
        train_images: Number of training scenes.
        val_images: Number of validation scenes.
        test_images: Number of test scenes.
        scene_seed: Another number gives other scenes.
        batch_size: Training scenes per device.
        val_batch_size: Scenes per device in validation, test and prediction.
        num_workers: Loading processes per loader. None: as many as there are CPU cores for this process, at most 4.
        seed: Of the order and the augmentation; see `ImageDataModule`.
        pin_memory: Whether to load into pinned memory. None: if there is a CUDA device.
    """

    def __init__(
        self,
        image_size: tuple[int, int] = (128, 192),
        train_images: int = 1000,
        val_images: int = 100,
        test_images: int = 100,
        scene_seed: int = 0,
        batch_size: int = 4,
        val_batch_size: int = 4,
        num_workers: int | None = None,
        seed: int | None = None,
        pin_memory: bool | None = None,
    ):
        size = (image_size[0], image_size[1])
        series = _series(train_images, val_images, test_images, size, scene_seed)  # checks them by these names
        super().__init__(
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
            pin_memory=pin_memory,
            group_by_aspect=False,
        )
        self.series = series

    def load_classes(self) -> ClassTable:
        """Return the 5 classes."""
        return ClassTable(
            names=tuple(SCENE_CLASSES.names[index] for index in _THINGS),
            colors=tuple(SCENE_CLASSES.colors[index] for index in _THINGS),
            class_of_label={place + 1: place for place in range(len(_THINGS))},
        )

    @property
    def test_split(self) -> Split:
        """There is a test split."""
        return "test"

    def train_transform(self) -> A.Compose:
        """Return the training pipeline: flip, slight changes of brightness and contrast."""
        return box_pipeline(_slight_changes())

    def make_dataset(self, split: Split) -> SyntheticScenesDetectionDataset:
        """See `make_dataset`."""
        training = split == "train"
        transform = self.train_transform() if training else self.eval_transform()
        return SyntheticScenesDetectionDataset(self.series[split], transform, training)


def _series(train: int, val: int, test: int, size: tuple[int, int], seed: int) -> dict[Split, SceneSeries]:
    lengths: dict[Split, int] = {"train": train, "val": val, "test": test}
    return {split: SceneSeries(split, length, size, seed) for split, length in lengths.items()}
