"""ImageNet, as the archives of the challenge unpack."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from timm.data import ImageNetInfo

from lk_backbones._imagenet import imagenet_names
from lk_backbones.data.checks import require_files, require_folders
from lk_backbones.data.classes import ClassTable
from lk_backbones.data.classification import ClassificationDataModule, FileClassificationDataset, table_of
from lk_backbones.data.datamodule import CheckLevel, Split
from lk_backbones.data.image_folder import class_folders, pictures_below
from lk_backbones.weights.errors import nearest, shorten

__all__ = ["ImageNetDataModule"]

_LAYOUT = "train/n01440764/NAME.JPEG and so on, and val/n01440764/NAME.JPEG or, with a file of labels, val/NAME.JPEG"

#: Files in which the labels of a flat validation folder are looked for, below the root, the first that is there.
LABEL_FILES = (
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "val.txt",
    "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)


class ImageNetDataModule(ClassificationDataModule):
    """ImageNet: 1000 classes, 1.28 M pictures to train on and 50 000 to evaluate.

    ::

        root/
          train/n01440764/n01440764_10026.JPEG
          val/n01440764/ILSVRC2012_val_00000293.JPEG
          or val/ILSVRC2012_val_00000293.JPEG with a file of labels

    Classes are WordNet's synsets in sorted order, as in every published model, whichever of them have a folder; their
    names are timm's. Of an unsorted validation folder the labels are read from ``val_labels`` or, in ``root``, from
    ``LOC_val_solution.csv``, ``imagenet_2012_validation_synset_labels.txt``, ``val.txt`` or the development kit
    (``ILSVRC2012_devkit_t12``, unpacked).

    There are no public test labels: `test` uses the validation pictures. Pictures are left as they are stored, whatever
    their EXIF orientation, as the published numbers were measured. The file format is documented with the challenge,
    https://image-net.org/challenges/LSVRC/2012.

    Args:
        root: The folder.
        batch_size: Training pictures per device.
        val_labels: The file of labels of an unsorted validation folder; relative paths are below ``root``.
        subset: Which classes, as timm calls them: ``"imagenet-1k"``, ``"imagenet-12k"``, ``"imagenet-22k"`` and so on.
        check_files: As in `ClassificationDataModule`, but by default nothing is looked at before it is needed.
        **kwargs: See `ClassificationDataModule`.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 64,
        val_labels: str | None = None,
        subset: str = "imagenet-1k",
        check_files: CheckLevel = "off",
        **kwargs: Any,
    ):
        super().__init__(batch_size=batch_size, check_files=check_files, **kwargs)
        self.root = Path(root)
        self.val_labels = val_labels
        try:
            synsets = ImageNetInfo(subset).label_names()
        except AssertionError:
            known = ["imagenet-1k", "imagenet-12k", "imagenet-22k", "imagenet-21k-goog", "imagenet-21k-miil"]
            raise ValueError(
                f"subset={shorten(subset)} is none that timm knows{nearest(subset[:80], known)}; usual are "
                f"{', '.join(known)}."
            ) from None
        self._index = {synset: place for place, synset in enumerate(synsets)}

    def load_classes(self) -> ClassTable:
        """Return timm's names; of those that stand for two synsets (crane, the bird and the machine) with the id."""
        return table_of(imagenet_names(self.hparams["subset"]))

    def make_dataset(self, split: Split) -> FileClassificationDataset:
        """See `ClassificationDataModule.make_dataset`.

        Raises:
            FileNotFoundError: If a folder or the file of labels is missing.
            ValueError: If a folder is no class's, or the file of labels makes no sense.
        """
        require_folders(self.root, [split], _LAYOUT)
        folder = self.root / split
        names = class_folders(folder)
        if split == "val" and not names:
            return self.file_dataset(split, folder, self._flat(folder), turn=False)
        if foreign := [name for name in names if name not in self._index]:
            raise ValueError(
                f"{folder} has {len(foreign)} folders that are no classes of {self.hparams['subset']}, such as "
                f"{foreign[0]!r}: the folders are called like n01440764. Pictures of your own are an "
                "ImageFolderDataModule's."
            )
        if not names:
            raise FileNotFoundError(f"{folder} has no folder of a class. Expected: {_LAYOUT}.")
        pictures = {name: pictures_below(folder, name) for name in names}
        if empty := [name for name, files in pictures.items() if not files]:
            raise ValueError(f"{len(empty)} class folders in {folder} hold no pictures, such as {empty[0]!r}.")
        if lacking := [synset for synset in self._index if synset not in pictures]:
            rank_zero_warn(
                f"{folder} lacks {len(lacking)} of the {len(self._index)} classes, such as {lacking[0]!r}: there are "
                "no pictures of them"
            )
        samples = [(file, self._index[name]) for name, files in pictures.items() for file in files]
        return self.file_dataset(split, folder, samples, turn=False)

    def _flat(self, folder: Path) -> list[tuple[str, int]]:
        files = pictures_below(folder, "")
        require_files([folder / file for file in files], folder)
        if self.val_labels is not None:
            path = self.root / self.val_labels
            if not path.is_file():
                raise FileNotFoundError(f"There is no file of labels {path} (val_labels).")
        else:
            found = next((name for name in LABEL_FILES if (self.root / name).is_file()), None)
            if found is None:
                raise FileNotFoundError(
                    f"{folder} has no folders of classes, such as n01440764, and {self.root} no file of labels: "
                    f"{', '.join(LABEL_FILES)}. Add one, name it with val_labels, or sort the pictures into folders."
                )
            path = self.root / found
        labels = read_labels(path, files, self._index)
        return [(file, labels[file]) for file in files]


