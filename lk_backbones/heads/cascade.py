"""Cascade R-CNN and Cascade Mask R-CNN as published with the large-kernel backbones.

Source: Cai and Vasconcelos, "Cascade R-CNN: High Quality Object Detection and Instance Segmentation" (TPAMI 2019), in
the form of the published configurations: three stages of four convolutions and one fully connected layer, trained on
regions of rising IoU with their object, each starting from the boxes of the one before. torchvision has no cascade; its
parts make up this one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import Conv2dNormActivation

from lk_backbones.heads.predictors import BoxPredictor, MaskPredictor
from lk_backbones.heads.protocol import Detector
from lk_backbones.heads.pyramid import EncoderPyramid
from lk_backbones.heads.regions import PyramidAnchorGenerator, PyramidRoIAlign, SmoothMaskTransform
from lk_backbones.heads.roi_heads import BOX_LOSSES, CascadeStage
from lk_backbones.heads.rpn import RegionProposalNetwork
from lk_backbones.weights.openmmlab import rename_cascade

__all__ = ["CascadeRCNN", "CascadeRoIHeads"]


class CascadeRoIHeads(nn.Module):
    """Several `CascadeStage` in a row, in the protocol of torchvision's `RoIHeads`.

    Args:
        stages: The stages.
        loss_weights: Factor of each stage's losses.
    """

    stages: Sequence[CascadeStage]

    def __init__(self, stages: Sequence[CascadeStage], loss_weights: Sequence[float]) -> None:
        super().__init__()
        self.stages = cast(Sequence[CascadeStage], nn.ModuleList(stages))
        self.loss_weights = tuple(loss_weights)

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Compute detections, or in training mode losses.

        Args:
            features: Maps of the pyramid by name.
            proposals: Boxes ``(N, 4)`` for every image.
            image_shapes: Sizes of the images without padding.
            targets: Boxes, labels and masks for every image.

        Returns:
            Detections, empty in training mode, with masks ``(N, 1, 28, 28)``; and losses, empty otherwise, with the
            stage, from 0, at the end of their names.
        """
        if self.training:
            if targets is None:
                raise ValueError("targets are needed in training mode")
            return [], self.losses(features, proposals, image_shapes, targets)
        return self.detect(features, proposals, image_shapes), {}

    def losses(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        """Losses of all stages, weighted."""
        losses: dict[str, torch.Tensor] = {}
        for i, (stage, weight) in enumerate(zip(self.stages, self.loss_weights, strict=True)):
            samples = stage.sample(proposals, targets)
            logits, deltas = stage.predict(features, samples.boxes, image_shapes)
            terms = stage.box_losses(logits, deltas, samples, targets)
            if stage.has_mask():
                terms |= stage.mask_losses(features, samples, targets, image_shapes)
            losses |= {f"{name}_stage{i}": weight * term for name, term in terms.items()}
            with torch.no_grad():
                # Every region moves on as what it is or, if background, as what it looks like. Objects' own boxes are
                # left behind: the next stage adds them again.
                labels = torch.cat(samples.labels)
                labels = labels.where(labels > 0, _best_class(logits))
                moved = stage.refine(deltas.detach(), labels, samples.boxes, image_shapes)
                proposals = [b[~added] for b, added in zip(moved, samples.added, strict=True)]
        return losses

    def cascade(
        self, features: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Run all stages on proposals.

        Returns:
            The boxes that the last stage saw, the mean of all stages' class logits, and the last stage's deltas.
        """
        logits, deltas = self.stages[0].predict(features, boxes, image_shapes)
        total = logits
        for stage, following in zip(self.stages, self.stages[1:], strict=False):
            boxes = stage.refine(deltas, _best_class(logits), boxes, image_shapes)
            logits, deltas = following.predict(features, boxes, image_shapes)
            total = total + logits
        return boxes, total / len(self.stages), deltas

    def detect(
        self, features: dict[str, torch.Tensor], proposals: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, torch.Tensor]]:
        """Find the objects of every image; their masks are the mean of all stages' probabilities."""
        boxes, logits, deltas = self.cascade(features, proposals, image_shapes)
        last = self.stages[-1]
        detections = [
            {"boxes": b, "labels": label, "scores": score}
            for b, score, label in zip(*last.postprocess_detections(logits, deltas, boxes, image_shapes), strict=True)
        ]
        if last.has_mask():
            pooled = last.mask_roi_pool(features, [d["boxes"] for d in detections], image_shapes)
            labels = torch.cat([d["labels"] for d in detections])
            index = torch.arange(len(labels), device=labels.device)
            masks = torch.stack([stage.mask_logits(pooled)[index, labels].sigmoid() for stage in self.stages]).mean(0)
            for detection, mask in zip(detections, masks.split([len(d["boxes"]) for d in detections]), strict=True):
                detection["masks"] = mask[:, None]
        return detections


def _best_class(logits: torch.Tensor) -> torch.Tensor:
    """Return the most likely class that is not background, ``(N, C + 1)`` to ``(N,)``."""
    return logits[:, 1:].argmax(dim=1) + 1


class CascadeRCNN(Detector, GeneralizedRCNN):
    """Cascade R-CNN, or Cascade Mask R-CNN. Names of arguments as in torchvision's `FasterRCNN`, where it has them.

    Args:
        backbone: Pyramid with strides 4 to 64.
        num_classes: Number of classes, without background.
        masks: Whether every stage has a mask head.
        min_size: Length of the shorter side in evaluation mode, in pixels.
        max_size: Most pixels of the longer side.
        image_mean: Mean of every channel.
        image_std: Standard deviation of every channel.
        anchor_sizes: Square roots of the anchors' areas in pixels, for every map.
        anchor_ratios: Height / width of the anchors.
        rpn_pre_nms_top_n_train: Best anchors of every map before non-maximum suppression, in training mode.
        rpn_pre_nms_top_n_test: The same in evaluation mode.
        rpn_post_nms_top_n_train: Proposals of an image, in training mode.
        rpn_post_nms_top_n_test: The same in evaluation mode.
        rpn_nms_thresh: IoU above which the weaker of two proposals is dropped.
        rpn_fg_iou_thresh: IoU with an object from which an anchor is positive.
        rpn_bg_iou_thresh: IoU below which it is negative.
        rpn_min_iou_thresh: IoU from which the best anchors of an object are positive in any case.
        rpn_allowed_border: Pixels by which an anchor may cross the border of the image to take part in training;
            ``None`` for any. Set that for images much smaller than the largest anchors.
        rpn_batch_size_per_image: Anchors of an image in the loss.
        rpn_positive_fraction: Largest share of positive ones among them.
        box_head_convs: 3x3 convolutions of a box head.
        box_head_channels: Their width.
        box_head_batch_norm: Whether each is followed by a batch norm.
        box_head_fcs: Fully connected layers of a box head.
        box_head_fc_channels: Their width.
        class_agnostic: Whether all classes share one set of box deltas.
        box_loss: ``"giou"`` between decoded boxes, or ``"smooth_l1"`` between deltas as in torchvision.
        box_loss_weight: Factor of the box loss; ``None`` for 10 (``"giou"``) or 1.
        stage_iou_thresh: IoU with an object from which a region is positive, for every stage; as many as stages.
        stage_loss_weights: Factor of the losses of every stage.
        stage_box_stds: Deviations of ``(dx, dy, dw, dh)``, for every stage.
        box_batch_size_per_image: Regions of an image in the losses of a stage.
        box_positive_fraction: Largest share of positive ones among them.
        box_score_thresh: Least score of a detection.
        box_nms_thresh: IoU above which the weaker of two detections of a class is dropped.
        box_detections_per_img: Most detections of an image.
        mask_head_convs: 3x3 convolutions of a mask head.
        mask_head_channels: Their width.
        roi_sampling_ratio: Samples of RoIAlign per bin and axis, 0 for as many as a bin has pixels.
        roi_aligned: Whether RoIAlign puts pixel centres at half pixels.
        **kwargs: For torchvision's `GeneralizedRCNNTransform`.

    Raises:
        ValueError: If the settings of the stages differ in number, or the loss is unknown.
    """

    backbone: EncoderPyramid
    roi_heads: CascadeRoIHeads

    def __init__(
        self,
        backbone: EncoderPyramid,
        num_classes: int,
        *,
        masks: bool = False,
        min_size: int = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        anchor_sizes: Sequence[Sequence[float]] = ((32,), (64,), (128,), (256,), (512,)),
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 2000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_nms_thresh: float = 0.7,
        rpn_fg_iou_thresh: float = 0.7,
        rpn_bg_iou_thresh: float = 0.3,
        rpn_min_iou_thresh: float = 0.3,
        rpn_allowed_border: float | None = 0,
        rpn_batch_size_per_image: int = 256,
        rpn_positive_fraction: float = 0.5,
        box_head_convs: int = 4,
        box_head_channels: int = 256,
        box_head_batch_norm: bool = True,
        box_head_fcs: int = 1,
        box_head_fc_channels: int = 1024,
        class_agnostic: bool = False,
        box_loss: str = "giou",
        box_loss_weight: float | None = None,
        stage_iou_thresh: Sequence[float] = (0.5, 0.6, 0.7),
        stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        stage_box_stds: Sequence[Sequence[float]] = (
            (0.1, 0.1, 0.2, 0.2),
            (0.05, 0.05, 0.1, 0.1),
            (0.033, 0.033, 0.067, 0.067),
        ),
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_detections_per_img: int = 100,
        mask_head_convs: int = 4,
        mask_head_channels: int = 256,
        roi_sampling_ratio: int = 0,
        roi_aligned: bool = True,
        **kwargs: Any,
    ) -> None:
        if not len(stage_iou_thresh) == len(stage_loss_weights) == len(stage_box_stds) >= 1:
            raise ValueError(
                f"every stage needs an IoU threshold, a loss weight and deviations, got stage_iou_thresh="
                f"{stage_iou_thresh}, stage_loss_weights={stage_loss_weights}, stage_box_stds={stage_box_stds}"
            )
        if box_loss not in BOX_LOSSES:
            raise ValueError(f"box_loss='{box_loss}' must be one of {', '.join(BOX_LOSSES)}")
        if box_loss_weight is None:
            box_loss_weight = 10.0 if box_loss == "giou" else 1.0
        width, strides = backbone.out_channels, backbone.strides
        rpn = RegionProposalNetwork(
            width,
            PyramidAnchorGenerator(strides, anchor_sizes, anchor_ratios, rounded=False),
            rpn_fg_iou_thresh,
            rpn_bg_iou_thresh,
            rpn_min_iou_thresh,
            rpn_allowed_border,
            rpn_batch_size_per_image,
            rpn_positive_fraction,
            {"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test},
            {"training": rpn_post_nms_top_n_train, "testing": rpn_post_nms_top_n_test},
            rpn_nms_thresh,
        )
        stages = []
        for iou_thresh, stds in zip(stage_iou_thresh, stage_box_stds, strict=True):
            box_head = FastRCNNConvFCHead(
                (width, 7, 7),
                [box_head_channels] * box_head_convs,
                [box_head_fc_channels] * box_head_fcs,
                nn.BatchNorm2d if box_head_batch_norm else None,
            )
            box_predictor = BoxPredictor(box_head_fc_channels, num_classes + 1, class_agnostic)
            _initialize(box_head, box_predictor)
            mask_parts = {
                "mask_roi_pool": PyramidRoIAlign(strides[:4], 14, roi_sampling_ratio, roi_aligned),
                "mask_head": MaskRCNNHeads(width, [mask_head_channels] * mask_head_convs, 1),
                "mask_predictor": MaskPredictor(mask_head_channels, mask_head_channels, num_classes + 1),
            }
            stages.append(
                CascadeStage(
                    iou_thresh=iou_thresh,
                    box_stds=stds,
                    box_loss=box_loss,
                    box_loss_weight=box_loss_weight,
                    box_roi_pool=PyramidRoIAlign(strides[:4], 7, roi_sampling_ratio, roi_aligned),
                    box_head=box_head,
                    box_predictor=box_predictor,
                    batch_size_per_image=box_batch_size_per_image,
                    positive_fraction=box_positive_fraction,
                    score_thresh=box_score_thresh,
                    nms_thresh=box_nms_thresh,
                    detections_per_img=box_detections_per_img,
                    **(mask_parts if masks else {}),
                )
            )
        transform = SmoothMaskTransform(min_size, max_size, list(image_mean), list(image_std), **kwargs)
        super().__init__(backbone, rpn, CascadeRoIHeads(stages, stage_loss_weights), transform)
        self.num_classes = num_classes
        self.needs_masks = masks
        self.class_agnostic = class_agnostic

    def openmmlab_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename and reorder everything but the backbone of an OpenMMLab Cascade (Mask) R-CNN, see `Detector`."""
        return rename_cascade(
            state_dict,
            maps=len(self.backbone.fpn.inner_blocks),
            convs=sum(isinstance(block, Conv2dNormActivation) for block in self.roi_heads.stages[0].box_head),
            masks=self.needs_masks,
            class_agnostic=self.class_agnostic,
        )


def _initialize(box_head: nn.Module, box_predictor: nn.Module) -> None:
    """Initialise what torchvision leaves to PyTorch's defaults, as OpenMMLab does."""
    for module in box_head.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, std in (("cls_score", 0.01), ("bbox_pred", 0.001)):
        layer = cast(nn.Linear, box_predictor.get_submodule(name))
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
