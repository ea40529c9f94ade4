"""COCO (Lin et al., 2014, https://cocodataset.org), and every data set in its format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lk_backbones.data.checks import for_all, require_folders
from lk_backbones.data.classes import ClassTable
from lk_backbones.data.coco_format import CocoFile, decode_mask, read_coco, require_mask_api
from lk_backbones.data.datamodule import FULL_CHECK_LIMIT, CheckLevel, Split
from lk_backbones.data.detection import DetectionDataModule, DetectionDataset, Objects
from lk_backbones.data.detection_transforms import MULTI_SCALE
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
        masks: Whether to decode masks.
        places: Which of the file's pictures there are, int64 `(N,)`.
        transform: See :class:`~lk_backbones.data.detection.DetectionDataset`.
        training: See :class:`~lk_backbones.data.detection.DetectionDataset`.
    """

    def __init__(
        self, file: CocoFile, folder: Path, masks: bool, places: np.ndarray, transform: A.Compose, training: bool
    ):
        super().__init__(transform, training)
        self.file = file
        self.folder = folder
        self.masks = masks
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def _image(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} pictures, numbered from 0; there is no picture {index}.")
        image: dict[str, Any] = self.file.images[int(self.places[index])]
        return image

    def path(self, index: int) -> str:
        """Returns the picture's file."""
        return str(self.folder / self._image(index)["file_name"])

    def image_id(self, index: int) -> int:
        """Returns the picture's id in the annotation file."""
        return int(self._image(index)["id"])

    def aspect_ratio(self, index: int) -> float:
        """Returns width / height as the annotation file says."""
        image = self._image(index)
        return float(image["width"] / image["height"])

    def load(self, index: int) -> tuple[np.ndarray, Objects]:
        """See :meth:`~lk_backbones.data.detection.DetectionDataset.load`.

        Annotations refer to the picture as it is displayed or, where only that fits the annotation file's width and
        height, as it is stored: some data sets were annotated without regard to the EXIF orientation.
        """
        image = self._image(index)
        path = self.folder / image["file_name"]
        size = (image["height"], image["width"])
        picture = read_image(path)
        if picture.shape[:2] != size and picture.shape[:2] == size[::-1]:
            picture = read_image(path, turn=False)
        self._require_size(path, image, picture.shape[:2])
        annotations = self.file.annotations[int(self.places[index])]
        boxes = np.array([annotation["box"] for annotation in annotations], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = None
        if self.masks:
            masks = np.zeros((len(annotations), *size), np.uint8)
            for mask, annotation in zip(masks, annotations, strict=True):
                where = f"{self.file.path}, annotation {annotation['id']}"
                mask[:] = decode_mask(where, annotation["segmentation"], *size)
        return picture, Objects(
            boxes=boxes,
            labels=np.array([annotation["label"] for annotation in annotations], np.int64),
            iscrowd=np.array([annotation["iscrowd"] for annotation in annotations], np.int64),
            area=np.array([_area(annotation) for annotation in annotations], np.float32),
            masks=masks,
        )

    def _require_size(self, path: Path, image: dict[str, Any], size: tuple[int, ...]) -> None:
        if tuple(size) != (image["height"], image["width"]):
            raise ValueError(
                f"The image {path} is {size[1]} wide and {size[0]} high, but {self.file.path} says {image['width']} "
                f"and {image['height']} (image {image['id']}). Correct the file's width and height, and the boxes."
            )

    def check(self, level: CheckLevel) -> None:
        """Looks for all files; ``"headers"`` also at their sizes, ``"full"`` at every pixel and mask.

        ``"auto"`` is full up to 1000 pictures, and beyond looks only for the files.

        Raises:
            FileNotFoundError: A picture is missing.
            ValueError: A file is unusable; the message names it.
        """
        if level == "off":
            return
        images = [self._image(index) for index in range(len(self))]
        missing = [image for image in images if not (self.folder / image["file_name"]).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(images)} images of {self.file.path} are not in {self.folder}, first "
                f"{missing[0]['file_name']} (image {missing[0]['id']}). Is it the right folder?"
            )
        if level == "full" or (level == "auto" and len(self) <= FULL_CHECK_LIMIT):
            for_all(self.load, range(len(self)), "Checking images and annotations")
        elif level == "headers":
            for_all(self._check_header, images, "Checking image sizes")

    def _check_header(self, image: dict[str, Any]) -> None:
        size = image_size(self.folder / image["file_name"])
        if sorted(size) != sorted((image["height"], image["width"])):  # which of the two may depend on the EXIF data
            self._require_size(self.folder / image["file_name"], image, size)


def _area(annotation: dict[str, Any]) -> float:
    area = annotation["area"]
    return float(annotation["box"][2] * annotation["box"][3] if area is None else area)


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
        batch_size: Training pictures per device.
        sizes: Lengths in pixels of the short side, one of which is drawn for every training picture.
        max_size: Largest length of the long side in training.
        check_files: What to look at in ``setup``: ``"headers"``, that all pictures exist and their sizes agree with the
            annotations; ``"full"``, also that every picture and mask can be read; ``"auto"``, full for splits of up to
            1000 pictures, else that all pictures exist; ``"off"``. Annotation files are always checked in full.
        **kwargs: See :class:`DetectionDataModule`.
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
        """Whether targets have masks; known after :meth:`setup`."""
        return self.masks is not False and all(dataset.masks for dataset in self._datasets.values())

    def load_classes(self) -> ClassTable:
        """Reads the categories; all files have the same, and the validation file is the smallest."""
        splits: list[Split] = ["val", "test", "train"]
        present = [split for split in splits if split in self.paths and self._path(split).is_file()]
        return self._file(present[0] if present else "val").table

    def _path(self, split: Any) -> Path:
        return self.root / self.paths[split][1]

    def _file(self, split: Split) -> CocoFile:
        """Reads a split's annotations, once."""
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
            self._files[split] = read_coco(path, self.strict, needs_annotations=split != "test")
        return self._files[split]

    def make_dataset(self, split: Split) -> CocoDataset:
        """See :meth:`DetectionDataModule.make_dataset`."""
        file = self._file(split)
        if file.table.class_of_label != self.classes.class_of_label or file.table.names != self.classes.names:
            raise ValueError(
                f"{file.path} has other categories than the data set's other annotations file: "
                f"{_difference(file.table, self.classes)}. All files of a data set must list the same categories."
            )
        folder = self.paths[split][0]
        require_folders(self.root, [folder], _LAYOUT)
        training = split == "train"
        places = np.arange(len(file.images))
        if training and not self.keep_empty:
            places = np.flatnonzero(file.num_objects > 0)
            if not len(places):
                raise ValueError(f"{file.path} has no image with an object, so there is nothing to train on.")
        transform = self.train_transform() if training else self.eval_transform()
        return CocoDataset(file, self.root / folder, self._has_masks(file), places, transform, training)

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
        elif any(map(_some_mask, file.annotations)):
            rank_zero_warn(
                f"{file.path}: some annotations have no segmentation, first annotation {file.without_mask}, so masks "
                "are left out altogether."
            )
        return file.without_mask is None


def _some_mask(annotations: list[dict[str, Any]]) -> bool:
    return any(annotation["segmentation"] for annotation in annotations)


def _difference(one: ClassTable, other: ClassTable) -> str:
    pairs, others = (dict(zip(sorted(t.class_of_label), t.names, strict=True)) for t in (one, other))
    key = next(key for key in sorted({*pairs, *others}) if pairs.get(key) != others.get(key))
    return f"category {key} is {pairs.get(key)!r} in one and {others.get(key)!r} in the other"
