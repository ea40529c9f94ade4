"""The base of the semantic segmentation data modules: data sets, loaders and options that they have in common.

A batch is a dictionary:

- ``image``: float32 ``(N, 3, h, w)``, RGB in [0, 1], not normalised (the task normalises).
- ``mask``: int64 ``(N, H, W)``, class index or 255 (ignored). In training ``(h, w) == (H, W)``; in evaluation
  ``(H, W)`` is the original size, which differs from ``(h, w)`` if ``test_size`` resizes pictures.
- ``path``: list of the N picture files (or names, where pictures are made up).
- ``original_size``: list of N tuples ``(H, W)``; in evaluation only.
- ``scaled``: for test-time augmentation over scales, a list of uint8 ``(N, 3, h, w)``, the original pictures at every
  scale of the test size; see `SegmentationDataModule.set_test_scales`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN

from lk_backbones.data.checks import check_sizes, for_all, require_same_size
from lk_backbones.data.classes import IGNORE_INDEX, ClassTable
from lk_backbones.data.datamodule import (
    FULL_CHECK_LIMIT,
    CheckLevel,
    ImageDataModule,
    PictureDataset,
    Split,
    require_size,
)
from lk_backbones.data.reading import labels_to_classes, read_image, read_labels
from lk_backbones.data.sampling import SampleKey
from lk_backbones.data.transforms import eval_transform, train_transform

__all__ = ["FileSegmentationDataset", "SegmentationDataModule", "SegmentationDataset", "Split", "collate"]


class SegmentationDataset(PictureDataset):
    """A map-style data set of pictures with label maps.

    In training its pipeline takes ``image`` and ``mask``, in evaluation ``image``; samples of training are crops.

    Attributes:
        scaled_transforms: In evaluation, further pipelines that take the original ``image``: what they make of it is
            the sample's list ``scaled``.
    """

    scaled_transforms: Sequence[A.Compose] = ()

    @abstractmethod
    def load(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the picture, uint8 RGB ``(H, W, 3)``, and the class indices, uint8 ``(H, W)``, or None without labels.

        Raises:
            IndexError: If there is no such sample.
            ValueError: If a file is unusable; the message names it.
        """

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        """Return one sample; with a `SampleKey` the augmentation is the one of that seed."""
        index = key.sample if isinstance(key, SampleKey) else key
        image, mask = self.load(index)
        if not self.training:
            sample = {"image": self.transform(image=image)["image"], "path": self.path(index)}
            if self.scaled_transforms:
                sample["scaled"] = [transform(image=image)["image"] for transform in self.scaled_transforms]
            if mask is not None:
                sample["mask"] = torch.from_numpy(mask.astype(np.int64))
            return sample | {"original_size": (image.shape[0], image.shape[1])}
        augmented = self.augment(key, image=image, mask=mask)
        return {"image": augmented["image"], "mask": augmented["mask"].long(), "path": self.path(index)}


class FileSegmentationDataset(SegmentationDataset):
    """Pictures and label maps in files.

    Args:
        images: Image files.
        masks: The mask file of each, or None when there are none.
        table: Classes, and the meaning of the values in the mask files.
        transform: See `SegmentationDataset`.
        training: See `SegmentationDataset`.
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
        """See `SegmentationDataset.load`."""
        image = read_image(self.images[index])
        if self.masks is None:
            return image, None
        labels = read_labels(self.masks[index])
        require_same_size(self.images[index], image.shape[:2], self.masks[index], labels.shape)
        return image, labels_to_classes(self.masks[index], labels, self.table, self._lookup)

    def path(self, index: int) -> str:
        """See `SegmentationDataset.path`."""
        return str(self.images[index])

    def check(self, level: CheckLevel) -> None:
        """Look at all files: ``"headers"`` at their sizes, ``"full"`` at every pixel, ``"auto"`` depends on how many.

        Raises:
            ValueError: If a file is unusable; the message names it.
        """
        if level == "off":
            return
        if level == "full" or (level == "auto" and len(self) <= FULL_CHECK_LIMIT):
            for_all(self.load, range(len(self)), "Checking images and masks")
        elif self.masks is not None:
            check_sizes(list(zip(self.images, self.masks, strict=True)))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch: stack ``image``, ``mask`` and every scale of ``scaled``, make lists of the rest.

    Raises:
        ValueError: If the pictures have different sizes.
    """

    def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        sizes = {tuple(t.shape[-2:]): sample["path"] for t, sample in zip(tensors, samples, strict=True)}
        if len(sizes) > 1:
            (one, first), (other, second) = list(sizes.items())[:2]
            raise ValueError(
                f"Pictures of different sizes cannot share a batch: {first} is {one[0]}×{one[1]}, {second} is "
                f"{other[0]}×{other[1]} (height×width). Set val_batch_size=1, for a folder of pictures batch_size=1."
            )
        return torch.stack(list(tensors))

    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
    for key in ("image", "mask"):
        if key in batch:
            batch[key] = stack(batch[key])
    if "scaled" in batch:
        batch["scaled"] = [stack(copies) for copies in zip(*batch["scaled"], strict=True)]
    return batch


