"""Cityscapes: fine annotations of 50 cities, 19 classes (Cordts et al., 2016, https://www.cityscapes-dataset.com)."""

from pathlib import Path
from typing import Any

from lk_backbones.data.checks import pair_by_name, require_files, require_folders
from lk_backbones.data.classes import ClassTable, load_table
from lk_backbones.data.reading import find_files
from lk_backbones.data.segmentation import FileSegmentationDataset, SegmentationDataModule, Split

_IMAGE_SUFFIX = "_leftImg8bit.png"
_MASK_SUFFIX = "_gtFine_labelIds.png"
_LAYOUT = (
    f"leftImg8bit/{{train,val}}/<city>/*{_IMAGE_SUFFIX} and gtFine/{{train,val}}/<city>/*{_MASK_SUFFIX}, "
    "as in leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"
)


class CityscapesDataModule(SegmentationDataModule):
    """Cityscapes as it is distributed: ``leftImg8bit/`` and ``gtFine/`` with ``*_gtFine_labelIds.png``.

    Label ids become the 19 training classes; all other ids are ignored (255). Training uses the 2975 fine images,
    validation and test the 500 validation images (the labels of the test images are not public), prediction the test
    images if they are there.

    Defaults are those of the published RepLKNet-31B (UPerNet): crops of 769, and pictures fitted into 2049 × 1025, a
    pixel more than they have, before the random ratio and for evaluation, which takes them whole. The published batch
    is 64 crops over all GPUs. With ``base_size=None`` and ``test_size=None`` pictures keep their own size; smaller
    copies of the data set need that.

    Args:
        root: Folder with ``leftImg8bit/`` and ``gtFine/``.
        batch_size: Training crops per device.
        crop_size: ``(height, width)`` of training crops, or one number for both.
        base_size: ``(long side, short side)`` that pictures are fitted into at ratio 1. None: their own size.
        test_size: ``(long side, short side)`` that pictures are fitted into for evaluation. None: as they are.
        **kwargs: See `SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str = "data/cityscapes",
        batch_size: int = 8,
        crop_size: int | tuple[int, int] = 769,
        base_size: tuple[int, int] | None = (2049, 1025),
        test_size: tuple[int, int] | None = (2049, 1025),
        **kwargs: Any,
    ):
        super().__init__(batch_size=batch_size, crop_size=crop_size, base_size=base_size, test_size=test_size, **kwargs)
        self.root = Path(root)

    def load_classes(self) -> ClassTable:
        """Return the 19 classes."""
        return load_table("cityscapes")

    @property
    def predict_split(self) -> Split:
        """The test split if its images are there, else the validation split."""
        return "test" if (self.root / "leftImg8bit" / "test").is_dir() else "val"

    def make_dataset(self, split: Split) -> FileSegmentationDataset:
        """See `SegmentationDataModule.make_dataset`."""
        training = split == "train"
        transform = self.train_transform() if training else self.eval_transform()
        image_folder, mask_folder = self.root / "leftImg8bit" / split, self.root / "gtFine" / split
        labelled = split != "test"  # the label files of the test split are placeholders
        folders = [f"leftImg8bit/{split}"] + ([f"gtFine/{split}"] if labelled else [])
        require_folders(self.root, folders, _LAYOUT)
        images = [path for path in find_files(image_folder, [".png"]) if path.name.endswith(_IMAGE_SUFFIX)]
        require_files(images, image_folder, [f"<city>/*{_IMAGE_SUFFIX}"])
        if not labelled:
            return FileSegmentationDataset(images, None, self.classes, transform, training)

        masks = [path for path in find_files(mask_folder, [".png"]) if path.name.endswith(_MASK_SUFFIX)]
        pairs = pair_by_name(
            images,
            masks,
            lambda path: path.relative_to(image_folder).as_posix().removesuffix(_IMAGE_SUFFIX),
            lambda path: path.relative_to(mask_folder).as_posix().removesuffix(_MASK_SUFFIX),
            mask_folder,
            lambda key: key + _MASK_SUFFIX,
        )
        images, masks = [image for image, _ in pairs], [mask for _, mask in pairs]
        return FileSegmentationDataset(images, masks, self.classes, transform, training)
