"""Looking at a model: what it sees, and what it goes by."""

from lk_backbones.analysis.activation_maps import ActivationMap, activation_maps, draw_activation_map
from lk_backbones.analysis.callback import ReceptiveField
from lk_backbones.analysis.erf import EffectiveReceptiveField, area_ratios, effective_receptive_field
from lk_backbones.analysis.features import draw_feature_pyramid, feature_pyramid
from lk_backbones.analysis.shape_bias import ShapeBias, draw_shape_bias, find_stimuli, shape_bias

__all__ = [
    "ActivationMap",
    "EffectiveReceptiveField",
    "ReceptiveField",
    "ShapeBias",
    "activation_maps",
    "area_ratios",
    "draw_activation_map",
    "draw_feature_pyramid",
    "draw_shape_bias",
    "effective_receptive_field",
    "feature_pyramid",
    "find_stimuli",
    "shape_bias",
]
