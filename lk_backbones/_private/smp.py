"""Private parts of segmentation-models-pytorch."""

from lk_backbones._private.borrow import borrow

__all__ = ["EncoderMixin"]

EncoderMixin = borrow("segmentation-models-pytorch", "segmentation_models_pytorch.encoders._base", "EncoderMixin")
