"""Private parts of torchmetrics."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchmetrics import Metric

from lk_backbones._private.borrow import borrow

__all__ = ["GathersItself"]

# What is overridden below must be what torchmetrics calls.
borrow("torchmetrics", "torchmetrics.metric", "Metric._sync_dist")
borrow("torchmetrics", "torchmetrics.metric", "Metric._apply")


class GathersItself(Metric):
    """A metric whose states stay on the CPU, and which gathers those of all processes by itself.

    torchmetrics would move states from device to device, and gather only tensors of one shape.
    """

    def gather(self, process_group: Any) -> None:
        """Replace this process's states by those of all processes.

        Args:
            process_group: The processes; ``None`` for all.
        """
        raise NotImplementedError

    def state_names(self) -> list[str]:
        """Return the names of all states, those of the parent included."""
        return list(self._defaults)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        return torch.nn.Module._apply(self, fn)

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        self.gather(process_group)
