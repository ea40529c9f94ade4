"""Large-kernel ConvNets for timm, segmentation-models-pytorch and Lightning.

Importing this package registers its encoders with timm and with segmentation-models-pytorch, and UPerNet as published
with the latter::

    import lk_backbones
    import segmentation_models_pytorch as smp

    model = smp.UPerNet("replknet_31b", encoder_weights=None, classes=19)
"""

from lk_backbones import heads as _heads  # noqa: F401, registers its architectures
from lk_backbones.encoders import list_encoders
from lk_backbones.layers.enlarge import enlarge_kernels, plan_enlargement
from lk_backbones.layers.reparam import prepack_weights, reparameterize

__all__ = ["enlarge_kernels", "list_encoders", "plan_enlargement", "prepack_weights", "reparameterize"]

__version__ = "0.1.0"
