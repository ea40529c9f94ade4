"""The base of the semantic segmentation data modules: data sets, loaders and options that they have in common.

A batch is a dictionary:

- ``image``: float32 `(N, 3, h, w)`, RGB in [0, 1], not normalised (the task normalises).
- ``mask``: int64 `(N, H, W)`, class index or 255 (ignored). In training `(h, w) == (H, W)`; in evaluation `(H, W)` is
  the original size, which differs from `(h, w)` if ``test_size`` resizes pictures.
- ``path``: list of the N picture files (or names, where pictures are made up).
- ``original_size``: list of N tuples `(H, W)`; in evaluation only.
"""

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lk_backbones.data.checks import check_sizes, for_all, require_same_size
from lk_backbones.data.classes import IGNORE_INDEX, ClassTable, Color
from lk_backbones.data.reading import labels_to_classes, read_image, read_labels
from lk_backbones.data.sampling import (
    SampleKey,
    TrainingLoader,
    TrainingSampler,
    default_pin_memory,
    derive_seed,
    evaluation_loader,
    init_worker,
    world,
)
from lk_backbones.data.transforms import IMAGENET_MEAN, eval_transform, train_transform

Split = Literal["train", "val", "test"]
CheckLevel = Literal["auto", "full", "headers", "off"]

#: Up to this many pairs per split ``check_files="auto"`` reads every file in full.
FULL_CHECK_LIMIT = 1000


class SegmentationDataset(Dataset[dict[str, Any]], ABC):
    """A map-style data set of pictures with label maps.

    Args:
        transform: albumentations pipeline. In training it takes ``image`` and ``mask``, in evaluation ``image``.
        training: Whether samples are augmented crops, or whole pictures with their original masks.
    """

    def __init__(self, transform: A.Compose, training: bool):
        self.transform = transform
        self.training = training

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the picture, uint8 RGB `(H, W, 3)`, and the class indices, uint8 `(H, W)`, or None without labels.

        Raises:
            IndexError: There is no such sample.
            ValueError: A file is unusable; the message names it.
        """

    @abstractmethod
    def path(self, index: int) -> str:
        """Returns the picture's file, or a name if there is none."""

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        """Returns one sample; with a :class:`SampleKey` the augmentation is the one of that seed."""
        index = key.sample if isinstance(key, SampleKey) else key
        image, mask = self.load(index)
        if not self.training:
            sample = {"image": self.transform(image=image)["image"], "path": self.path(index)}
            if mask is not None:
                sample["mask"] = torch.from_numpy(mask.astype(np.int64))
            return sample | {"original_size": (image.shape[0], image.shape[1])}

        seed = key.seed if isinstance(key, SampleKey) else derive_seed(index)
        # One stream for the whole pipeline. set_random_seed() would start every transform's own stream with the same
        # seed, and then a picture would be flipped if and only if it is brightened.
        self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        augmented = self.transform(image=image, mask=mask)
        return {"image": augmented["image"], "mask": augmented["mask"].long(), "path": self.path(index)}


