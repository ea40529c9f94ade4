"""Large-kernel ConvNets for timm, segmentation-models-pytorch and Lightning."""

__version__ = "0.1.0"
