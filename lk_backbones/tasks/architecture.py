"""From the plain arguments of `SegmentationTask` to its networks, refusing what cannot be."""

import inspect
from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp

from lk_backbones.heads import FCNHead
from lk_backbones.tasks.arguments import check_shared_arguments
from lk_backbones.tasks.encoder import EncoderSpec, load_encoder_weights, nearest
from lk_backbones.weights.errors import shorten

__all__ = ["AUXILIARY_LEVEL", "build_auxiliary_head", "build_model", "check_arguments"]

# Index of the third stage's map (stride 16) among the encoder's maps; 0 is the image itself.
AUXILIARY_LEVEL = 4
# Set by arguments of the task, or meaningless in it.
_RESERVED = ("encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params")


# A picture is copied at every scale: a checkpoint could ask for any amount of memory. The papers go up to 1.75.
_LARGEST_SCALE, _MOST_SCALES = 8, 32


def check_arguments(hparams: Any) -> None:
    """Refuse arguments that contradict each other, before anything is built.

    Args:
        hparams: The arguments of `SegmentationTask` by name.

    Raises:
        ValueError: With the argument's name and what would be right.
    """
    check_shared_arguments(hparams, 2, "background counts as a class")
    if hparams["auxiliary_weight"] < 0:
        raise ValueError(f"auxiliary_weight={hparams['auxiliary_weight']} must be at least 0")
    if hparams["inference"] not in ("whole", "slide"):
        raise ValueError(f"inference='{hparams['inference']}' must be one of whole, slide")
    crop, stride = hparams["slide_crop"], hparams["slide_stride"]
    if not all(0 < s <= c for s, c in zip(stride, crop, strict=True)):
        raise ValueError(f"slide_stride={tuple(stride)} must be positive and at most slide_crop={tuple(crop)}")
    scales = hparams["tta_scales"] or []
    if not all(0 < scale <= _LARGEST_SCALE for scale in scales) or len(scales) > _MOST_SCALES:
        raise ValueError(
            f"tta_scales={shorten(scales)} must be positive, at most {_LARGEST_SCALE} each and at most {_MOST_SCALES}"
        )


def build_model(
    architecture: str, spec: EncoderSpec, in_channels: int, num_classes: int, kwargs: dict[str, Any]
) -> Any:
    """Build an smp model.

    Args:
        architecture: A name in ``smp.MODEL_ARCHITECTURES_MAPPING``, ours included.
        spec: The encoder.
        in_channels: Channels of the images.
        num_classes: Number of classes.
        kwargs: Further arguments of the architecture.

    Returns:
        The model; its forward maps normalised images to logits.

    Raises:
        ValueError: If the architecture or one of its arguments is unknown, or the encoder refuses its own.
        WeightsError: If the encoder's weights cannot be had or do not fit.
    """
    known = smp.MODEL_ARCHITECTURES_MAPPING
    model_class = known.get(architecture.lower())
    if model_class is None:
        raise ValueError(
            f"unknown architecture '{architecture}'{nearest(architecture, known)}; there are {', '.join(sorted(known))}"
        )
    accepted = [
        name
        for name, parameter in inspect.signature(model_class).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name not in _RESERVED
    ]
    for name in kwargs:
        if name not in accepted:  # smp would pass it on to the encoder, or drop it
            raise ValueError(f"'{architecture}' has no argument '{name}', only {accepted}{nearest(name, accepted)}")
    stride = kwargs.get("encoder_output_stride", 32)
    if stride not in (8, 16, 32):
        raise ValueError(f"encoder_output_stride={stride} must be 8, 16 or 32")
    try:
        model = model_class(
            encoder_name=spec.name,
            encoder_weights=spec.weights,
            in_channels=in_channels,
            classes=num_classes,
            **kwargs,
            **spec.kwargs,
        )
    except TypeError as error:
        raise ValueError(
            f"'{architecture}' on '{spec.name}' refuses its arguments (architecture_kwargs={kwargs}, "
            f"encoder_kwargs={spec.kwargs}): {error}"
        ) from error
    load_encoder_weights(model.encoder, spec)
    return model


def build_auxiliary_head(model: Any, num_classes: int, channels: int) -> FCNHead:
    """Build the auxiliary FCN head on the third stage of a model's encoder.

    Args:
        model: An smp model.
        num_classes: Number of classes.
        channels: Width of the head.

    Returns:
        The head.

    Raises:
        ValueError: If the encoder gives no map of its third stage.
    """
    if isinstance(model, smp.DPT):
        raise ValueError("auxiliary_weight: the encoder of 'dpt' has no map for an auxiliary head; use 0")
    encoder_channels: Sequence[int] = model.encoder.out_channels
    if len(encoder_channels) <= AUXILIARY_LEVEL:
        raise ValueError(
            f"auxiliary_weight: the auxiliary head reads the encoder's third stage, which encoder_depth="
            f"{len(encoder_channels) - 1} cuts off; use 4 or 5, or auxiliary_weight=0"
        )
    return FCNHead(encoder_channels[AUXILIARY_LEVEL], num_classes, channels)
