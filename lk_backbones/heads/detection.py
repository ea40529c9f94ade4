"""Detectors by name: any smp encoder under a feature pyramid, with torchvision's heads or those it lacks."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from lk_backbones._private.torchvision import skips_resize
from lk_backbones.heads.cascade import CascadeRCNN
from lk_backbones.heads.fcos import FCOS
from lk_backbones.heads.predictors import BoxPredictor, MaskPredictor, RetinaNetHead, RPNHead
from lk_backbones.heads.protocol import Detector
from lk_backbones.heads.pyramid import EncoderPyramid
from lk_backbones.heads.regions import PictureTransform, PyramidAnchorGenerator, PyramidRoIAlign
from lk_backbones.weights.errors import nearest

__all__ = ["DETECTORS", "build_detector"]


class _FasterRCNN(Detector, detection.FasterRCNN):
    """torchvision's Faster R-CNN."""


class _MaskRCNN(Detector, detection.MaskRCNN):
    """torchvision's Mask R-CNN."""

    needs_masks = True


class _RetinaNet(Detector, detection.RetinaNet):
    """torchvision's RetinaNet."""

    first_label = 0


def _faster_rcnn(
    backbone: EncoderPyramid,
    num_classes: int,
    *,
    masks: bool = False,
    anchor_sizes: Sequence[Sequence[float]] = ((32,), (64,), (128,), (256,), (512,)),
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    box_head_convs: int = 0,
    box_head_channels: int = 256,
    box_head_batch_norm: bool = True,
    box_head_fcs: int = 2,
    box_head_fc_channels: int = 1024,
    mask_head_convs: int = 4,
    mask_head_channels: int = 256,
    **kwargs: Any,
) -> Detector:
    width, strides = backbone.out_channels, backbone.strides
    anchors = PyramidAnchorGenerator(strides, anchor_sizes, anchor_ratios)
    if box_head_convs == 0 and box_head_fcs == 2:
        box_head: nn.Module = TwoMLPHead(width * 7 * 7, box_head_fc_channels)
    else:
        box_head = FastRCNNConvFCHead(
            (width, 7, 7),
            [box_head_channels] * box_head_convs,
            [box_head_fc_channels] * box_head_fcs,
            nn.BatchNorm2d if box_head_batch_norm else None,
        )
    if masks:
        kwargs |= {
            "mask_roi_pool": PyramidRoIAlign(strides[:4], 14, sampling_ratio=2, aligned=False),
            "mask_head": MaskRCNNHeads(width, [mask_head_channels] * mask_head_convs, 1),
            "mask_predictor": MaskPredictor(mask_head_channels, mask_head_channels, num_classes + 1),
        }
    return (_MaskRCNN if masks else _FasterRCNN)(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(width, anchors.num_anchors_per_location()[0]),
        box_roi_pool=PyramidRoIAlign(strides[:4], 7, sampling_ratio=2, aligned=False),
        box_head=box_head,
        box_predictor=BoxPredictor(box_head_fc_channels, num_classes + 1),
        **kwargs,
    )


# three sizes per octave (RetinaNet paper, section 4), whole as in torchvision
_OCTAVES = tuple(tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in (32, 64, 128, 256, 512))


def _retinanet(
    backbone: EncoderPyramid,
    num_classes: int,
    *,
    anchor_sizes: Sequence[Sequence[float]] = _OCTAVES,
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    head_group_norm: bool = False,
    detections_per_img: int = 100,
    **kwargs: Any,
) -> Detector:
    anchors = PyramidAnchorGenerator(backbone.strides, anchor_sizes, anchor_ratios)
    head = RetinaNetHead(
        backbone.out_channels,
        anchors.num_anchors_per_location()[0],
        num_classes,
        partial(nn.GroupNorm, 32) if head_group_norm else None,
    )
    return _RetinaNet(
        backbone, num_classes, anchor_generator=anchors, head=head, detections_per_img=detections_per_img, **kwargs
    )


