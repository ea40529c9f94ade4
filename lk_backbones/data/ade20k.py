"""ADE20K: the 150 classes of the MIT Scene Parsing Benchmark (Zhou et al., 2017, http://sceneparsing.csail.mit.edu)."""

from pathlib import Path
from typing import Any

from lk_backbones.data.checks import pair_by_name, require_files, require_folders
from lk_backbones.data.classes import ClassTable, load_table
from lk_backbones.data.reading import find_files
from lk_backbones.data.segmentation import FileSegmentationDataset, SegmentationDataModule, Split

_FOLDERS = {"train": "training", "val": "validation"}
_LAYOUT = (
    "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png, as in ADEChallengeData2016.zip"
)


class ADE20KDataModule(SegmentationDataModule):
    """ADE20K as in ``ADEChallengeData2016.zip``: ``images/`` and ``annotations/``.

    Annotation value 0 ("other") is ignored (255); value ``k`` is class ``k - 1``. Of a class name with synonyms the
    first is kept. Training uses the 20210 training images; validation, test and prediction the 2000 validation images.

    Defaults are those of the published 512 models: pictures are fitted into 2048 × 512 before the random ratio, and for
    evaluation. The 640 models of RepLKNet differ in ``crop_size=640`` only; those of UniRepLKNet were also trained and
    tested with ``base_size=(2560, 640)`` and ``test_size=(2560, 640)``.

    Args:
        root: Folder with ``images/`` and ``annotations/``.
        batch_size: Training crops per device.
        crop_size: ``(height, width)`` of training crops, or one number for both.
        base_size: ``(long side, short side)`` that pictures are fitted into at ratio 1.
        test_size: ``(long side, short side)`` that pictures are fitted into for evaluation.
        **kwargs: See `SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str = "data/ADEChallengeData2016",
        batch_size: int = 8,
        crop_size: int | tuple[int, int] = 512,
        base_size: tuple[int, int] | None = (2048, 512),
        test_size: tuple[int, int] | None = (2048, 512),
        **kwargs: Any,
    ):
        super().__init__(batch_size=batch_size, crop_size=crop_size, base_size=base_size, test_size=test_size, **kwargs)
        self.root = Path(root)

    def load_classes(self) -> ClassTable:
        """Return the 150 classes."""
        return load_table("ade20k")

    def make_dataset(self, split: Split) -> FileSegmentationDataset:
        """See `SegmentationDataModule.make_dataset`."""
        folder = _FOLDERS[split]
        image_folder, mask_folder = self.root / "images" / folder, self.root / "annotations" / folder
        require_folders(self.root, [f"images/{folder}", f"annotations/{folder}"], _LAYOUT)
        images, masks = find_files(image_folder, [".jpg"]), find_files(mask_folder, [".png"])
        require_files(images, image_folder, [".jpg"])
        pairs = pair_by_name(
            images, masks, lambda path: path.stem, lambda path: path.stem, mask_folder, lambda key: key + ".png"
        )
        training = split == "train"
        transform = self.train_transform() if training else self.eval_transform()
        images, masks = [image for image, _ in pairs], [mask for _, mask in pairs]
        return FileSegmentationDataset(images, masks, self.classes, transform, training)
