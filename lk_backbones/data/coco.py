"""COCO (Lin et al., 2014, https://cocodataset.org), and every data set in its format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lk_backbones._printing import printable
from lk_backbones.data.checks import for_all, leads_outside, require_folders
from lk_backbones.data.classes import ClassTable
from lk_backbones.data.coco_format import CocoFile, CocoImage, read_coco
from lk_backbones.data.datamodule import FULL_CHECK_LIMIT, CheckLevel, Split
from lk_backbones.data.detection import DetectionDataModule, DetectionDataset, Objects, UnreadablePicture
from lk_backbones.data.detection_transforms import MULTI_SCALE
from lk_backbones.data.outlines import require_mask_api
from lk_backbones.data.reading import image_size, read_image

_LAYOUT = (
    "annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/ and val2017/ as in COCO; "
    "other names can be given as train_annotations, train_images and so on"
)


class CocoDataset(DetectionDataset):
    """Pictures in a folder, objects in a COCO annotation file.

    Args:
        file: The annotations.
        folder: Folder that the file's ``file_name`` is relative to.
        masks: Whether there are masks.
        places: Which of the file's pictures there are, int64 ``(N,)``.
        transform: See `DetectionDataset`.
        training: See `DetectionDataset`.
        allow_outside: Whether a symbolic link in the folder may lead out of it.
    """

    def __init__(
        self,
        file: CocoFile,
        folder: Path,
        masks: bool,
        places: np.ndarray,
        transform: A.Compose,
        training: bool,
        allow_outside: bool = False,
    ):
        super().__init__(transform, training)
        self.file = file
        self.folder = folder
        self.masks = masks
        self.places = torch.from_numpy(places)  # loading processes share a tensor
        self.allow_outside = allow_outside

    def __len__(self) -> int:
        return len(self.places)

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} pictures, numbered from 0; there is no picture {index}.")
        return int(self.places[index])

    def _image(self, index: int) -> CocoImage:
        return self.file.image(self._place(index))

    def path(self, index: int) -> str:
        """Return the picture's file."""
        return str(self.folder / self._image(index).file_name)

    def image_id(self, index: int) -> int:
        """Return the picture's id in the annotation file."""
        return int(self.file.image_ids[self._place(index)])

    def aspect_ratio(self, index: int) -> float:
        """Return width / height as the annotation file says."""
        place = self._place(index)
        return float(self.file.widths[place] / self.file.heights[place])

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width as the annotation file says."""
        place = self._place(index)
        return int(self.file.heights[place]), int(self.file.widths[place])

    def objects(self, index: int) -> Objects:
        """Return what the annotation file says of the objects of a picture; masks are not drawn yet."""
        place = self._place(index)
        chosen = self.file.annotations(place)
        boxes = self.file.boxes[chosen].numpy().copy()
        boxes[:, 2:] += boxes[:, :2]
        return Objects(
            boxes=boxes,
            labels=self.file.labels[chosen].numpy().copy(),
            iscrowd=self.file.iscrowd[chosen].numpy().copy(),
            area=self.file.areas[chosen].numpy().copy(),
            masks=self.file.outlines(place) if self.masks else None,
        )

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        """See `load`."""
        picture, objects = self.read(index)
        return picture, objects.drawn()

    def blank(self, index: int) -> tuple[np.ndarray, Objects]:
        """See `blank`."""
        return np.zeros((*self.size(index), 3), np.uint8), self.objects(index)

    def read(self, index: int) -> tuple[np.ndarray, Objects]:
        """See `read`.

        Annotations refer to the picture as it is displayed or, where only that fits the annotation file's width and
        height, as it is stored: some data sets were annotated without regard to the EXIF orientation.
        """
        image = self._image(index)
        path = self._require_inside(image)
        size = (image.height, image.width)
        try:
            picture = read_image(path)
            if picture.shape[:2] != size and picture.shape[:2] == size[::-1]:
                picture = read_image(path, turn=False)
        except (FileNotFoundError, ValueError) as error:
            raise UnreadablePicture(str(error)) from error
        self._require_size(path, image, picture.shape[:2])
        return picture, self.objects(index)

    def _require_inside(self, image: CocoImage) -> Path:
        path = self.folder / image.file_name
        if not self.allow_outside and leads_outside(self.folder, path):
            raise ValueError(
                f'{self.file.path}, image {image.id}: "file_name" {image.file_name!r} leads out of {self.folder} by a '
                "symbolic link. If you trust the file, set allow_outside=True."
            )
        return path

    def _require_size(self, path: Path, image: CocoImage, size: tuple[int, ...]) -> None:
        if tuple(size) != (image.height, image.width):
            raise ValueError(
                f"The image {path} is {size[1]} wide and {size[0]} high, but {self.file.path} says {image.width} "
                f"and {image.height} (image {image.id}). Correct the file's width and height, and the boxes."
            )

    def check(self, level: CheckLevel) -> None:
        """Look for all files; ``"headers"`` also at their sizes, ``"full"`` at every pixel and mask.

        ``"auto"`` is full up to 1000 pictures, and beyond looks only for the files. Pictures that cannot be read are no
        error where they are skipped.

        Raises:
            FileNotFoundError: If a picture is missing.
            ValueError: If a file is unusable; the message names it.
        """
        if level == "off":
            return
        images = [self._image(index) for index in range(len(self))]
        missing = [image for image in images if not self._require_inside(image).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(images)} images of {self.file.path} are not in {self.folder}, first "
                f"{missing[0].file_name} (image {missing[0].id}). Is it the right folder?"
            )
        if level == "full" or (level == "auto" and len(self) <= FULL_CHECK_LIMIT):
            for_all(self._check_sample, range(len(self)), "Checking images and annotations")
        elif level == "headers":
            for_all(self._check_header, images, "Checking image sizes")

    def _check_sample(self, index: int) -> None:
        try:
            self.load(index)
        except UnreadablePicture:
            if not self.skip_unreadable:
                raise

    def _check_header(self, image: CocoImage) -> None:
        try:
            size = image_size(self.folder / image.file_name)
        except ValueError:
            if self.skip_unreadable:
                return
            raise
        if sorted(size) != sorted((image.height, image.width)):  # which of the two may depend on the EXIF data
            self._require_size(self.folder / image.file_name, image, size)


class CocoDataModule(DetectionDataModule):
    """Pictures and annotations in COCO format: COCO itself, or a data set of one's own.

    The defaults are the official layout::

        root/
          annotations/instances_train2017.json
          annotations/instances_val2017.json
          train2017/000000000009.jpg ...
          val2017/000000000139.jpg ...

    Category ids may have gaps, as COCO's have: label ``k`` (from 1) is the ``k``-th id in ascending order. Polygons,
    multi-polygons and both kinds of RLE are understood. Pictures are turned as their EXIF orientation says, and become
    RGB.

    Args:
        root: Folder that all other paths are relative to.
        train_images: Folder of the training pictures.
        train_annotations: Annotations of the training pictures.
        val_images: Folder of the validation pictures.
        val_annotations: Annotations of the validation pictures.
        test_images: Folder of the test pictures. None: no test split; test and prediction use the validation split.
        test_annotations: Annotations of the test pictures, or a file that lists the pictures only, for prediction.
        masks: Whether targets have masks. None: if every annotation has one.
        keep_empty: Whether training uses pictures without an object too. Evaluation always does.
        strict: Whether a box of no positive size, or outside of its picture, is an error. Else such annotations are
            left out, in training and in evaluation, with one warning that counts them.
        allow_outside: Whether a ``file_name`` may lead out of the folder of the pictures: an absolute path, ``..``, a
            symbolic link inside. A file from elsewhere could make any picture of this machine a part of the data. The
            folders themselves may be links.
        batch_size: Training pictures per device.
        sizes: Lengths in pixels of the short side, one of which is drawn for every training picture.
        max_size: Largest length of the long side in training.
        check_files: What to look at in ``setup``: ``"headers"``, that all pictures exist and their sizes agree with the
            annotations; ``"full"``, also that every picture and mask can be read; ``"auto"``, full for splits of up to
            1000 pictures, else that all pictures exist; ``"off"``. Annotation files are always checked in full.
        **kwargs: See `DetectionDataModule`.
    """

    def __init__(
        self,
        root: str = "data/coco",
        train_images: str = "train2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_images: str = "val2017",
        val_annotations: str = "annotations/instances_val2017.json",
        test_images: str | None = None,
        test_annotations: str | None = None,
        masks: bool | None = None,
        keep_empty: bool = False,
        strict: bool = False,
        allow_outside: bool = False,
        batch_size: int = 2,
        sizes: Sequence[int] = MULTI_SCALE,
        max_size: int = 1333,
        check_files: CheckLevel = "auto",
        **kwargs: Any,
    ):
        super().__init__(batch_size=batch_size, sizes=sizes, max_size=max_size, check_files=check_files, **kwargs)
        if (test_images is None) != (test_annotations is None):
            raise ValueError("test_images and test_annotations go together: give both or neither.")
        self.root = Path(root)
        self.paths: dict[Split, tuple[str, str]] = {
            "train": (train_images, train_annotations),
            "val": (val_images, val_annotations),
        }
        if test_images is not None and test_annotations is not None:
            self.paths["test"] = (test_images, test_annotations)
        self.masks = masks
        self.keep_empty = keep_empty
        self.strict = strict
        self.allow_outside = allow_outside
        self._files: dict[Split, CocoFile] = {}

    @property
    def test_split(self) -> Split:
        """The test split if there is one with annotations, else the validation split."""
        return "test" if "test" in self.paths and self._file("test").has_annotations else "val"

    @property
    def predict_split(self) -> Split:
        """The test split if there is one, with annotations or without, else the validation split."""
        return "test" if "test" in self.paths else "val"

    @property
    def has_masks(self) -> bool:
        """Return whether targets have masks; known after `setup`."""
        return self.masks is not False and all(dataset.masks for dataset in self._datasets.values())

    def load_classes(self) -> ClassTable:
        """Read the categories; all files have the same, and the validation file is the smallest."""
        splits: list[Split] = ["val", "test", "train"]
        present = [split for split in splits if split in self.paths and self._path(split).is_file()]
        return self._file(present[0] if present else "val").table

    def _path(self, split: Any) -> Path:
        return self.root / self.paths[split][1]

    def _file(self, split: Split) -> CocoFile:
        """Read a split's annotations, once."""
        if split not in self._files:
            require_folders(self.root, [], _LAYOUT)
            path = self._path(split)
            if not path.is_file():
                folder = path.parent
                found = sorted(p.name for p in folder.glob("*.json")) if folder.is_dir() else []
                raise FileNotFoundError(
                    f"There is no annotations file {path}. In {folder} there is: {', '.join(found) or 'nothing'}. "
                    f"Expected: {_LAYOUT}."
                )
            self._files[split] = read_coco(path, self.strict, split != "test", self.allow_outside)
        return self._files[split]

    def make_dataset(self, split: Split) -> CocoDataset:
        """See `DetectionDataModule.make_dataset`."""
        file = self._file(split)
        if file.table.class_of_label != self.classes.class_of_label or file.table.names != self.classes.names:
            raise ValueError(
                f"{file.path} has other categories than the data set's other annotations file: "
                f"{_difference(file.table, self.classes)}. All files of a data set must list the same categories."
            )
        folder = self.paths[split][0]
        require_folders(self.root, [folder], _LAYOUT)
        training = split == "train"
        places = np.arange(len(file))
        if training and not self.keep_empty:
            places = np.flatnonzero(file.num_objects > 0)
            if not len(places):
                raise ValueError(f"{file.path} has no image with an object, so there is nothing to train on.")
        transform = self.train_transform() if training else self.eval_transform()
        masks = self._has_masks(file)
        dataset = CocoDataset(file, self.root / folder, masks, places, transform, training, self.allow_outside)
        dataset.skip_unreadable = self._skip_unreadable
        return dataset

    def _has_masks(self, file: CocoFile) -> bool:
        if self.masks is False:
            return False
        if self.masks and file.without_mask is not None:
            raise ValueError(
                f"{file.path}, annotation {file.without_mask} has no segmentation, but masks=True asks for masks. "
                "Set masks=False, and use a detector without masks."
            )
        if file.without_mask is None:
            require_mask_api()
        elif file.has_some_mask:
            rank_zero_warn(
                f"{printable(file.path)}: some annotations have no segmentation, first annotation {file.without_mask}, "
                "so masks are left out altogether."
            )
        return file.without_mask is None


def _difference(one: ClassTable, other: ClassTable) -> str:
    pairs, others = (dict(zip(sorted(t.class_of_label), t.names, strict=True)) for t in (one, other))
    key = next(key for key in sorted({*pairs, *others}) if pairs.get(key) != others.get(key))
    return f"category {key} is {pairs.get(key)!r} in one and {others.get(key)!r} in the other"
