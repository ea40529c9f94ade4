"""Encoder families, each a timm-native model in a file of its own; importing this package registers them all."""

from lk_backbones.encoders import replknet, smp
from lk_backbones.encoders.registry import list_encoders

__all__ = ["list_encoders", "replknet", "smp"]
