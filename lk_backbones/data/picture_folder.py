"""Any folder of pictures, to run a trained model on."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from typing_extensions import Self

from lk_backbones._processes import world
from lk_backbones.data.checks import require_files, require_folders
from lk_backbones.data.classes import ClassTable
from lk_backbones.data.datamodule import (
    PictureDataModule,
    default_num_workers,
    keep_hyperparameters,
    require_at_least,
    require_size,
)
from lk_backbones.data.reading import IMAGE_EXTENSIONS, find_files
from lk_backbones.data.sampling import SampleKey, default_pin_memory, evaluation_loader
from lk_backbones.data.segmentation import FileSegmentationDataset, collate
from lk_backbones.data.transforms import eval_transform
from lk_backbones.weights.errors import WeightsError, shorten
from lk_backbones.weights.saved import LARGEST_SIDE, read_training_checkpoint


class _Pictures(FileSegmentationDataset):
    """Pictures of a folder, numbered from 1; in the place of one that cannot be read there is the reason."""

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        index = key.sample if isinstance(key, SampleKey) else key
        try:
            return {**super().__getitem__(index), "image_id": index + 1}
        except (ValueError, OSError) as error:
            return {"error": str(error)}


def _collate_readable(samples: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
    """Make a batch of those that could be read, and tell the reasons of the others."""
    readable = [sample for sample in samples if "error" not in sample]
    errors = [sample["error"] for sample in samples if "error" in sample]
    return (collate(readable) if readable else None), errors


class _SkippingLoader(DataLoader[Any]):
    """Warn of pictures that cannot be read, and give all others."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        given, skipped = 0, []
        for batch, errors in super().__iter__():
            for error in errors:
                warnings.warn(f"{error} It is skipped.", stacklevel=2)
            skipped += errors
            if batch is not None:
                given += 1
                yield batch
        if skipped and not given and world()[0] == 1:
            raise ValueError(f"None of the {len(skipped)} pictures can be read. The first: {skipped[0]}")
        if skipped:
            warnings.warn(f"{len(skipped)} pictures could not be read and were skipped.", stacklevel=2)


class PictureFolderDataModule(PictureDataModule):
    """Pictures without labels: all below a folder, in natural order (``frame2`` before ``frame10``).

    Pictures are turned as their EXIF orientation says; greyscale, palette, transparent, CMYK and 16-bit pictures become
    RGB. Batches have ``image``, ``path``, ``original_size`` and ``image_id``, which numbers the pictures from 1; see
    `lk_backbones.data.segmentation`. Of a picture that cannot be read there is a warning; it is skipped.

    Args:
        folder: The folder, with sub-folders, or one picture.
        batch_size: Pictures per device. More than 1 needs pictures of one size.
        num_workers: Loading processes. None: as many as there are CPU cores for this process, at most 4.
        test_size: ``(long side, short side)`` that pictures are fitted into. A model gives its published quality at the
            size that it was evaluated with; `load_from_checkpoint` takes it over. None: as they are.
        pin_memory: Whether to load into pinned memory. None: if there is a CUDA device.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 1,
        num_workers: int | None = None,
        test_size: tuple[int, int] | None = None,
        pin_memory: bool | None = None,
    ):
        super().__init__()
        keep_hyperparameters(self)
        require_at_least("batch_size", batch_size, 1)
        require_at_least("num_workers", num_workers or 0, 0)
        require_size("test_size", test_size)
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.num_workers = default_num_workers() if num_workers is None else num_workers
        self.test_size = test_size
        self.pin_memory = default_pin_memory() if pin_memory is None else pin_memory
        self._dataset: _Pictures | None = None
        self._test_scales: tuple[float, ...] = ()

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        weights_only: bool | None = None,
        *,
        folder: str,
        **kwargs: Any,
    ) -> Self:
        """Give a folder's pictures as the evaluation of a checkpoint's data module gives its own.

        Args:
            checkpoint_path: Path, URL or file object.
            map_location: Where to put the checkpoint's tensors, as for `torch.load`.
            weights_only: ``False`` unpickles the file, which runs whatever its writer put into it.
            folder: The folder of pictures, or one picture.
            **kwargs: Further arguments; they win over the checkpoint.

        Returns:
            The data module.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or what it says of its evaluation is no size.
        """
        checkpoint = read_training_checkpoint(checkpoint_path, map_location or "cpu", weights_only is not False)
        return cls(folder, **(evaluation_arguments(checkpoint, checkpoint_path) | kwargs))

    def setup(self, stage: str | None = None) -> None:
        """Find the pictures.

        Raises:
            FileNotFoundError: If there is no such folder, or no picture in it.
        """
        if self.folder.is_file():
            files = [self.folder]
        else:
            require_folders(self.folder, [], "pictures")
            files = find_files(self.folder, IMAGE_EXTENSIONS)
            require_files(files, self.folder)
        no_classes = ClassTable((), (), {0: 0})
        self._dataset = _Pictures(files, None, no_classes, eval_transform(self.test_size), training=False)
        self.set_test_scales(self._test_scales)

    def set_test_scales(self, scales: Sequence[float]) -> None:
        """See `set_test_scales`."""
        self._test_scales = tuple(scales)
        if self._dataset is not None:
            self._dataset.scaled_transforms = [eval_transform(self.test_size, scale) for scale in scales]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of all pictures."""
        if self._dataset is None:
            raise RuntimeError("The pictures are not set up: call setup() first (a Trainer does).")
        return evaluation_loader(
            self._dataset, self.batch_size, self.num_workers, self.pin_memory, _collate_readable, _SkippingLoader
        )


def evaluation_arguments(checkpoint: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Return the arguments of `PictureFolderDataModule` that repeat the evaluation of a checkpoint's data.

    Args:
        checkpoint: Content of the checkpoint.
        source: Its name, for messages.

    Raises:
        WeightsError: If what it says of its evaluation is no size.
    """
    data = checkpoint.get("datamodule_hyper_parameters")
    size = data.get("test_size") if isinstance(data, Mapping) else None
    if size is None:
        return {}
    sides = size if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        raise WeightsError(
            f"'{source}', datamodule_hyper_parameters: test_size must be two lengths in pixels, from 1 to "
            f"{LARGEST_SIDE}, got {shorten(size)}"
        )
    return {"test_size": (sides[0], sides[1])}
