"""OpenMMLab's names of whole models: UPerNet, Cascade (Mask) R-CNN and FCOS, as large-kernel backbones were trained in.

Keys and shapes only. What a key becomes can depend on the model at hand (whether it has masks, say): the heads know
that and ask for the renaming in their ``openmmlab_state_dict``. The backbone's keys, ``backbone.*``, are the family's.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

__all__ = [
    "detector_arguments",
    "is_dense_model",
    "rename_cascade",
    "rename_fcos",
    "rename_upernet",
    "split_backbone",
    "upernet_arguments",
]

State = Mapping[str, torch.Tensor]

_BACKBONE = "backbone."
# Parts beside the backbone.
_HEADS = ("decode_head.", "auxiliary_head.", "neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.")


def is_dense_model(state_dict: State) -> bool:
    """Return whether the keys are those of a whole segmentation or detection model."""
    return any(key.startswith(_HEADS) for key in state_dict) and any(key.startswith(_BACKBONE) for key in state_dict)


def split_backbone(state_dict: State) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Part a whole model's backbone from the rest of it, names unchanged."""
    backbone = {key: value for key, value in state_dict.items() if key.startswith(_BACKBONE)}
    return backbone, {key: value for key, value in state_dict.items() if key not in backbone}


# ---- what a file tells of its model ----


def upernet_arguments(state_dict: State) -> dict[str, Any]:
    """Tell of a published UPerNet checkpoint the task that it fits into, but for the encoder.

    Args:
        state_dict: Keys ``decode_head.*`` and perhaps ``auxiliary_head.*``.

    Returns:
        Arguments of `SegmentationTask`. How interpolations treat the borders (``align_corners``) leaves no trace in the
        weights: it is ``True`` in the published Cityscapes models, hence for 19 classes.

    Raises:
        KeyError: If there is no ``decode_head`` of UPerNet.
    """
    num_classes = len(state_dict["decode_head.conv_seg.weight"])
    arguments: dict[str, Any] = {
        "architecture": "upernet_openmmlab",
        "num_classes": num_classes,
        "architecture_kwargs": {
            "decoder_channels": len(state_dict["decode_head.fpn_bottleneck.conv.weight"]),
            "align_corners": num_classes == 19,
        },
    }
    if "auxiliary_head.convs.0.conv.weight" in state_dict:
        arguments["auxiliary_weight"] = 0.4
        arguments["auxiliary_channels"] = len(state_dict["auxiliary_head.convs.0.conv.weight"])
    return arguments


def detector_arguments(state_dict: State) -> dict[str, Any]:
    """Tell of a published detector's checkpoint the task that it fits into, but for the encoder.

    Args:
        state_dict: Keys ``roi_head.*`` of a cascade, or ``bbox_head.*`` of FCOS.

    Returns:
        Arguments of `DetectionTask`.

    Raises:
        KeyError: If there is neither.
    """
    if "bbox_head.conv_cls.weight" in state_dict:
        return {"architecture": "fcos", "num_classes": len(state_dict["bbox_head.conv_cls.weight"])}
    with_masks = any(key.startswith("roi_head.mask_head.") for key in state_dict)
    return {
        "architecture": "cascade_mask_rcnn" if with_masks else "cascade_rcnn",
        "num_classes": len(state_dict["roi_head.bbox_head.0.fc_cls.weight"]) - 1,  # without the background
    }


# ---- segmentation ----

# OpenMMLab's module -> ours. In every convolution block its `conv` and `bn` are our `0` and `1`.
_UPERNET = {
    "decode_head.psp_modules.": "decoder.pyramid_pooling.branches.",
    "decode_head.bottleneck.": "decoder.pyramid_pooling.bottleneck.",
    "decode_head.lateral_convs.": "decoder.lateral_convs.",
    "decode_head.fpn_convs.": "decoder.fpn_convs.",
    "decode_head.fpn_bottleneck.": "decoder.fusion.",
    "decode_head.conv_seg.": "segmentation_head.0.",
    "auxiliary_head.convs.": "auxiliary_head.convs.",
    "auxiliary_head.conv_seg.": "auxiliary_head.classifier.",
}


def rename_upernet(state_dict: State) -> dict[str, torch.Tensor]:
    """Rename the heads of a UPerNet.

    ``decode_head.*`` becomes ``decoder.*`` and ``segmentation_head.*`` of `OpenMMLabUPerNet`; ``auxiliary_head.*``
    becomes the keys of `FCNHead` under ``auxiliary_head.``. Other keys, ours among them, stay as they are.

    Args:
        state_dict: Tensors by key.

    Returns:
        A new dictionary with the same tensors.

    Raises:
        KeyError: If a key of the published heads is unknown, so that nothing is dropped silently.
    """
    renamed = {}
    for key, value in state_dict.items():
        prefix = next((prefix for prefix in _UPERNET if key.startswith(prefix)), None)
        if prefix is None:
            if key.startswith(("decode_head.", "auxiliary_head.")) and not key.startswith("auxiliary_head.classifier."):
                raise KeyError(f"'{key}' is in no head of OpenMMLab's UPerNet; known modules: {sorted(_UPERNET)}")
            renamed[key] = value
            continue
        rest = key.removeprefix(prefix).replace("conv.", "0.", 1).replace("bn.", "1.", 1)
        renamed[_UPERNET[prefix] + rest] = value
    return renamed


# ---- detection ----

