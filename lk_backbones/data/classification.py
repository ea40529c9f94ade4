"""The base of the classification data modules: data sets, loaders and options that they have in common.

A batch is a dictionary:

- ``image``: float32 ``(N, 3, h, w)``, RGB in [0, 1], not normalised (the task normalises).
- ``label``: int64 ``(N,)``, class index.
- ``path``: list of the N picture files (or names, where pictures are made up).
- ``original_size``: list of N tuples ``(H, W)``; in evaluation only.
"""

import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from lk_backbones._printing import printable
from lk_backbones._processes import gathered, world
from lk_backbones._random import seeded
from lk_backbones.data.checks import for_all
from lk_backbones.data.classes import ClassTable
from lk_backbones.data.classification_transforms import (
    Augmentation,
    PictureSettings,
    eval_transform,
    to_unit,
    train_transform,
)
from lk_backbones.data.datamodule import FULL_CHECK_LIMIT, CheckLevel, ImageDataModule, PictureDataset, Split
from lk_backbones.data.reading import READ_ERRORS, image_size, open_image, unreadable
from lk_backbones.data.sampling import SampleKey, derive_seed
from lk_backbones.drawing.palette import class_palette

__all__ = ["ClassificationDataModule", "ClassificationDataset", "FileClassificationDataset", "collate", "table_of"]

#: Pictures that cannot be read are named up to this number.
_NAMED = 5


class ClassificationDataset(PictureDataset):
    """A map-style data set of pictures with one class each.

    Its pipeline takes a PIL picture and gives a uint8 tensor ``(3, h, w)``; see
    `lk_backbones.data.classification_transforms`. In training it draws from the global generators.
    """

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return the picture, RGB or a JPEG file that is not decoded yet, and its class.

        Raises:
            IndexError: If there is no such sample.
            ValueError: If the file is unusable; the message names it.
        """

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        """Return one sample; with a `SampleKey` the augmentation is the one of that seed."""
        index = key.sample if isinstance(key, SampleKey) else key
        image, label = self.load(index)
        width, height = image.size
        sample: dict[str, Any] = {"label": label, "path": self.path(index)}
        try:
            with image:
                if self.training:
                    seed = key.seed if isinstance(key, SampleKey) else derive_seed(key)
                    with seeded(seed):
                        return sample | {"image": self.transform(image)}
                whole = image if image.mode == "RGB" else image.convert("RGB")
                return sample | {"image": self.transform(whole), "original_size": (height, width)}
        except (OSError, SyntaxError, EOFError) as error:  # of a picture that is decoded only now
            raise unreadable(Path(self.path(index)), error) from error


class FileClassificationDataset(ClassificationDataset):
    """Pictures in files.

    Args:
        root: Folder that all of them are below.
        files: The files, relative to ``root``.
        labels: The class of each.
        transform: See `ClassificationDataset`.
        training: See `ClassificationDataset`.
        turn: Whether pictures are turned as their EXIF orientation says.
    """

    def __init__(
        self, root: Path, files: Sequence[str], labels: Sequence[int], transform: Any, training: bool, turn: bool = True
    ):
        super().__init__(transform, training)
        self.root = root
        # One block of memory each: loading processes would copy a million separate objects as soon as they touch them.
        self._files = np.array([os.fsencode(file) for file in files])
        self.labels = np.array(labels, np.int64)
        self.turn = turn

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See `ClassificationDataset.load`."""
        return open_image(self.path(index), self.turn), int(self.labels[index])

    def path(self, index: int) -> str:
        """See `PictureDataset.path`."""
        return os.path.join(self.root, os.fsdecode(bytes(self._files[index])))

    def check(self, level: CheckLevel) -> None:
        """Look at all files: ``"headers"`` at their beginnings, ``"full"`` at every pixel, ``"auto"`` as many allow.

        Raises:
            ValueError: If some are unreadable: their number, and the first of them with the reasons.
        """
        paths = [self.path(index) for index in range(len(self))]
        if wrong := _find_unreadable(paths, level, self.turn):
            raise ValueError(
                f"{_told(paths, wrong)} Replace or remove {'them' if len(wrong) > 1 else 'it'}, or leave "
                f"{'them' if len(wrong) > 1 else 'it'} out with strict=False."
            )


def _find_unreadable(paths: Sequence[str], level: CheckLevel, turn: bool) -> dict[int, str]:
    """Return the places of the pictures that cannot be read, in order, with the reasons."""
    if level == "off":
        return {}
    full = level == "full" or (level == "auto" and len(paths) <= FULL_CHECK_LIMIT)
    reasons: dict[int, str] = {}

    def check(place: int) -> None:
        path = Path(paths[place])
        try:
            if full:
                try:
                    with open_image(path, turn) as image:
                        image.load()
                except READ_ERRORS as error:
                    raise error if str(path) in str(error) else unreadable(path, error) from error
            else:
                image_size(path)
        except (ValueError, OSError) as error:
            reasons[place] = str(error).removesuffix(" Replace it or remove it.")

    for_all(check, range(len(paths)), "Checking pictures")
    return dict(sorted(reasons.items()))


def _told(paths: Sequence[str], wrong: dict[int, str]) -> str:
    named = " ".join(list(wrong.values())[:_NAMED])
    more = f" And {len(wrong) - _NAMED} more." if len(wrong) > _NAMED else ""
    return f"{len(wrong)} of {len(paths)} pictures cannot be read. {named}{more}"


