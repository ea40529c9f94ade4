"""The base of the detection data modules: data sets, loaders and options that they have in common.

A batch is torchvision's pair of lists, ``(images, targets)``:

- images: float32 ``(3, h, w)`` each, RGB in [0, 1], not normalised (the detector normalises, resizes in evaluation, and
  pads to a batch). In evaluation they have their original size.
- targets: one dictionary per image with ``boxes`` float32 ``(N, 4)``, corners ``x1, y1, x2, y2`` in pixels of the
  image; ``labels`` int64 ``(N,)`` from 1 to ``num_classes``, as 0 is the background; ``masks`` uint8 ``(N, h, w)`` of 0
  and 1, if there are masks; ``area`` float32 ``(N,)``, of the mask if there is one; ``iscrowd`` int64 ``(N,)``, 1 where
  many objects have one outline; ``image_id`` int; ``path``; ``original_size``, the tuple ``(H, W)``. N may be 0. In a
  test or a prediction a picture that cannot be read is a black one, and its target has the reason as ``error``.

Crowds are for the metrics only: a task leaves them out in training.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import albumentations as A
import numpy as np
import torch

from lk_backbones.data.datamodule import (
    CheckLevel,
    ImageDataModule,
    PictureDataset,
    Split,
    require_at_least,
    require_size,
)
from lk_backbones.data.detection_transforms import MULTI_SCALE, detection_train_transform, keeps_frame
from lk_backbones.data.outlines import Outlines, whole_frame
from lk_backbones.data.sampling import GroupedTrainingSampler, SampleKey, TrainingSampler
from lk_backbones.data.transforms import eval_transform

Batch = tuple[list[torch.Tensor], list[dict[str, Any]]]


@dataclass
class Objects:
    """The objects of a picture.

    Attributes:
        boxes: float32 ``(N, 4)``, corners in pixels.
        labels: int64 ``(N,)``, from 1.
        iscrowd: int64 ``(N,)``, 0 or 1.
        area: float32 ``(N,)``, in pixels.
        masks: uint8 ``(N, H, W)`` of 0 and 1, or outlines that are not drawn yet, or None.
    """

    boxes: np.ndarray
    labels: np.ndarray
    iscrowd: np.ndarray
    area: np.ndarray
    masks: np.ndarray | Outlines | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def drawn(self) -> "Objects":
        """Return the same objects with masks of pixels."""
        return replace(self, masks=self.masks.draw()) if isinstance(self.masks, Outlines) else self


class UnreadablePicture(ValueError):
    """A picture is not there, cut off, or no picture."""


class DetectionDataset(PictureDataset):
    """A map-style data set of pictures with boxes and, if wanted, masks.

    Its pipeline takes in training what `detection_train_transform` takes,
    in evaluation ``image``, of which it must not change the size.
    """

    #: Whether a picture that cannot be read becomes a black one, with the reason as ``error`` in its target.
    skip_unreadable = False

    def __init__(self, transform: A.Compose, training: bool):
        super().__init__(transform, training)
        self._keeps_frame = keeps_frame(transform)

    @abstractmethod
    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        """Return the picture, uint8 RGB ``(H, W, 3)``, and its objects.

        Raises:
            IndexError: If there is no such sample.
            ValueError: If a file is unusable; the message names it.
        """

    def read(self, index: int) -> tuple[np.ndarray, Objects]:
        """Return what `load` does, with masks that are not drawn yet where the data set has outlines."""
        return self.load(index)

    def blank(self, index: int) -> tuple[np.ndarray, Objects]:
        """Return a black picture in the place of one that cannot be read, and its objects."""
        raise NotImplementedError

    @abstractmethod
    def image_id(self, index: int) -> int:
        """Return the number that results are reported under."""

    @abstractmethod
    def aspect_ratio(self, index: int) -> float:
        """Return width / height of a picture, without reading it."""

    def __getitem__(self, key: int | SampleKey) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return one picture and its target; with a `SampleKey` the augmentation is the one of that seed."""
        index = key.sample if isinstance(key, SampleKey) else key
        unreadable: UnreadablePicture | None = None
        try:
            picture, objects = self.read(index)
        except UnreadablePicture as error:
            if self.training or not self.skip_unreadable:
                raise
            (picture, objects), unreadable = self.blank(index), error
        size = picture.shape[:2]
        if self.training:
            image, objects = self._augmented(key, picture, objects)
        else:
            image, objects = self.transform(image=picture)["image"], objects.drawn()
        target: dict[str, Any] = {
            "boxes": torch.from_numpy(objects.boxes),
            "labels": torch.from_numpy(objects.labels),
            "area": torch.from_numpy(objects.area),
            "iscrowd": torch.from_numpy(objects.iscrowd),
            "image_id": self.image_id(index),
            "path": self.path(index),
            "original_size": (size[0], size[1]),
        }
        if objects.masks is not None:
            target["masks"] = torch.from_numpy(objects.masks)
        if unreadable is not None:
            target["error"] = str(unreadable)
        return image, target

    def _augmented(self, key: int | SampleKey, picture: np.ndarray, objects: Objects) -> tuple[torch.Tensor, Objects]:
        """Augment; objects that are left outside, or without a pixel of their mask, are dropped."""
        height, width = picture.shape[:2]
        boxes = objects.boxes.clip(0, [width, height, width, height])
        targets: dict[str, Any] = {"image": picture, "bboxes": boxes, "places": np.arange(len(objects))}
        outlines = objects.masks if isinstance(objects.masks, Outlines) and self._keeps_frame else None
        if outlines is not None:
            targets["frame"] = whole_frame()
        elif objects.masks is not None and len(objects):
            targets["masks"] = objects.drawn().masks
        augmented = self.augment(key, **targets)
        image: torch.Tensor = augmented["image"]
        places = np.asarray(augmented["places"], np.int64).reshape(-1)
        boxes = np.asarray(augmented["bboxes"], np.float32).reshape(-1, 4)
        masks = None
        if objects.masks is not None:
            masks = np.zeros((0, *image.shape[1:]), np.uint8)
            if outlines is not None:  # once, at their final size, and only those that are left
                masks = outlines.draw(places.tolist(), augmented["frame"], (image.shape[1], image.shape[2]))
            elif len(places):
                masks = np.stack([np.asarray(augmented["masks"][place]) for place in places])
            pixels = np.array([np.count_nonzero(mask) for mask in masks], np.float32)
            seen = pixels > 0
            if not seen.all():  # masks are large, and seldom is one lost
                places, boxes, masks, pixels = places[seen], boxes[seen], masks[seen], pixels[seen]
        sides = boxes[:, 2:] - boxes[:, :2]
        area = sides.prod(axis=1) if masks is None else pixels
        return image, Objects(boxes, objects.labels[places], objects.iscrowd[places], area, masks)