class SegmentationDataModule(ImageDataModule):
    """Base of the semantic segmentation data modules.

    Training batches are augmented as published for the large-kernel families (see `lk_backbones.data.transforms`);
    their order and augmentation depend on the seed, the epoch and the position alone, so a run resumed from any
    checkpoint sees what an undisturbed one sees. Evaluation loaders give every picture exactly once, also under DDP.

    A subclass gives `load_classes` and `make_dataset`, and says which splits it has.

    Args:
        batch_size: Training crops per device.
        val_batch_size: Pictures per device in validation, test and prediction. More than 1 needs pictures of one size.
        num_workers: Loading processes per loader. None: as many as there are CPU cores for this process, at most 4.
            See `ImageDataModule` for how they are started.
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
        image_fill: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        seed: int | None = None,
        check_files: CheckLevel = "auto",
        pin_memory: bool | None = None,
    ):
        super().__init__(batch_size, val_batch_size, num_workers, seed, check_files, pin_memory)
        crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else (crop_size[0], crop_size[1])
        for name, size in (("crop_size", crop_size), ("base_size", base_size), ("test_size", test_size)):
            require_size(name, size)
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(
                f"scale_range must be (smallest, largest) with 0 < smallest <= largest, got {scale_range}."
            )
        if not 0 < cat_max_ratio <= 1:
            raise ValueError(f"cat_max_ratio must be a share above 0 and up to 1, got {cat_max_ratio}.")
        if not all(0 <= value <= 1 for value in image_fill):
            raise ValueError(f"image_fill must be RGB in [0, 1], got {image_fill}. Divide 8-bit colours by 255.")
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.base_size = base_size
        self.cat_max_ratio = cat_max_ratio
        self.test_size = test_size
        self.image_fill = image_fill
        self._test_scales: tuple[float, ...] = ()

    @abstractmethod
    def make_dataset(self, split: Split) -> SegmentationDataset:
        """Return the data set of a split: augmented for ``"train"``, whole pictures for ``"val"`` and ``"test"``.

        Raises:
            FileNotFoundError: If folders or files are missing; the message names them.
        """

    def setup(self, stage: str | None = None) -> None:
        """See `setup`."""
        super().setup(stage)
        self.set_test_scales(self._test_scales)

    def set_test_scales(self, scales: Sequence[float]) -> None:
        """Have the evaluation loaders give, beside every picture, copies for test-time augmentation.

        Every copy is made from the original picture, as in the published multi-scale results: scaling what
        ``test_size`` has resized would blur it. A task asks for them in its own ``setup``.

        Args:
            scales: Scales of ``test_size``, or of the picture's own size without it. Empty: no copies.
        """
        self._test_scales = tuple(scales)
        for dataset in self._datasets.values():
            if not dataset.training:
                dataset.scaled_transforms = [self.eval_transform(scale) for scale in scales]

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """See `collate`."""
        return collate(samples)

    def train_transform(self) -> A.Compose:
        """Return the training pipeline, which takes ``image`` and ``mask``; override it to augment differently."""
        return train_transform(
            self.crop_size, self.scale_range, self.base_size, self.cat_max_ratio, self.image_fill, self.ignore_index
        )

    def eval_transform(self, scale: float | None = None) -> A.Compose:
        """Return the pipeline for validation, test and prediction, which takes ``image``.

        Args:
            scale: For a copy of test-time augmentation, its scale; see
                `eval_transform`.
        """
        return eval_transform(self.test_size, scale)
