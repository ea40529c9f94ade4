"""The order of the training samples, and loaders that Lightning resumes exactly.

What a training run sees is a pure function of (seed, epoch, position in the epoch): the order of the samples, and the
seed of each sample's augmentation. A run that was killed and continues from a checkpoint, be it from the middle of an
epoch, therefore sees what an undisturbed run would have seen; the number of workers does not matter.
"""

import signal
from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lk_backbones._processes import world


class SampleKey(NamedTuple):
    """What a training sampler asks of a data set: which sample, and the seed of its augmentation."""

    sample: int
    seed: int


def derive_seed(*numbers: int) -> int:
    """Return a 64-bit seed that depends on all of the numbers (0 or more), well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class TrainingSampler(DistributedSampler[Any]):
    """Shuffle the training samples and give each an augmentation seed, with or without a process group.

    It is a ``DistributedSampler``, so Lightning leaves it in place and tells it the epoch.

    Args:
        dataset: The data set; it must have a length.
        seed: Together with the epoch it determines everything.

    Attributes:
        start: Number of this process's samples to leave out at the head of the epoch, because they were seen before
            a restart. The length stays that of the whole epoch, as Lightning counts that way.
        is_announced: Whether `set_epoch` was called since the last epoch began.
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0):
        replicas, rank = world()
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=True, seed=seed)
        self.start = 0
        self.is_announced = False

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; a Trainer does so before each."""
        super().set_epoch(epoch)
        self.is_announced = True

    def __iter__(self) -> Iterator[SampleKey]:
        return islice(self.order(), self.start, None)

    def order(self) -> Iterator[SampleKey]:
        """Give all samples of this process in the order of the epoch."""
        epoch = self.epoch
        for number, index in enumerate(super().__iter__()):
            # Counted over all processes, so two of them with batch size 4 see what one with batch size 8 sees.
            position = number * self.num_replicas + self.rank
            yield SampleKey(index, derive_seed(self.seed, epoch, position))


class GroupedTrainingSampler(TrainingSampler):
    """A training sampler whose batches hold samples of one group, such as upright pictures: less padding.

    A sample waits until its group has a batch full. What is left over at the end of the epoch makes mixed batches, so
    that every process has the same number of batches whatever its samples are.

    Args:
        dataset: The data set; it must have a length.
        groups: Group of every sample.
        batch_size: Samples per batch; the loader must cut batches of that size.
        seed: Together with the epoch it determines everything.
    """

    def __init__(self, dataset: Dataset[Any], groups: Sequence[int], batch_size: int, seed: int = 0):
        super().__init__(dataset, seed)
        self.groups = groups
        self.batch_size = batch_size

    def order(self) -> Iterator[SampleKey]:
        """Give the samples of this process batch by batch."""
        waiting: dict[int, list[SampleKey]] = {}
        for key in super().order():
            batch = waiting.setdefault(self.groups[key.sample], [])
            batch.append(key)
            if len(batch) == self.batch_size:
                yield from batch
                batch.clear()
        for batch in waiting.values():
            yield from batch


class TrainingLoader(DataLoader[Any]):
    """A data loader whose epoch begins where a resumed run left off.

    Lightning makes the iterator before it has told the sampler the epoch, and before it has worked out how many batches
    of the epoch are done (it is resuming then). Hence the iterator is lazy: it starts with the first batch that is
    asked for, when both are known.

    Args:
        *args: As for ``torch.utils.data.DataLoader``.
        batches_done: Tells, when the first batch is asked for, how many batches of the running epoch were processed
            before a restart. None: none.
        **kwargs: As for ``torch.utils.data.DataLoader``.
    """

    def __init__(self, *args: Any, batches_done: Callable[[], int] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batches_done = batches_done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if isinstance(self.sampler, TrainingSampler):
            # Lightning has just told the epoch, so it is the training loop that asks, and not, say, a callback.
            is_loop, self.sampler.is_announced = self.sampler.is_announced, False
            batches = self.batches_done() if is_loop and self.batches_done is not None else 0
            self.sampler.start = batches * (self.batch_size or 1)
        yield from super().__iter__()

    # Lightning warns of resuming within an epoch unless a loader has these two.
    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the position follows from the progress that Lightning keeps itself."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing; see `state_dict`."""


def evaluation_loader(
    dataset: Dataset[Any],
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    collate_fn: Callable[[list[Any]], Any],
    loader: type[DataLoader[Any]] = DataLoader,
) -> DataLoader[Any]:
    """Build a loader that gives every sample once, in order, over all processes together.

    The samplers that Lightning adds under DDP repeat samples until all processes have equally many, which falsifies
    metrics; with this one two processes get exactly the metrics of one.

    Raises:
        ValueError: If there are fewer samples than processes.
    """
    replicas, rank = world()
    sampler = None
    if replicas > 1:
        assert isinstance(dataset, Sized)
        if len(dataset) < replicas:
            raise ValueError(
                f"{replicas} processes cannot share {len(dataset)} pictures: each needs one. Use fewer devices."
            )
        sampler = UnrepeatedDistributedSampler(dataset, num_replicas=replicas, rank=rank, shuffle=False)
    return loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        shuffle=False,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=collate_fn,
        worker_init_fn=init_worker,
        persistent_workers=num_workers > 0,
    )


def init_worker(worker_id: int) -> None:
    """Prepare a loading process.

    OpenCV stays on one thread, as the workers are the parallelism. The first SIGTERM is ignored: cluster managers and
    ``timeout`` send it to all processes of a run at once, and the main process, which may want to save, ends its
    workers itself.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def default_pin_memory() -> bool:
    """Pinned memory speeds up copies to CUDA devices, and only to these."""
    return torch.cuda.is_available()
