"""The processes of a run: how many there are, and what all of them know. One, where torch has no process group."""

from typing import Any

import torch
from torch import distributed

__all__ = ["broadcast_from_first", "gathered", "mean_over_processes", "world"]


def world() -> tuple[int, int]:
    """Return the number of processes and the rank of this one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return 1, 0


def gathered(value: Any, group: Any = None) -> list[Any]:
    """Return every process's value, in the order of their ranks; all of them must call this.

    Args:
        value: Anything that can be pickled.
        group: The processes that are asked; ``None`` for all.
    """
    if world()[0] == 1:
        return [value]
    values = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group=group)
    return values


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Return the mean of all processes' values, without a gradient where there are several; all must call this."""
    processes = world()[0]
    if processes > 1:
        value = value.detach().clone()
        distributed.all_reduce(value)
        value /= processes
    return value


def broadcast_from_first(value: torch.Tensor) -> None:
    """Overwrite a tensor with that of the first process; all must call this."""
    if world()[0] > 1:
        # gloo knows no bool
        distributed.broadcast(value.view(torch.uint8) if value.dtype == torch.bool else value, 0)
