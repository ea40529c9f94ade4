"""Street scenes that are drawn on the fly: a data set that needs no download."""

import albumentations as A
import numpy as np
from albumentations.pytorch import ToTensorV2

from lk_backbones.data.classes import ClassTable
from lk_backbones.data.scene_drawing import SCENE_CLASSES, Scene, draw_scene
from lk_backbones.data.segmentation import SegmentationDataModule, SegmentationDataset, Split

_SPLIT_NUMBERS: dict[Split, int] = {"train": 0, "val": 1, "test": 2}


class SyntheticScenesDataset(SegmentationDataset):
    """Drawn scenes; scene ``index`` of a split is always the same.

    Args:
        split: Which of the disjoint series of scenes.
        length: Number of scenes.
        image_size: ``(height, width)``.
        scene_seed: Another number gives other scenes.
        transform: See :class:`~lk_backbones.data.segmentation.SegmentationDataset`.
        training: See :class:`~lk_backbones.data.segmentation.SegmentationDataset`.
    """

    def __init__(
        self,
        split: Split,
        length: int,
        image_size: tuple[int, int],
        scene_seed: int,
        transform: A.Compose,
        training: bool,
    ):
        super().__init__(transform, training)
        self.split = split
        self.length = length
        self.image_size = image_size
        self.scene_seed = scene_seed

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """Draws a scene, with its list of objects."""
        if not 0 <= index < self.length:
            raise IndexError(f"There are {self.length} scenes, numbered from 0; there is no scene {index}.")
        rng = np.random.default_rng((self.scene_seed, _SPLIT_NUMBERS[self.split], index))
        return draw_scene(rng, *self.image_size)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`~lk_backbones.data.segmentation.SegmentationDataset.load`."""
        scene = self.scene(index)
        return scene.image, scene.mask

    def path(self, index: int) -> str:
        """Returns the name of a scene; there is no file."""
        return f"scene_{self.split}_{index:05d}"


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
        seed: Of the order and the augmentation; see :class:`SegmentationDataModule`.
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
        super().__init__(
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            crop_size=(image_size[0], image_size[1]),
            seed=seed,
            pin_memory=pin_memory,
        )
        lengths: dict[Split, int] = {"train": train_images, "val": val_images, "test": test_images}
        for split, length in lengths.items():
            if length < 1:
                raise ValueError(f"{split}_images must be at least 1, got {length}.")
        if image_size[0] < 64 or image_size[1] < image_size[0]:
            raise ValueError(f"image_size must be (height, width), height >= 64, width >= height, got {image_size}.")
        self.image_size = (image_size[0], image_size[1])
        self.lengths = lengths
        self.scene_seed = scene_seed

    def load_classes(self) -> ClassTable:
        """Returns the 9 classes."""
        return SCENE_CLASSES

    @property
    def test_split(self) -> Split:
        """There is a test split."""
        return "test"

    def train_transform(self) -> A.Compose:
        """Returns the training pipeline: flip, slight changes of brightness and contrast."""
        return A.Compose(
            [
                A.HorizontalFlip(p=0.5),
                A.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0.1, p=0.5),
                A.ToFloat(max_value=255),
                ToTensorV2(),
            ]
        )

    def make_dataset(self, split: Split) -> SyntheticScenesDataset:
        """See :meth:`SegmentationDataModule.make_dataset`."""
        training = split == "train"
        transform = self.train_transform() if training else self.eval_transform()
        length = self.lengths[split]
        return SyntheticScenesDataset(split, length, self.image_size, self.scene_seed, transform, training)