# OpenMMLab's names -> ours, the first that fits; "{fc}" is the place of the first fully connected layer.
_CASCADE = (
    (r"rpn_head\.rpn_conv\.", r"rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", r"rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", r"rpn.head.bbox_pred."),
    (r"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.conv\.", r"roi_heads.stages.\1.box_head.\2.0."),
    (r"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.bn\.", r"roi_heads.stages.\1.box_head.\2.1."),
    (r"roi_head\.bbox_head\.(\d+)\.shared_fcs\.0\.", r"roi_heads.stages.\1.box_head.{fc}."),
    (r"roi_head\.bbox_head\.(\d+)\.fc_cls\.", r"roi_heads.stages.\1.box_predictor.cls_score."),
    (r"roi_head\.bbox_head\.(\d+)\.fc_reg\.", r"roi_heads.stages.\1.box_predictor.bbox_pred."),
    (r"roi_head\.mask_head\.(\d+)\.convs\.(\d+)\.conv\.", r"roi_heads.stages.\1.mask_head.\2.0."),
    (r"roi_head\.mask_head\.(\d+)\.upsample\.", r"roi_heads.stages.\1.mask_predictor.conv5_mask."),
    (r"roi_head\.mask_head\.(\d+)\.conv_logits\.", r"roi_heads.stages.\1.mask_predictor.mask_fcn_logits."),
)

# OpenMMLab's module -> ours. In every convolution block its `conv` and `gn` are our `0` and `1`.
_FCOS = {
    "bbox_head.cls_convs.": "head.classification_tower.",
    "bbox_head.reg_convs.": "head.regression_tower.",
    "bbox_head.conv_cls.": "head.cls_logits.",
    "bbox_head.conv_reg.": "head.bbox_reg.",
    "bbox_head.conv_centerness.": "head.bbox_ctrness.",
    "bbox_head.scales.": "head.scales.",
}


def rename_cascade(
    state_dict: State, *, maps: int, convs: int, masks: bool, class_agnostic: bool
) -> dict[str, torch.Tensor]:
    """Rename and reorder everything but the backbone of a Cascade (Mask) R-CNN.

    There the background is the last class and has neither box deltas nor a mask; here, as in torchvision, it is the
    first and has both, which nothing reads: they become zeros.

    Args:
        state_dict: Keys ``neck.*``, ``rpn_head.*`` and ``roi_head.*``.
        maps: Maps of the encoder that the detector's pyramid takes.
        convs: Convolutions in each of its box heads.
        masks: Whether it has mask heads; if not, those of the file are left out.
        class_agnostic: Whether it has one set of box deltas for all classes.

    Returns:
        Tensors by the keys of `CascadeRCNN`, those of the encoder excepted.

    Raises:
        KeyError: If a key belongs to no part of the published cascade.
    """
    renamed = {}
    for key, value in state_dict.items():
        if key.startswith("neck."):
            renamed[_pyramid_name(key, maps)] = value
            continue
        for pattern, replacement in _CASCADE:
            name, hits = re.subn(f"^{pattern}", replacement.format(fc=convs + 1), key)
            if hits:
                break
        else:
            raise KeyError(f"'{key}' is in no part of OpenMMLab's Cascade R-CNN: neck.*, rpn_head.*, roi_head.*")
        if ".mask_head." in key and not masks:
            continue
        if ".fc_cls." in key:
            value = value.roll(1, dims=0)
        elif ".conv_logits." in key:
            value = torch.cat([torch.zeros_like(value[:1]), value])
        elif ".fc_reg." in key and not class_agnostic:
            value = torch.cat([torch.zeros_like(value[:4]), value])
        renamed[name] = value
    return renamed


def rename_fcos(state_dict: State, *, maps: int) -> dict[str, torch.Tensor]:
    """Rename the pyramid and head of an FCOS.

    Args:
        state_dict: Keys ``neck.*`` and ``bbox_head.*``.
        maps: Maps of the encoder that the detector's pyramid takes.

    Returns:
        Tensors by the keys of `FCOS`, those of the encoder excepted.

    Raises:
        KeyError: If a key belongs to no part of the published FCOS.
    """
    renamed = {}
    for key, value in state_dict.items():
        if key.startswith("neck."):
            renamed[_pyramid_name(key, maps)] = value
            continue
        prefix = next((prefix for prefix in _FCOS if key.startswith(prefix)), None)
        if prefix is None:
            raise KeyError(f"'{key}' is in no part of OpenMMLab's FCOS; known modules: neck. and {sorted(_FCOS)}")
        rest = key.removeprefix(prefix).replace("conv.", "0.", 1).replace("gn.", "1.", 1).removesuffix(".scale")
        renamed[_FCOS[prefix] + rest] = value
    return renamed


def _pyramid_name(key: str, maps: int) -> str:
    """Name a tensor of the neck as `EncoderPyramid` does; convolutions beyond ``maps`` make the extra levels."""
    _, part, index, block, *rest = [*key.split("."), "", "", ""]
    name = ".".join(filter(None, rest))
    # convolution and norm of a block are `conv` and `bn` there, `0` and `1` in torchvision
    position = {"conv": "0", "bn": "1"}.get(block)
    if position is None or not index.isdecimal() or part not in ("lateral_convs", "fpn_convs"):
        raise KeyError(f"'{key}' is in no part of OpenMMLab's FPN")
    if part == "lateral_convs":
        return f"backbone.fpn.inner_blocks.{index}.{position}.{name}"
    if int(index) < maps:
        return f"backbone.fpn.layer_blocks.{index}.{position}.{name}"
    return f"backbone.fpn.extra_blocks.p{int(index) - maps + 6}.{name}"