# Name -> what builds it, and the classes whose arguments it takes.
_BUILDERS: dict[str, tuple[Callable[..., Detector], tuple[Callable[..., Any], ...]]] = {
    "faster_rcnn": (_faster_rcnn, (_faster_rcnn, detection.FasterRCNN)),
    "mask_rcnn": (partial(_faster_rcnn, masks=True), (_faster_rcnn, detection.MaskRCNN)),
    "cascade_rcnn": (CascadeRCNN, (CascadeRCNN,)),
    "cascade_mask_rcnn": (partial(CascadeRCNN, masks=True), (CascadeRCNN,)),
    "fcos": (FCOS, (FCOS,)),
    "retinanet": (_retinanet, (_retinanet, detection.RetinaNet)),
}
DETECTORS: tuple[str, ...] = tuple(_BUILDERS)

# Parameters of those classes that are modules, or are set by `build_detector` itself.
_RESERVED = {
    "backbone", "num_classes", "min_size", "max_size", "image_mean", "image_std", "masks", "kwargs",
    "rpn_anchor_generator", "rpn_head", "box_roi_pool", "box_head", "box_predictor", "mask_roi_pool", "mask_head",
    "mask_predictor", "anchor_generator", "head", "proposal_matcher",
}  # fmt: skip


def build_detector(
    architecture: str,
    encoder: nn.Module,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    min_size: int = 800,
    max_size: int = 1333,
    **kwargs: Any,
) -> nn.Module:
    """Build a detector on an encoder.

    The detector follows torchvision's protocol (see `lk_backbones.heads.protocol.Detector.forward`), normalises and
    pads images itself, and resizes them in evaluation mode; in training mode it takes them as they are::

        encoder = smp.encoders.get_encoder("replknet_31b", weights=None)
        detector = build_detector("mask_rcnn", encoder, 80, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    The encoder stays reachable as ``detector.backbone.encoder``.

    Args:
        architecture: One of `DETECTORS`.
        encoder: An smp encoder of depth 5.
        num_classes: Number of classes, without background.
        mean: Mean of every channel, for images in [0, 1].
        std: Standard deviation of every channel.
        min_size: Length of the shorter side in evaluation mode, in pixels.
        max_size: Most pixels of the longer side.
        **kwargs: Settings of the architecture, plain values under torchvision's names where it has them. All take
            ``fpn_channels`` (256) and ``fpn_batch_norm`` (``False``). ``cascade_*``: see `CascadeRCNN`; ``fcos``: see
            `FCOS`; their defaults are the published ones. ``faster_rcnn`` and ``mask_rcnn``: those of torchvision's
            `FasterRCNN`, ``anchor_sizes`` and ``anchor_ratios``, and the widths and depths of the heads
            (``box_head_*``, ``mask_head_*``, as in `CascadeRCNN`). ``retinanet``: those of torchvision's `RetinaNet`,
            ``anchor_sizes``, ``anchor_ratios`` and ``head_group_norm`` (32 groups, in its towers).

    Returns:
        The detector.

    Raises:
        ValueError: If a name is unknown, or an argument does not fit.
    """
    if architecture not in _BUILDERS:
        raise ValueError(
            f"unknown detector '{architecture}'{nearest(architecture, DETECTORS)}; there are {', '.join(DETECTORS)}"
        )
    builder, sources = _BUILDERS[architecture]
    known = {name for source in sources for name in inspect.signature(source).parameters} - _RESERVED
    known |= {"fpn_channels", "fpn_batch_norm"}
    for name in kwargs:
        if name not in known:
            raise ValueError(f"'{architecture}' has no argument '{name}', only {sorted(known)}{nearest(name, known)}")
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1 (background does not count)")
    channels = getattr(encoder, "_in_channels", len(mean))
    if not len(mean) == len(std) == channels:
        raise ValueError(f"mean and std need {channels} values, one per channel of the encoder, got {mean} and {std}")
    backbone = EncoderPyramid(
        encoder,
        kwargs.pop("fpn_channels", 256),
        dense=architecture in ("fcos", "retinanet"),
        batch_norm=kwargs.pop("fpn_batch_norm", False),
    )
    detector = builder(
        backbone,
        num_classes,
        min_size=min_size,
        max_size=max_size,
        image_mean=list(mean),
        image_std=list(std),
        **skips_resize(),
        **kwargs,
    )
    detector.num_classes = num_classes
    if not isinstance(detector.transform, PictureTransform):
        detector.transform = PictureTransform.like(detector.transform)
    return detector
