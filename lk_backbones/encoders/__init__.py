"""Encoder families, each a timm-native model in a file of its own; importing this package registers them all."""

from lk_backbones.encoders import _smp, mobilenetv2_lk, pelk, replknet, slak, unireplknet
from lk_backbones.encoders._registry import list_encoders

__all__ = ["list_encoders", "mobilenetv2_lk", "pelk", "replknet", "slak", "unireplknet"]

_smp.register_with_smp()  # once all families are registered