def read_labels(path: Path, files: Sequence[str], index: Mapping[str, int]) -> dict[str, int]:
    """Read the classes of the pictures of a flat folder.

    Args:
        path: Lines ``NAME LABEL`` or ``NAME,LABEL …``, where the label is a synset or a class index from 0; or lines
            ``LABEL`` in the order of the pictures' names, where it is a synset or, in the development kit, an id that
            ``meta.mat`` beside it explains.
        files: The pictures.
        index: Class index of every synset.

    Returns:
        Class index of every picture.

    Raises:
        FileNotFoundError: If there is no ``meta.mat``.
        ValueError: If a line makes no sense, or a picture has no label; the message says where.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from error
    rows = [line.split() if "," not in line else next(csv.reader([line])) for line in text.splitlines() if line.strip()]
    if rows and rows[0][0] == "ImageId":
        rows = rows[1:]
    if rows and len(rows[0]) == 1:
        if len(rows) != len(files):
            raise ValueError(
                f"{path} has {len(rows)} labels, but there are {len(files)} pictures. One label per line belongs to "
                "each picture, in the order of their names."
            )
        kit = rows[0][0].isdigit()
        numbers = _numbers_of_kit(path.with_name("meta.mat"), index) if kit else index
        return {
            file: _label(path, line, row[0], numbers, by_index=False)
            for line, (file, row) in enumerate(zip(files, rows, strict=True), start=1)
        }
    labels: dict[str, int] = {}
    for line, row in enumerate(rows, start=1):
        if len(row) < 2 or not row[1].split():
            raise ValueError(f"{path}, label {line}: expected a picture and its label, got {shorten(' '.join(row))}.")
        labels[Path(row[0]).stem] = _label(path, line, row[1].split()[0], index, by_index=True)
    if missing := [file for file in files if Path(file).stem not in labels]:
        raise ValueError(f"{path} has no label for {len(missing)} of {len(files)} pictures, such as {missing[0]}.")
    return {file: labels[Path(file).stem] for file in files}


def _label(path: Path, line: int, text: str, known: Mapping[str, int], by_index: bool) -> int:
    if text in known:
        return known[text]
    if by_index and text.isdigit() and int(text) < len(known):
        return int(text)
    raise ValueError(
        f"{path}, label {line}: {shorten(text)} is no class. Expected: a synset such as n01440764"
        + (f", or an index from 0 to {len(known) - 1}." if by_index else ", or an id of the development kit.")
    )


def _numbers_of_kit(path: Path, index: Mapping[str, int]) -> dict[str, int]:
    """Return the class index of every id in the development kit, which numbers classes in an order of its own."""
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}: the labels beside it are numbers of the development kit, which that file explains. "
            "Unpack the whole of ILSVRC2012_devkit_t12.tar.gz."
        )
    from scipy.io import loadmat  # which albumentations needs too; slow to import

    try:
        rows = loadmat(path, squeeze_me=True, struct_as_record=False)["synsets"]
        return {str(int(row.ILSVRC2012_ID)): index[str(row.WNID)] for row in rows if str(row.WNID) in index}
    except Exception as error:  # whatever a file of another kind makes scipy raise
        raise ValueError(
            f"{path} is not the table of the development kit ({type(error).__name__}: {error})."
        ) from error
