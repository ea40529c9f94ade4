"""Masks as run lengths (COCO's RLE): a few hundred bytes each, whatever the size of the image."""

from typing import Any

import torch

__all__ = ["Rle", "decode_masks", "encode_masks", "require_coco_tools"]

Rle = dict[str, Any]
"""``{"size": [height, width], "counts": str}``, as in COCO results files."""


# Masks that are turned and encoded together, which takes two copies of them.
_AT_ONCE = 8


def require_coco_tools() -> Any:
    """Import pycocotools' mask functions.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ModuleNotFoundError(
            'detection measures and stores its results with pycocotools: pip install "lk-backbones[detection]"'
        ) from error
    return mask


def encode_masks(masks: torch.Tensor) -> list[Rle]:
    """Encode masks.

    Args:
        masks: bool or uint8 ``(N, H, W)``; what is not 0 is inside.

    Returns:
        Run lengths of every mask.
    """
    encode, encoded = require_coco_tools().encode, []
    for some in masks.split(_AT_ONCE):
        # run lengths go down the columns, and pycocotools wants (H, W, N) in Fortran order: (N, W, H) in C order,
        # reversed
        columns = (some != 0).to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy().transpose(2, 1, 0)
        encoded += encode(columns)
    return [{"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")} for rle in encoded]


def decode_masks(masks: list[Rle], size: tuple[int, int]) -> torch.Tensor:
    """Decode masks, as bool ``(N, *size)``; ``size`` is the height and width that all of them have."""
    if not masks:
        return torch.zeros((0, *size), dtype=torch.bool)
    decoded = require_coco_tools().decode(masks)
    return torch.from_numpy(decoded).permute(2, 0, 1).bool()
