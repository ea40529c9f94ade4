"""Private parts of timm, which its own models share."""

from lk_backbones._private.borrow import borrow

__all__ = ["feature_take_indices"]

feature_take_indices = borrow("timm", "timm.models._features", "feature_take_indices")
