"""Looking at a model: what it sees, and what it goes by."""

from lk_backbones.analysis.callback import ReceptiveField
from lk_backbones.analysis.erf import EffectiveReceptiveField, area_ratios, effective_receptive_field
from lk_backbones.analysis.shape_bias import ShapeBias, draw_shape_bias, find_stimuli, shape_bias

__all__ = [
    "EffectiveReceptiveField",
    "ReceptiveField",
    "ShapeBias",
    "area_ratios",
    "draw_shape_bias",
    "effective_receptive_field",
    "find_stimuli",
    "shape_bias",
]
