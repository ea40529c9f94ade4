"""How much memory a look at a model takes, told before it is taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lk_backbones.analysis.erf import observed, placement
from lk_backbones.analysis.levels import Level, find_map, normalized_input
from lk_backbones.analysis.timing import peak_memory

__all__ = ["available_memory", "needed_memory", "require_memory", "require_memory_to_run"]

#: What is kept for the gradient is counted; what comes and goes beside it (workspaces, gradients) adds about this much.
_MARGIN = 1.3
#: With checkpointing also the block that is computed again (RepLKNet-31B at 1024 px: 3.2 GB, of which 1.6 are kept).
_MARGIN_CHECKPOINTING = 2.0
_PROBE = 128


def needed_memory(
    model: nn.Module, size: tuple[int, int], channels: int = 3, level: Level = -1, gradient_checkpointing: bool = False
) -> int:
    """Estimate the memory that `effective_receptive_field` takes beside the model, in bytes.

    A small image is run through the model, and what autograd keeps is counted and scaled to the size.

    Args:
        model: Any module.
        size: ``(height, width)`` of the images.
        channels: Of the images.
        level: As in `effective_receptive_field`.
        gradient_checkpointing: As in `effective_receptive_field`.
    """
    margin = _MARGIN_CHECKPOINTING if gradient_checkpointing else _MARGIN
    small = (min(size[0], _PROBE), min(size[1], _PROBE))
    try:
        kept = _kept(model, small, channels, level, gradient_checkpointing)
    except ValueError:
        if small == size:
            raise
        small = size  # some models take images of one size only
        kept = _kept(model, small, channels, level, gradient_checkpointing)
    return round(kept * (size[0] * size[1]) / (small[0] * small[1]) * margin)


def _kept(model: nn.Module, size: tuple[int, int], channels: int, level: Level, gradient_checkpointing: bool) -> int:
    """Count the bytes that autograd keeps of an image, beside the model."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device, dtype = placement(model)
    with observed(model, gradient_checkpointing):
        image = torch.zeros(1, channels, *size, device=device, dtype=dtype)
        x = normalized_input(model, image).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = find_map(model, x, level)[0]  # keeps alive what was counted, so that no address occurs twice
        del found
    return sum(kept.values())


def available_memory(device: torch.device) -> int | None:
    """Return how much memory a device has to spare, in bytes; ``None`` if that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:  # of a container
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(limit - used)
    except (OSError, ValueError):
        pass  # there is none, or it says "max"
    return min(found, default=None)


def require_memory(
    model: nn.Module, size: tuple[int, int], channels: int = 3, level: Level = -1, gradient_checkpointing: bool = False
) -> None:
    """Refuse images that the memory is too small for, with what would fit.

    Args:
        model: Any module.
        size: ``(height, width)`` of the images.
        channels: Of the images.
        level: As in `effective_receptive_field`.
        gradient_checkpointing: As in `effective_receptive_field`.

    Raises:
        ValueError: If more memory is needed than there is.
    """
    available = available_memory(placement(model)[0])
    needed = needed_memory(model, size, channels, level, gradient_checkpointing)
    if available is None or needed <= available:
        return
    largest = int(min(size) * (available / needed) ** 0.5) // 32 * 32
    advice = f"images of {largest} × {largest} would fit" if largest >= 32 else "not even images of 32 × 32 would fit"
    if not gradient_checkpointing and any(hasattr(module, "grad_checkpointing") for module in model.modules()):
        advice += ", and gradient checkpointing takes less memory"
    raise ValueError(
        f"images of {size[0]} × {size[1]} need about {needed / 2**30:.1f} GiB for {type(model).__name__}, and "
        f"{available / 2**30:.1f} GiB are free: {advice}"
    )


def require_memory_to_run(
    model: nn.Module, run: Callable[[tuple[int, int]], object], size: tuple[int, int], images: int, copies: float
) -> None:
    """Refuse a run of a model that the memory is too small for, with what would fit.

    A small image is run, and the most that PyTorch held at once is scaled to the size.

    Args:
        model: The model; on other devices than CPUs it is left to them to refuse.
        run: Runs one image of a size ``(height, width)``.
        size: ``(height, width)`` of the images.
        images: How many are run at once.
        copies: How many times the parameters are held, beyond the model itself.

    Raises:
        ValueError: If more memory is needed than there is.
    """
    device = placement(model)[0]
    available = available_memory(device)
    if available is None or device.type != "cpu":
        return
    weights = round(copies * sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))
    small = (min(size[0], _PROBE), min(size[1], _PROBE))
    try:
        held = peak_memory(lambda: run(small))
    except (RuntimeError, AssertionError, ValueError):
        small = size  # some models take images of one size only
        held = peak_memory(lambda: run(small))
    maps = round(held * images * (size[0] * size[1]) / (small[0] * small[1]) * _MARGIN)
    if weights + maps <= available:
        return
    needed = f"{(weights + maps) / 2**30:.1f} GiB for {type(model).__name__}, and {available / 2**30:.1f} GiB are free"
    if weights > available:
        raise ValueError(
            f"about {needed}: its weights alone take {weights / 2**30:.1f} GiB, so a smaller model would fit"
        )
    largest = int(min(size) * ((available - weights) / maps) ** 0.5) // 32 * 32
    advice = f"images of {largest} × {largest} would fit" if largest >= 32 else "not even images of 32 × 32 would fit"
    raise ValueError(f"{images} images of {size[0]} × {size[1]} need about {needed}: {advice}")