def collate(samples: list[tuple[torch.Tensor, dict[str, Any]]]) -> Batch:
    """Make a batch: two lists, as pictures and numbers of objects differ in size."""
    return [image for image, _ in samples], [target for _, target in samples]


class DetectionDataModule(ImageDataModule):
    """Base of the detection data modules.

    Training pictures are augmented as published (see `lk_backbones.data.detection_transforms`), evaluation gives
    them whole, at their original size. Order, augmentation and the loaders are those of every data module
    (`ImageDataModule`).

    A subclass gives `load_classes` and `make_dataset`, and says which splits it has.

    Args:
        batch_size: Training pictures per device.
        val_batch_size: Pictures per device in validation, test and prediction; they may differ in size.
        num_workers: Loading processes per loader. None: as many as there are CPU cores for this process, at most 4.
        sizes: Lengths in pixels of the short side, one of which is drawn for every training picture.
        max_size: Largest length of the long side in training.
        crop_probability: Share of training pictures that are cropped before they are resized.
        crop_range: Smallest and largest side of that crop.
        flip_probability: Share of training pictures that are mirrored.
        color_jitter: Whether to distort the colours of training pictures.
        group_by_aspect: Whether batches hold either upright or lying pictures, which saves padding.
        seed: Of the order and the augmentation. None: the seed of ``seed_everything`` if it was called, else 0. A
            resumed run takes the seed of its checkpoint.
        check_files: What to look at in ``setup``; see the subclass.
        pin_memory: Whether to load into pinned memory. None: if there is a CUDA device.
    """

    def __init__(
        self,
        batch_size: int = 2,
        val_batch_size: int = 1,
        num_workers: int | None = None,
        sizes: Sequence[int] = MULTI_SCALE,
        max_size: int = 1333,
        crop_probability: float = 0.5,
        crop_range: tuple[int, int] = (384, 600),
        flip_probability: float = 0.5,
        color_jitter: bool = False,
        group_by_aspect: bool = True,
        seed: int | None = None,
        check_files: CheckLevel = "auto",
        pin_memory: bool | None = None,
    ):
        super().__init__(batch_size, val_batch_size, num_workers, seed, check_files, pin_memory)
        if not sizes:
            raise ValueError("sizes must hold at least one length of the short side, in pixels.")
        require_size("crop_range", crop_range)
        for name, number in (("sizes", min(sizes)), ("max_size", max_size)):
            require_at_least(name, number, 1)
        if crop_range[0] > crop_range[1]:
            raise ValueError(f"crop_range must be (smallest, largest) side, got {tuple(crop_range)}.")
        for name, share in (("crop_probability", crop_probability), ("flip_probability", flip_probability)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {share}.")
        self.sizes = tuple(sizes)
        self.max_size = max_size
        self.crop_probability = crop_probability
        self.crop_range = (crop_range[0], crop_range[1])
        self.flip_probability = flip_probability
        self.color_jitter = color_jitter
        self.group_by_aspect = group_by_aspect
        self._skip_unreadable = False

    @abstractmethod
    def make_dataset(self, split: Split) -> DetectionDataset:
        """Return the data set of a split: augmented for ``"train"``, whole pictures for ``"val"`` and ``"test"``.

        Raises:
            FileNotFoundError: If folders or files are missing; the message names them.
        """

    def setup(self, stage: str | None = None) -> None:
        """See `setup`.

        A picture that cannot be read is an error in training and its validation. Everywhere else it is skipped: the
        other pictures' results are not to be lost.
        """
        self._skip_unreadable = stage in ("validate", "test", "predict")
        for dataset in self._datasets.values():
            dataset.skip_unreadable = self._skip_unreadable
        super().setup(stage)

    @property
    def has_masks(self) -> bool:
        """Return whether targets have masks; known after `setup`."""
        return True

    @property
    def category_ids(self) -> list[int]:
        """The data set's own id of every class, in the order of the labels: label 1 is ``category_ids[0]``."""
        return sorted(self.classes.class_of_label, key=self.classes.class_of_label.__getitem__)

    @staticmethod
    def collate(samples: list[Any]) -> Batch:
        """See `collate`."""
        return collate(samples)

    def make_sampler(self, dataset: DetectionDataset) -> TrainingSampler:
        """Return what orders the training samples."""
        if not self.group_by_aspect:
            return super().make_sampler(dataset)
        upright = [int(dataset.aspect_ratio(index) < 1) for index in range(len(dataset))]
        return GroupedTrainingSampler(dataset, upright, self.batch_size, self.seed)

    def train_transform(self) -> A.Compose:
        """Return the training pipeline; override it to augment differently."""
        return detection_train_transform(
            self.sizes,
            self.max_size,
            self.crop_probability,
            self.crop_range,
            self.flip_probability,
            self.color_jitter,
        )

    def eval_transform(self) -> A.Compose:
        """Return the pipeline for validation, test and prediction, which takes ``image``."""
        return eval_transform()
