"""The base of every data module: data sets and loaders whose order a resumed run repeats, and options in common."""

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from lk_backbones._processes import world
from lk_backbones.data.classes import ClassTable
from lk_backbones.data.sampling import (
    SampleKey,
    TrainingLoader,
    TrainingSampler,
    default_pin_memory,
    derive_seed,
    evaluation_loader,
    init_worker,
)
from lk_backbones.drawing.palette import Color
from lk_backbones.weights.errors import WeightsError
from lk_backbones.weights.saved import (
    build_saved,
    checked_arguments,
    constructor_parameters,
    find_class,
    fits,
    own_classes,
    read_training_checkpoint,
    require_finite,
)

Split = Literal["train", "val", "test"]
DataT = TypeVar("DataT", bound="PictureDataModule")
CheckLevel = Literal["auto", "full", "headers", "off"]

#: Up to this many pictures per split ``check_files="auto"`` reads every file in full.
FULL_CHECK_LIMIT = 1000


class PictureDataset(Dataset[Any], ABC):
    """A map-style data set of pictures with labels.

    Args:
        transform: albumentations pipeline; for classification one of timm's.
        training: Whether samples are augmented, or whole pictures with their original labels.
    """

    def __init__(self, transform: Any, training: bool):
        self.transform = transform
        self.training = training

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def path(self, index: int) -> str:
        """Return the picture's file, or a name if there is none."""

    def check(self, level: CheckLevel) -> None:
        """Look at all files, as far as the level says; there is nothing to look at where pictures are made up.

        Raises:
            ValueError: If a file is unusable; the message names it.
        """

    def augment(self, key: int | SampleKey, **targets: Any) -> dict[str, Any]:
        """Run the pipeline; with a `SampleKey` the augmentation is the one of that seed."""
        seed = key.seed if isinstance(key, SampleKey) else derive_seed(key)
        # One stream for the whole pipeline. set_random_seed() would start every transform's own stream with the same
        # seed, and then a picture would be flipped if and only if it is brightened.
        self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return self.transform(**targets)


class PictureDataModule(LightningDataModule):
    """Base of everything here that a trainer takes as ``datamodule``: it can be rebuilt from a checkpoint."""

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, map_location: Any = None, weights_only: bool | None = None, **kwargs: Any
    ) -> Self:
        """Rebuild a data module from the arguments that a checkpoint holds.

        The class is this one, or where this is a base the one of lk_backbones that the checkpoint names; its arguments
        are plain values, among them the folders it reads. The checkpoint builds nothing else and runs nothing.

        Args:
            checkpoint_path: Path, URL or file object.
            map_location: Where to put the checkpoint's tensors, as for `torch.load`.
            weights_only: ``False`` unpickles the file, which runs whatever its writer put into it.
            **kwargs: Replace arguments.

        Returns:
            The data module.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or no checkpoint of such a data module.
        """
        checkpoint = read_training_checkpoint(checkpoint_path, map_location or "cpu", weights_only is not False)
        data_class, arguments, where = saved_data(checkpoint, checkpoint_path, cls)
        module = build_saved(data_class, arguments, where, **kwargs)
        state = checkpoint.get(data_class.__qualname__)
        if state is not None:
            try:
                module.load_state_dict(state)
            except WeightsError as error:
                raise WeightsError(f"'{checkpoint_path}': {error}") from error
        return module


def saved_data(
    checkpoint: Mapping[str, Any], source: object, cls: type[DataT] | None = None
) -> tuple[type[DataT], dict[str, Any], str]:
    """Find the data module that a checkpoint describes, and check its arguments.

    Args:
        checkpoint: Content of the checkpoint.
        source: Its name, for messages.
        cls: The class that is asked for; by default whichever of ours the checkpoint names.

    Returns:
        Class, constructor arguments, and what to call them in messages.

    Raises:
        WeightsError: If it describes none of our data modules, or holds what cannot be arguments of it.
    """
    from lk_backbones import data  # the classes in it derive from the one above

    values = checkpoint.get("datamodule_hyper_parameters")
    where = f"'{source}', datamodule_hyper_parameters"
    if not isinstance(values, Mapping):
        raise WeightsError(f"{where}: there are none, so it does not say what data it is for: name them, with --data")
    known: Any = own_classes(data, PictureDataModule)
    # a bare trainer does not note the class, but keeps the state of our data modules under its name
    class_path = values.get("_class_path", next((name for name in known if name in checkpoint), None))
    if class_path is None and cls is None:
        raise WeightsError(f"{where}: they do not name the class of their data module: do so, with --data or --config")
    found = find_class(cls or PictureDataModule, class_path, known, where, "--data")
    return found, checked_arguments(found, values, where), where


