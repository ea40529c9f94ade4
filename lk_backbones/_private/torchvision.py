"""Private parts of torchvision: what its detectors are made of."""

from typing import Any

from lk_backbones._private.borrow import borrow

__all__ = ["BoxCoder", "BoxLinearCoder", "Matcher", "skips_resize"]

_PARTS = "torchvision.models.detection._utils"

BoxCoder = borrow("torchvision", _PARTS, "BoxCoder")
BoxLinearCoder = borrow("torchvision", _PARTS, "BoxLinearCoder")
Matcher = borrow("torchvision", _PARTS, "Matcher")


def skips_resize(transform: Any = None) -> dict[str, bool]:
    """Return the argument of `GeneralizedRCNNTransform` that keeps pictures at their size, as they come in training.

    Args:
        transform: One to copy the setting of, or ``None`` for one that does.
    """
    return {"_skip_resize": True if transform is None else transform._skip_resize}
