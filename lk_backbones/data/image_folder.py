"""Pictures in one folder per class."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lk_backbones.data.checks import require_folders
from lk_backbones.data.classes import ClassTable
from lk_backbones.data.classification import ClassificationDataModule, FileClassificationDataset, table_of
from lk_backbones.data.datamodule import Split, require_at_least
from lk_backbones.data.reading import IMAGE_EXTENSIONS, natural_key

__all__ = ["ImageFolderDataModule"]

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_LAYOUT = "train/CLASS/NAME.jpg and val/CLASS/NAME.jpg, or CLASS/NAME.jpg to have the validation split drawn"


def class_folders(folder: Path) -> list[str]:
    """Return the sub-folders of a folder in natural order, as timm numbers classes; hidden ones are left out."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=natural_key)


def pictures_below(root: Path, folder: str) -> list[str]:
    """Return the pictures below a sub-folder, relative to ``root``, sorted; hidden ones are left out."""
    found = []
    for parent, folders, names in os.walk(os.path.join(root, folder), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(parent, root)
        found += [
            os.path.normpath(os.path.join(inside, name))
            for name in names
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


class ImageFolderDataModule(ClassificationDataModule):
    """Pictures in one folder per class, whose name is the class's.

    Two layouts are understood::

        root/                                root/
          train/cat/1.jpg                      cat/1.jpg
          train/dog/2.jpg                      cat/3.jpg
          val/cat/3.jpg                        dog/2.jpg
          val/dog/4.jpg                        dog/4.jpg

    In the second, ``val_fraction`` of the pictures of every class validate. Which ones depends on their names and
    ``split_seed`` only, so the split is the same in every run, and pictures that are added later hardly change it. In
    the first there may be a ``test`` folder too, which `test` then uses instead of ``val``. Pictures may lie in further
    sub-folders. Classes are numbered in the natural order of their names (``class2`` before ``class10``), as timm does.

    Args:
        root: The folder.
        batch_size: Training pictures per device.
        val_fraction: Share of every class that validates, where the folders do not say so.
        split_seed: Another number draws another split.
        **kwargs: See `ClassificationDataModule`.
    """

    def __init__(self, root: str, batch_size: int = 64, val_fraction: float = 0.2, split_seed: int = 0, **kwargs: Any):
        super().__init__(batch_size=batch_size, **kwargs)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}.")
        require_at_least("split_seed", split_seed, 0)
        self.root = Path(root)
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    @property
    def _split_folders(self) -> list[Split]:
        return [split for split in _SPLITS if (self.root / split).is_dir()]

    def load_classes(self) -> ClassTable:
        """Read the names of the class folders, and compare those of the splits.

        Raises:
            FileNotFoundError: If there is no class folder.
            ValueError: If a class has a folder in one split only.
        """
        require_folders(self.root, [], _LAYOUT)
        splits = self._split_folders
        if not splits:
            return self._table_of_folder(self.root)
        found = {split: class_folders(self.root / split) for split in splits}
        # A test may leave classes out, unless there is nothing else that tells them.
        names: Sequence[str] = next((found[split] for split in splits if found[split]), [])
        for split in splits:
            foreign = [name for name in found[split] if name not in set(names)]
            missing = [name for name in names if name not in set(found[split])] if split != "test" else []
            if foreign or missing:
                raise ValueError(
                    f"Every class needs a folder in each of {self.root / splits[0]} and {self.root / split}: "
                    + "; ".join(
                        f"{where} has no {_some(lacking)}"
                        for where, lacking in ((splits[0], foreign), (split, missing))
                        if lacking
                    )
                    + ". Add the folders, or remove the others."
                )
        return self._table_of_folder(self.root / splits[0])

    def _table_of_folder(self, folder: Path) -> ClassTable:
        names = class_folders(folder)
        if len(names) < 2:
            require_folders(self.root, ["train", "val"] if not names else [], _LAYOUT)
            raise ValueError(
                f"{folder} has {len(names)} class folders ({_some(names)}), but a classifier needs at least 2. "
                f"Expected: {_LAYOUT}."
            )
        return table_of(names)

    @property
    def test_split(self) -> Split:
        """The test split if there is one, else the validation split."""
        return "test" if (self.root / "test").is_dir() else "val"

    def make_dataset(self, split: Split) -> FileClassificationDataset:
        """See `ClassificationDataModule.make_dataset`.

        Raises:
            FileNotFoundError: If a folder is missing.
            ValueError: If a class has no pictures.
        """
        if self._split_folders:
            require_folders(self.root, [split], _LAYOUT)
            folder = self.root / split
        else:
            folder = self.root
        names = self.classes.names
        present = set(class_folders(folder))
        pictures = {name: pictures_below(folder, name) for name in names if name in present}
        least = 1 if self._split_folders else 2
        if lacking := [name for name, files in pictures.items() if len(files) < least]:
            raise ValueError(
                f"{len(lacking)} class folders in {folder} hold "
                f"{'no pictures' if least == 1 else 'fewer than 2 pictures, one to train and one to validate'}: "
                f"{_some(lacking)}. Add some ({', '.join(IMAGE_EXTENSIONS)}), or remove the folders."
            )
        if not self._split_folders:
            pictures = {name: self._drawn(split, files) for name, files in pictures.items()}
        index = {name: place for place, name in enumerate(names)}
        samples = [(file, index[name]) for name, files in pictures.items() for file in files]
        return self.file_dataset(split, folder, samples)

    def _drawn(self, split: Split, files: list[str]) -> list[str]:
        def digest(file: str) -> bytes:
            return hashlib.sha256(f"{self.split_seed}/".encode() + os.fsencode(Path(file).as_posix())).digest()

        count = min(len(files) - 1, max(1, round(self.val_fraction * len(files))))
        validating = set(sorted(files, key=digest)[:count])
        return [file for file in files if (file in validating) == (split == "val")]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