class ImageDataModule(PictureDataModule, ABC):
    """Base of the data modules: splits, their checks, and loaders.

    The order and the augmentation of training batches depend on the seed, the epoch and the position alone, so a run
    resumed from any checkpoint sees what an undisturbed one sees. Evaluation loaders give every picture exactly once,
    also under DDP.

    A subclass gives `load_classes`, `make_dataset` and `collate`, and says which splits it has. Data
    sets and `collate` go to the loading processes, pickled where these are not forked: they must not refer to the
    data module, which would take the trainer along.

    Args:
        batch_size: Training pictures per device.
        val_batch_size: Pictures per device in validation, test and prediction.
        num_workers: Loading processes per loader. None: as many as there are CPU cores for this process, at most 4.
            They are started as ``torch.multiprocessing.set_start_method`` says. Where that is not ``"fork"`` (by
            default on Windows, on macOS, and from Python 3.14) scripts need ``if __name__ == "__main__":``.
        seed: Of the order and the augmentation. None: the seed of ``seed_everything`` if it was called, else 0. A
            resumed run takes the seed of its checkpoint.
        check_files: What to look at in ``setup``: ``"auto"``, ``"full"``, ``"headers"`` or ``"off"``.
        pin_memory: Whether to load into pinned memory. None: if there is a CUDA device.
    """

    def __init__(
        self,
        batch_size: int = 8,
        val_batch_size: int = 1,
        num_workers: int | None = None,
        seed: int | None = None,
        check_files: CheckLevel = "auto",
        pin_memory: bool | None = None,
    ):
        super().__init__()
        keep_hyperparameters(self)
        for name, number, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("num_workers", num_workers or 0, 0),
            ("seed", seed or 0, 0),
        ):
            require_at_least(name, number, least)
        if check_files not in ("auto", "full", "headers", "off"):
            raise ValueError(f'check_files must be "auto", "full", "headers" or "off", got {check_files!r}.')
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = default_num_workers() if num_workers is None else num_workers
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.check_files: CheckLevel = check_files
        self.pin_memory = default_pin_memory() if pin_memory is None else pin_memory
        self._table: ClassTable | None = None
        self._datasets: dict[Split, Any] = {}
        self._state_of_checkpoint: dict[str, Any] = {}

    # --- What a subclass gives -------------------------------------------------------------------------------------

    @abstractmethod
    def load_classes(self) -> ClassTable:
        """Return the classes; called once, when they are first needed."""

    @abstractmethod
    def make_dataset(self, split: Split) -> PictureDataset:
        """Return the data set of a split: augmented for ``"train"``, whole pictures for ``"val"`` and ``"test"``.

        Raises:
            FileNotFoundError: If folders or files are missing; the message names them.
        """

    @staticmethod
    @abstractmethod
    def collate(samples: list[Any]) -> Any:
        """Make a batch of samples."""

    def make_sampler(self, dataset: Any) -> TrainingSampler:
        """Return what orders the training samples."""
        return TrainingSampler(dataset, self.seed)

    @property
    def test_split(self) -> Split:
        """The split that ``test`` uses: the validation split where test labels are not public."""
        return "val"

    @property
    def predict_split(self) -> Split:
        """The split that ``predict`` uses: the test split if there is one, with labels or without."""
        return self.test_split

    # --- Classes ----------------------------------------------------------------------------------------------------

    @property
    def classes(self) -> ClassTable:
        """The classes, and the meaning of the values in the label files."""
        if self._table is None:
            self._table = self.load_classes()
        return self._table

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their index."""
        return list(self.classes.names)

    @property
    def class_colors(self) -> list[Color]:
        """One RGB colour (0 to 255) per class."""
        return list(self.classes.colors)

    # --- Lightning's hooks ------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Find the files of the splits that a stage needs, and check them (once, on the first process).

        Raises:
            FileNotFoundError: If folders or files are missing.
            ValueError: If files are unusable. Both name the file or folder and say what would be right.
        """
        splits: list[Split] = ["train"] if stage in ("fit", None) else []
        if stage in ("fit", "validate", None):
            splits.append("val")
        if stage in ("test", None):
            splits.append(self.test_split)
        if stage in ("predict", None):
            splits.append(self.predict_split)
        for split in splits:
            if split not in self._datasets:
                dataset = self.make_dataset(split)
                if world()[1] == 0:
                    dataset.check(self.check_files)
                self._datasets[split] = dataset

    def dataset(self, split: Split) -> Any:
        """Return the data set of a split that `setup` has made.

        Raises:
            RuntimeError: `setup` was not called for it.
        """
        if split not in self._datasets:
            raise RuntimeError(f"The {split} split is not set up: call setup() first (a Trainer does).")
        return self._datasets[split]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of augmented samples; an incomplete last batch is left out.

        Raises:
            ValueError: If there are fewer training samples per process than ``batch_size``.
        """
        dataset = self.dataset("train")
        sampler = self.make_sampler(dataset)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"There are {len(sampler)} training pictures per process, fewer than batch_size={self.batch_size}: "
                f"not one batch can be made. Use batch_size={len(sampler)} or less."
            )
        return TrainingLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=self.collate,
            drop_last=True,  # batch norm and pyramid pooling fail on a last batch of one
            worker_init_fn=init_worker,
            persistent_workers=self.num_workers > 0,
            batches_done=self._batches_done if self._loads_for_training_loop() else None,
        )

    def _loads_for_training_loop(self) -> bool:
        """Return whether the loader that is being made is the training loop's, which may go on within an epoch."""
        trainer = self.trainer
        # Where the loop has its loader already, this one is for somebody else.
        return trainer is not None and bool(trainer.training) and trainer.train_dataloader is None

    def _batches_done(self) -> int:
        """Return how many batches of the epoch that begins were processed before a restart.

        To be asked when the epoch begins: where the task asks for the number of steps, Lightning makes the loader
        before it restores the checkpoint.
        """
        assert self.trainer is not None
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if batches:
            self._warn_if_changed()
        return batches

    def _warn_if_changed(self) -> None:
        now, then = self.state_dict(), self._state_of_checkpoint
        changed = [f"{key} {then[key]} -> {now[key]}" for key in now if then.get(key, now[key]) != now[key]]
        if changed:
            rank_zero_warn(
                f"The checkpoint was saved within an epoch, and the data has changed since ({', '.join(changed)}): "
                "the rest of this epoch will repeat or leave out some samples."
            )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the validation split."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test split, or of the validation split where test labels are not public."""
        return self._eval_loader(self.test_split)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the test split if there is one, else of the validation split."""
        return self._eval_loader(self.predict_split)

    def _eval_loader(self, split: Split) -> DataLoader[Any]:
        return evaluation_loader(
            self.dataset(split), self.val_batch_size, self.num_workers, self.pin_memory, self.collate
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the seed, and what an epoch was made up of."""
        samples = len(self._datasets["train"]) if "train" in self._datasets else 0
        return {"seed": self.seed, "training_images": samples, "batch_size": self.batch_size, "processes": world()[0]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the seed of a checkpoint, so that the run goes on as it began.

        Raises:
            WeightsError: If the checkpoint holds something else.
        """
        if not isinstance(state_dict, Mapping) or not fits(dict(state_dict), dict[str, int]):
            raise WeightsError(f"The checkpoint's state of {type(self).__name__} must be whole numbers by name.")
        if state_dict.get("seed", -1) < 0:
            raise WeightsError(f"The checkpoint's state of {type(self).__name__} must have a seed of at least 0.")
        self.seed = state_dict["seed"]
        self._state_of_checkpoint = state_dict


def require_at_least(name: str, number: int, least: int) -> None:
    """Check a numeric argument.

    Raises:
        ValueError: If it is smaller.
    """
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")


def require_size(name: str, size: Sequence[int] | None) -> None:
    """Check an argument of two lengths in pixels, or None.

    Raises:
        ValueError: If it is not two positive numbers.
    """
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"{name} must be two lengths in pixels, each at least 1, got {tuple(size)}.")


def keep_hyperparameters(module: LightningDataModule) -> None:
    """Keep the constructor's arguments in checkpoints, so that a checkpoint knows what data it was trained on.

    Paths are kept as text: checkpoints are read without unpickling any other type. Loggers already get the task's.

    Raises:
        ValueError: If an argument is infinite or NaN.
    """
    module.save_hyperparameters(logger=False)
    own = constructor_parameters(type(module), resolve=False)
    # Lightning also takes what a constructor passes on to its parents and does not let others choose
    for name in [name for name in module.hparams if name not in own and not name.startswith("_")]:
        del module.hparams[name]
    module.hparams.update({k: os.fspath(v) for k, v in module.hparams.items() if isinstance(v, os.PathLike)})
    require_finite(module.hparams)


def default_num_workers() -> int:
    """Return the number of CPU cores for this process, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)
