"""A folder of one's own pictures and label maps."""

import hashlib
from pathlib import Path
from typing import Any

from lk_backbones.data.checks import pair_by_name, require_files, require_folders
from lk_backbones.data.classes import ClassTable, read_classes_file
from lk_backbones.data.reading import IMAGE_EXTENSIONS, MASK_EXTENSIONS, find_files
from lk_backbones.data.segmentation import FileSegmentationDataset, SegmentationDataModule, Split

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_LAYOUT = (
    "images/train/NAME.jpg with masks/train/NAME.png, the same for val and, if wanted, test; or, to have the "
    "validation split drawn, images/NAME.jpg with masks/NAME.png"
)


class SegmentationFolderDataModule(SegmentationDataModule):
    """Pictures in ``images/``, label maps of the same name in ``masks/``, and a classes file.

    Two layouts are understood::

        root/                                root/
          classes.json (or classes.txt)        classes.json
          images/train/street_1.jpg            images/street_1.jpg
          images/val/street_2.jpg              images/street_2.jpg
          masks/train/street_1.png             masks/street_1.png
          masks/val/street_2.png               masks/street_2.png

    In the second, ``val_fraction`` of the pictures validate. Which ones depends on their names only, so the split is
    the same in every run, and pictures that are added later hardly change it. Pictures may lie in further sub-folders.

    Masks are single-channel pictures (8-bit, 16-bit or palette) whose values are class ids: 0 is the first name in the
    classes file. The classes file's ``"ignore_index"`` and 255 are ignored; see
    `read_classes_file`. A test split without masks serves prediction only.

    Args:
        root: The folder.
        batch_size: Training crops per device.
        crop_size: ``(height, width)`` of training crops, or one number for both.
        classes_file: The classes file. None: ``classes.json`` or ``classes.txt`` in ``root``.
        ignore_label: Mask value of pixels without a class. None: what the classes file says, else only 255.
        val_fraction: Share of pictures that validate, where the folders do not say so.
        mask_suffix: What the name of a mask has in addition, e.g. ``"_mask"`` for ``street_1_mask.png``.
        **kwargs: See `SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 8,
        crop_size: int | tuple[int, int] = (512, 512),
        classes_file: str | None = None,
        ignore_label: int | None = None,
        val_fraction: float = 0.2,
        mask_suffix: str = "",
        **kwargs: Any,
    ):
        super().__init__(batch_size=batch_size, crop_size=crop_size, **kwargs)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}.")
        self.root = Path(root)
        self.classes_file = classes_file
        self.ignore_label = ignore_label
        self.val_fraction = val_fraction
        self.mask_suffix = mask_suffix

    def load_classes(self) -> ClassTable:
        """Read the classes file."""
        if self.classes_file is not None:
            path = Path(self.classes_file)
        else:
            require_folders(self.root, ["images"], _LAYOUT)  # a wrong root is the likelier mistake: say so first
            path = self.root / "classes.json"
            if not path.is_file() and (self.root / "classes.txt").is_file():
                path = self.root / "classes.txt"
        return read_classes_file(path, self.ignore_label)

    @property
    def _has_split_folders(self) -> bool:
        return any((self.root / "images" / split).is_dir() for split in _SPLITS)

    @property
    def test_split(self) -> Split:
        """The test split if it has masks, else the validation split."""
        return "test" if (self.root / "masks" / "test").is_dir() else "val"

    @property
    def predict_split(self) -> Split:
        """The test split if there is one, with masks or without, else the validation split."""
        return "test" if (self.root / "images" / "test").is_dir() else "val"

    def make_dataset(self, split: Split) -> FileSegmentationDataset:
        """See `SegmentationDataModule.make_dataset`."""
        training = split == "train"
        transform = self.train_transform() if training else self.eval_transform()
        below = f"/{split}" if self._has_split_folders else ""
        image_folder, mask_folder = self.root / f"images{below}", self.root / f"masks{below}"
        labelled = split != "test" or mask_folder.is_dir()
        require_folders(self.root, [f"images{below}"] + ([f"masks{below}"] if labelled else []), _LAYOUT)
        images = find_files(image_folder, IMAGE_EXTENSIONS)
        require_files(images, image_folder)
        if not labelled:
            return FileSegmentationDataset(images, None, self.classes, transform, training)

        suffix = self.mask_suffix
        masks = [p for p in find_files(mask_folder, IMAGE_EXTENSIONS) if p.stem.endswith(suffix)]
        lossy = next((path for path in masks if path.suffix.lower() not in MASK_EXTENSIONS), None)
        if lossy is not None:
            raise ValueError(
                f"The mask {lossy} is in a format that may change values. "
                f"Masks must be one of {', '.join(MASK_EXTENSIONS)}."
            )
        pairs = pair_by_name(
            images,
            masks,
            lambda path: path.relative_to(image_folder).with_suffix("").as_posix(),
            lambda path: path.relative_to(mask_folder).with_suffix("").as_posix().removesuffix(suffix),
            mask_folder,
            lambda key: f"{key}{suffix}.png",
        )
        if not below:
            pairs = self._drawn_split(split, pairs, image_folder)
        images, masks = [image for image, _ in pairs], [mask for _, mask in pairs]
        return FileSegmentationDataset(images, masks, self.classes, transform, training)

    def _drawn_split(self, split: Split, pairs: list[tuple[Path, Path]], folder: Path) -> list[tuple[Path, Path]]:
        if len(pairs) < 2:
            raise ValueError(f"{folder} holds {len(pairs)} picture; at least 2 are needed, to train and to validate.")

        def digest(pair: tuple[Path, Path]) -> bytes:
            return hashlib.sha256(pair[0].relative_to(folder).with_suffix("").as_posix().encode()).digest()

        count = min(len(pairs) - 1, max(1, round(self.val_fraction * len(pairs))))
        validating = set(sorted(pairs, key=digest)[:count])
        return [pair for pair in pairs if (pair in validating) == (split == "val")]