class FileSegmentationDataset(SegmentationDataset):
    """Pictures and label maps in files.

    Args:
        images: Image files.
        masks: The mask file of each, or None when there are none.
        table: Classes, and the meaning of the values in the mask files.
        transform: See :class:`SegmentationDataset`.
        training: See :class:`SegmentationDataset`.
    """

    def __init__(
        self,
        images: Sequence[Path],
        masks: Sequence[Path] | None,
        table: ClassTable,
        transform: A.Compose,
        training: bool,
    ):
        super().__init__(transform, training)
        self.images = list(images)
        self.masks = None if masks is None else list(masks)
        self.table = table
        self._lookup = table.lookup()

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """See :meth:`SegmentationDataset.load`."""
        image = read_image(self.images[index])
        if self.masks is None:
            return image, None
        labels = read_labels(self.masks[index])
        require_same_size(self.images[index], image.shape[:2], self.masks[index], labels.shape)
        return image, labels_to_classes(self.masks[index], labels, self.table, self._lookup)

    def path(self, index: int) -> str:
        """See :meth:`SegmentationDataset.path`."""
        return str(self.images[index])

    def check(self, level: CheckLevel) -> None:
        """Looks at all files: ``"headers"`` at their sizes, ``"full"`` at every pixel, ``"auto"`` depends on how many.

        Raises:
            ValueError: A file is unusable; the message names it.
        """
        if level == "off":
            return
        if level == "full" or (level == "auto" and len(self) <= FULL_CHECK_LIMIT):
            for_all(self.load, range(len(self)), "Checking images and masks")
        elif self.masks is not None:
            check_sizes(list(zip(self.images, self.masks, strict=True)))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch: stacks ``image`` and ``mask``, makes lists of the rest.

    Raises:
        ValueError: The pictures have different sizes.
    """
    for key in ("image", "mask"):
        sizes = {tuple(sample[key].shape[-2:]): sample["path"] for sample in samples if key in sample}
        if len(sizes) > 1:
            (one, first), (other, second) = list(sizes.items())[:2]
            raise ValueError(
                f"Pictures of different sizes cannot share a batch: {first} is {one[0]}×{one[1]}, {second} is "
                f"{other[0]}×{other[1]} (height×width). Set val_batch_size=1."
            )
    tensors = {key: torch.stack([s[key] for s in samples]) for key in ("image", "mask") if key in samples[0]}
    return tensors | {key: [sample[key] for sample in samples] for key in samples[0] if key not in tensors}


class SegmentationDataModule(LightningDataModule, ABC):
    """Base of the semantic segmentation data modules.

    Training batches are augmented as published for the large-kernel families (see :mod:`lk_backbones.data.transforms`);
    their order and augmentation depend on the seed, the epoch and the position alone, so a run resumed from any
    checkpoint sees what an undisturbed one sees. Evaluation loaders give every picture exactly once, also under DDP.

    A subclass gives :meth:`load_classes` and :meth:`make_dataset`, and says which splits it has.

    Args:
        batch_size: Training crops per device.
        val_batch_size: Pictures per device in validation, test and prediction. More than 1 needs pictures of one size.
        num_workers: Loading processes per loader. None: as many as there are CPU cores for this process, at most 4.
            With workers, scripts on Windows and macOS need the usual ``if __name__ == "__main__":``.
        crop_size: ``(height, width)`` of training crops, or one number for both.
        scale_range: Smallest and largest ratio of the random resizing.
        base_size: ``(long side, short side)`` that pictures are fitted into at ratio 1. None: their own size.
        cat_max_ratio: Largest share of one class in a crop (10 tries).
        test_size: ``(long side, short side)`` that pictures are fitted into for evaluation. None: as they are.
        image_fill: Colour of the padding of pictures smaller than the crop, RGB in [0, 1]. The default, the ImageNet
            mean, becomes 0 when normalised.
        seed: Of the order and the augmentation. None: the seed of ``seed_everything`` if it was called, else 0. A
            resumed run takes the seed of its checkpoint.
        check_files: What to look at in ``setup``. ``"headers"``: that the sizes of images and masks agree; ``"full"``:
            also that every file can be read and that all labels are known; ``"auto"``: full for splits of up to 1000
            images, else headers; ``"off"``. Pairs are always checked, and every file again when it is loaded.
        pin_memory: Whether to load into pinned memory. None: if there is a CUDA device.
    """

    ignore_index: int = IGNORE_INDEX

    def __init__(
        self,
        batch_size: int = 8,
        val_batch_size: int = 1,
        num_workers: int | None = None,
        crop_size: int | tuple[int, int] = (512, 512),
        scale_range: tuple[float, float] = (0.5, 2.0),
        base_size: tuple[int, int] | None = None,
        cat_max_ratio: float = 0.75,
        test_size: tuple[int, int] | None = None,
        image_fill: tuple[float, float, float] = IMAGENET_MEAN,
        seed: int | None = None,
        check_files: CheckLevel = "auto",
        pin_memory: bool | None = None,
    ):
        super().__init__()
        keep_hyperparameters(self)
        crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else (crop_size[0], crop_size[1])
        for name, number, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("num_workers", num_workers or 0, 0),
            ("crop_size", min(crop_size), 1),
            ("seed", seed or 0, 0),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}.")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(
                f"scale_range must be (smallest, largest) with 0 < smallest <= largest, got {scale_range}."
            )
        if not 0 < cat_max_ratio <= 1:
            raise ValueError(f"cat_max_ratio must be a share above 0 and up to 1, got {cat_max_ratio}.")
        if not all(0 <= value <= 1 for value in image_fill):
            raise ValueError(f"image_fill must be RGB in [0, 1], got {image_fill}. Divide 8-bit colours by 255.")
        if check_files not in ("auto", "full", "headers", "off"):
            raise ValueError(f'check_files must be "auto", "full", "headers" or "off", got {check_files!r}.')
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = default_num_workers() if num_workers is None else num_workers
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.base_size = base_size
        self.cat_max_ratio = cat_max_ratio
        self.test_size = test_size
        self.image_fill = image_fill
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.check_files: CheckLevel = check_files
        self.pin_memory = default_pin_memory() if pin_memory is None else pin_memory
        self._table: ClassTable | None = None
        self._datasets: dict[Split, SegmentationDataset] = {}
        self._state_of_checkpoint: dict[str, Any] = {}

    # --- What a subclass gives -------------------------------------------------------------------------------------

    @abstractmethod
    def load_classes(self) -> ClassTable:
        """Returns the classes; called once, when they are first needed."""

    @abstractmethod
    def make_dataset(self, split: Split) -> SegmentationDataset:
        """Returns the data set of a split: augmented for ``"train"``, whole pictures for ``"val"`` and ``"test"``.

        Raises:
            FileNotFoundError: Folders or files are missing; the message names them.
        """

    @property
    def test_split(self) -> Split:
        """The split that ``test`` uses: the validation split where test labels are not public."""
        return "val"

    @property
    def predict_split(self) -> Split:
        """The split that ``predict`` uses: the test split if there is one, with labels or without."""
        return self.test_split

    # --- Classes ----------------------------------------------------------------------------------------------------

    @property
    def classes(self) -> ClassTable:
        """The classes, and the meaning of the values in the label files."""
        if self._table is None:
            self._table = self.load_classes()
        return self._table

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their index."""
        return list(self.classes.names)

    @property
    def class_colors(self) -> list[Color]:
        """One RGB colour (0 to 255) per class."""
        return list(self.classes.colors)

    # --- Lightning's hooks ------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Finds the files of the splits that a stage needs, and checks them (once, on the first process).

        Raises:
            FileNotFoundError: Folders or files are missing.
            ValueError: Files are unusable. Both name the file or folder and say what would be right.
        """
        needed: dict[str | None, list[Split]] = {
            "fit": ["train", "val"],
            "validate": ["val"],
            "test": [self.test_split],
            "predict": [self.predict_split],
            None: ["train", "val", self.test_split, self.predict_split],
        }
        for split in needed[stage]:
            if split not in self._datasets:
                dataset = self.make_dataset(split)
                if isinstance(dataset, FileSegmentationDataset) and world()[1] == 0:
                    dataset.check(self.check_files)
                self._datasets[split] = dataset

    def dataset(self, split: Split) -> SegmentationDataset:
        """Returns the data set of a split that :meth:`setup` has made.

        Raises:
            RuntimeError: :meth:`setup` was not called for it.
        """
        if split not in self._datasets:
            raise RuntimeError(f"The {split} split is not set up: call setup() first (a Trainer does).")
        return self._datasets[split]

    def train_transform(self) -> A.Compose:
        """Returns the training pipeline, which takes ``image`` and ``mask``; override it to augment differently."""
        return train_transform(
            self.crop_size, self.scale_range, self.base_size, self.cat_max_ratio, self.image_fill, self.ignore_index
        )

    def eval_transform(self) -> A.Compose:
        """Returns the pipeline for validation, test and prediction, which takes ``image``."""
        return eval_transform(self.test_size)

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of augmented crops; an incomplete last batch is left out.

        Raises:
            ValueError: There are fewer training samples per process than ``batch_size``.
        """
        dataset = self.dataset("train")
        sampler = TrainingSampler(dataset, self.seed)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"There are {len(sampler)} training pictures per process, fewer than batch_size={self.batch_size}: "
                f"not one batch can be made. Use batch_size={len(sampler)} or less."
            )
        return TrainingLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=collate,
            drop_last=True,  # batch norm and pyramid pooling fail on a last batch of one
            worker_init_fn=init_worker,
            persistent_workers=self.num_workers > 0,
            batches_done=self._batches_done(),
        )

    def _batches_done(self) -> Callable[[], int] | None:
        """Returns what tells how many batches of the epoch that begins were processed before a restart.

        Whether a run is being resumed need not be known yet: where the task asks for the number of steps, Lightning
        makes the loader before it restores the checkpoint.
        """
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return None
        if trainer.train_dataloader is not None:
            return None  # the training loop has its loader already; this one is for somebody else

        def batches_done() -> int:
            batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            if batches:
                self._warn_if_changed()
            return batches

        return batches_done

    def _warn_if_changed(self) -> None:
        now, then = self.state_dict(), self._state_of_checkpoint
        changed = [f"{key} {then[key]} -> {now[key]}" for key in now if then.get(key, now[key]) != now[key]]
        if changed:
            rank_zero_warn(
                f"The checkpoint was saved within an epoch, and the data has changed since ({', '.join(changed)}): "
                "the rest of this epoch will repeat or leave out some samples."
            )

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of the validation split."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of the test split, or of the validation split where test labels are not public."""
        return self._eval_loader(self.test_split)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns the loader of the test split if there is one, else of the validation split."""
        return self._eval_loader(self.predict_split)

    def _eval_loader(self, split: Split) -> DataLoader[Any]:
        return evaluation_loader(self.dataset(split), self.val_batch_size, self.num_workers, self.pin_memory, collate)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: the seed, and what an epoch was made up of."""
        samples = len(self._datasets["train"]) if "train" in self._datasets else 0
        return {"seed": self.seed, "training_images": samples, "batch_size": self.batch_size, "processes": world()[0]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the seed of a checkpoint, so that the run goes on as it began."""
        self.seed = state_dict["seed"]
        self._state_of_checkpoint = state_dict


def keep_hyperparameters(module: LightningDataModule) -> None:
    """Keeps the constructor's arguments in checkpoints, so that a checkpoint knows what data it was trained on.

    Paths are kept as text: checkpoints are read without unpickling any other type. Loggers already get the task's.
    """
    module.save_hyperparameters(logger=False)
    module.hparams.update({k: os.fspath(v) for k, v in module.hparams.items() if isinstance(v, os.PathLike)})


def default_num_workers() -> int:
    """Returns the number of CPU cores for this process, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)