def table_of(names: Sequence[str]) -> ClassTable:
    """Return a table of classes in the order of their index, with the colours of `class_palette`."""
    return ClassTable(tuple(names), tuple(class_palette(len(names))), {index: index for index in range(len(names))})


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch: stack ``image``, as float32 in [0, 1], and ``label``; make lists of the rest."""
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
    batch["image"] = to_unit(torch.stack(batch["image"]))
    batch["label"] = torch.tensor(batch["label"])
    return batch


class ClassificationDataModule(ImageDataModule):
    """Base of the classification data modules.

    Training pictures are augmented, and evaluated ones resized and cropped, by timm's own pipelines. At what size, and
    with which ``crop_pct``, ``crop_mode`` and ``interpolation``, the task tells (`set_picture_settings`), as that
    belongs to the weights; without a task it is 224, 0.875, ``"center"`` and ``"bicubic"``.

    Order and augmentation of training batches depend on the seed, the epoch and the position alone, so a run resumed
    from any checkpoint sees what an undisturbed one sees. Evaluation loaders give every picture exactly once, also
    under DDP.

    Args:
        batch_size: Training pictures per device.
        val_batch_size: Pictures per device in validation, test and prediction.
        num_workers: Loading processes per loader. None: as many as there are CPU cores for this process, at most 4.
            See `ImageDataModule` for how they are started.
        scale: Smallest and largest share of a picture's area that is cropped in training.
        ratio: Smallest and largest width / height of a training crop.
        hflip: Probability of a flip left-right.
        vflip: Probability of a flip upside down.
        color_jitter: Strength of changes of brightness, contrast and saturation, unless there is ``auto_augment``.
        auto_augment: timm's description of an augmentation, such as ``"rand-m9-mstd0.5-inc1"`` (RandAugment).
        train_interpolation: Of the resizing in training: ``"random"`` is bilinear or bicubic.
        strict: Whether a picture that cannot be read is an error; otherwise it is left out, with a warning.
        seed: Of the order and the augmentation. None: the seed of ``seed_everything`` if it was called, else 0. A
            resumed run takes the seed of its checkpoint.
        check_files: What to look at in ``setup``. ``"headers"``: that every file begins as a picture; ``"full"``: that
            it can be read; ``"auto"``: full for splits of up to 1000 pictures, else headers, and with
            ``strict=False`` always full; ``"off"``.
        pin_memory: Whether to load into pinned memory. None: if there is a CUDA device.
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_batch_size: int = 64,
        num_workers: int | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float = 0.4,
        auto_augment: str | None = None,
        train_interpolation: str = "random",
        strict: bool = True,
        seed: int | None = None,
        check_files: CheckLevel = "auto",
        pin_memory: bool | None = None,
    ):
        super().__init__(batch_size, val_batch_size, num_workers, seed, check_files, pin_memory)
        self.augmentation = Augmentation(
            (scale[0], scale[1]), (ratio[0], ratio[1]), hflip, vflip, color_jitter, auto_augment, train_interpolation
        )
        self.strict = strict
        self.picture_settings = PictureSettings()

    @abstractmethod
    def make_dataset(self, split: Split) -> ClassificationDataset:
        """Return the data set of a split: augmented for ``"train"``.

        Raises:
            FileNotFoundError: If folders or files are missing; the message names them.
        """

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """See `collate`."""
        return collate(samples)

    def set_picture_settings(self, **settings: Any) -> None:
        """Take over from the model how it is used to see pictures; a task calls this in its own ``setup``.

        Args:
            **settings: See `PictureSettings`.
        """
        self.picture_settings = PictureSettings(**settings)
        for dataset in self._datasets.values():
            dataset.transform = self.transform(dataset.training)

    def transform(self, training: bool) -> Any:
        """Return the pipeline of training or of evaluation; override it to augment differently."""
        if training:
            return train_transform(self.picture_settings, self.augmentation)
        return eval_transform(self.picture_settings)

    def file_dataset(
        self, split: Split, root: Path, samples: Sequence[tuple[str, int]], turn: bool = True
    ) -> FileClassificationDataset:
        """Make the data set of a split, without the pictures that cannot be read unless ``strict``.

        Args:
            split: The split.
            root: Folder that all files are below.
            samples: Files, relative to ``root``, and their classes.
            turn: Whether pictures are turned as their EXIF orientation says.

        Raises:
            ValueError: If none can be read.
        """
        if not self.strict:
            samples = self._readable(root, samples, turn)
        files, labels = [file for file, _ in samples], [label for _, label in samples]
        training = split == "train"
        return FileClassificationDataset(root, files, labels, self.transform(training), training, turn)

    def _readable(self, root: Path, samples: Sequence[tuple[str, int]], turn: bool) -> Sequence[tuple[str, int]]:
        """Leave out what cannot be read, the same in all processes, of which one looks."""
        paths = [os.path.join(root, file) for file, _ in samples]
        level: CheckLevel = "full" if self.check_files == "auto" else self.check_files
        wrong = gathered(_find_unreadable(paths, level, turn) if world()[1] == 0 else None)[0]
        if not wrong:
            return samples
        if len(wrong) == len(samples):
            raise ValueError(_told(paths, wrong))
        rank_zero_warn(printable(f"{_told(paths, wrong)} They are left out.", newlines=True))
        return [sample for place, sample in enumerate(samples) if place not in wrong]
