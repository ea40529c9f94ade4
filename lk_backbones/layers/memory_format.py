"""The memory-format decision, as a module that an encoder starts with."""

from __future__ import annotations

import torch
import torch.fx
import torch.nn as nn

from lk_backbones.ops import to_preferred_memory_format

__all__ = ["PreferredMemoryFormat"]

# torch.fx records it as one call.
torch.fx.wrap("to_preferred_memory_format")


class PreferredMemoryFormat(nn.Module):
    """Lay the image out as the convolutions after it want it: `lk_backbones.ops.to_preferred_memory_format`.

    PyTorch's operators keep a map's memory format, so an encoder has one of these, in front of its first layer, and
    nothing after it copies back and forth. It has no parameters. Under TorchScript it changes nothing.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` ``(N, C, H, W)``, in channels_last on CPUs."""
        if torch.jit.is_scripting():
            return x
        else:  # the else keeps TorchScript's compiler from looking inside
            return self._lay_out(x)

    @torch.jit.unused
    def _lay_out(self, x: torch.Tensor) -> torch.Tensor:
        return to_preferred_memory_format(x)
