"""FCOS as published with RepLKNet, on torchvision's FCOS.

Source: Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection" (ICCV 2019), in the form of OpenMMLab's
default ``FCOSHead``. torchvision's FCOS is a later one: centerness from the regression tower, distances through ReLU
in units of the stride, GIoU loss, centre sampling, and the square root of class score times centerness as the score.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import detection
from torchvision.ops import Conv2dNormActivation, batched_nms, clip_boxes_to_image, sigmoid_focal_loss

from lk_backbones._private.torchvision import BoxLinearCoder
from lk_backbones._processes import mean_over_processes
from lk_backbones.heads.protocol import Detector, to_full_precision
from lk_backbones.heads.pyramid import EncoderPyramid
from lk_backbones.heads.regions import PyramidAnchorGenerator
from lk_backbones.weights.openmmlab import rename_fcos

__all__ = ["FCOS", "FCOSHead", "iou_loss"]


class FCOSHead(nn.Module):
    """Two towers of 3x3 convolutions with group norm, shared by all maps.

    Args:
        in_channels: Channels of the maps.
        num_classes: Number of classes, without background.
        num_levels: Number of maps.
        channels: Width of the towers, divisible by 32. At 32 each group of the norm is one channel, which PyTorch
            refuses in training for a single image whose coarsest map is 1×1.
        num_convs: Depth of the towers.
        prior: Score of every class before training.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        num_levels: int = 5,
        channels: int = 256,
        num_convs: int = 4,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        if channels % 32:
            raise ValueError(f"head_channels={channels} must be divisible by 32, the groups of the group norm")
        self.classification_tower, self.regression_tower = (
            nn.Sequential(
                *(
                    Conv2dNormActivation(
                        channels if i else in_channels,
                        channels,
                        3,
                        norm_layer=partial(nn.GroupNorm, 32),
                        inplace=False,  # in place, the ReLU would change what a hook on the norm has kept
                    )
                    for i in range(num_convs)
                )
            )
            for _ in range(2)
        )
        self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.bbox_reg = nn.Conv2d(channels, 4, 3, padding=1)
        self.bbox_ctrness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in range(num_levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.cls_logits.bias is not None
        nn.init.constant_(self.cls_logits.bias, math.log(prior / (1 - prior)))

    def forward(self, x: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Predict for every position of every map.

        Args:
            x: Maps of the pyramid, finest first, each ``(N, in_channels, H_i, W_i)``.

        Returns:
            In float32, for ``P`` positions in the order map, row, column: ``cls_logits (N, P, num_classes)``,
            ``bbox_regression (N, P, 4)``, the distances in pixels to the left, upper, right and lower edge, and
            ``bbox_ctrness (N, P, 1)``, the logit of the centerness.
        """
        outputs: dict[str, list[torch.Tensor]] = {"cls_logits": [], "bbox_regression": [], "bbox_ctrness": []}
        for feature, scale in zip(x, self.scales, strict=True):
            classification = self.classification_tower(feature)
            regression = self.bbox_reg(self.regression_tower(feature))
            outputs["cls_logits"].append(_flat(self.cls_logits(classification)))
            outputs["bbox_regression"].append((scale * _flat(regression)).exp())
            outputs["bbox_ctrness"].append(_flat(self.bbox_ctrness(classification)))
        return {name: torch.cat(values, dim=1) for name, values in outputs.items()}

    def compute_loss(
        self,
        targets: list[dict[str, torch.Tensor]],
        head_outputs: dict[str, torch.Tensor],
        anchors: list[torch.Tensor],
        matched_idxs: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Compute the three losses.

        All are averaged over the positive positions of the batch, the box loss weighted by their centerness. With
        several processes the averages are over all of them.

        Args:
            targets: Boxes ``(M, 4)`` and labels ``(M,)``, from 0, of every image.
            head_outputs: What `forward` returns.
            anchors: Squares ``(P, 4)`` centred on the positions, for every image.
            matched_idxs: Index of the object for every position, -1 for none, ``(P,)`` for every image.

        Returns:
            ``classification`` (focal), ``bbox_regression`` (negative logarithm of IoU) and ``bbox_ctrness`` (binary
            cross entropy).
        """
        logits = head_outputs["cls_logits"]
        one_hot = torch.zeros_like(logits)
        positive = torch.stack(matched_idxs) >= 0
        boxes = []
        for classes, target, matched in zip(one_hot, targets, matched_idxs, strict=True):
            (found,) = torch.where(matched >= 0)
            classes[found, target["labels"][matched[found]]] = 1
            boxes.append(target["boxes"][matched[found]])
        centres = _centres(torch.stack(anchors))[positive]
        truth = _distances(centres, torch.cat(boxes).to(centres.dtype))
        horizontal, vertical = truth[:, 0::2], truth[:, 1::2]
        centerness = (horizontal.amin(-1) / horizontal.amax(-1) * vertical.amin(-1) / vertical.amax(-1)).sqrt()
        count = mean_over_processes(positive.sum(dtype=logits.dtype)).clamp(min=1)
        box_losses = iou_loss(head_outputs["bbox_regression"][positive], truth)
        return {
            "classification": sigmoid_focal_loss(logits, one_hot, reduction="sum") / count,
            "bbox_regression": (box_losses * centerness).sum() / mean_over_processes(centerness.sum()).clamp(min=1e-6),
            "bbox_ctrness": F.binary_cross_entropy_with_logits(
                head_outputs["bbox_ctrness"][positive][:, 0], centerness, reduction="sum"
            )
            / count,
        }


class FCOS(Detector, detection.FCOS):
    """FCOS with `FCOSHead` and its published way of choosing positions and detections.

    Args:
        backbone: Pyramid with strides 8 to 128.
        num_classes: Number of classes, without background.
        head_channels: Width of the head's towers.
        head_convs: Depth of the head's towers.
        center_sampling_radius: Only positions within this many strides of an object's centre are positive; ``None``
            (published) for all positions in its box.
        score_thresh: Least class score of a detection; the returned score is that times the centerness.
        nms_thresh: IoU above which the weaker of two detections of a class is dropped.
        detections_per_img: Most detections of an image.
        topk_candidates: Most detections of one map before non-maximum suppression.
        **kwargs: As torchvision's FCOS, for `GeneralizedRCNNTransform`.
    """

    first_label = 0
    backbone: EncoderPyramid
    head: FCOSHead

    def __init__(
        self,
        backbone: EncoderPyramid,
        num_classes: int,
        *,
        head_channels: int = 256,
        head_convs: int = 4,
        center_sampling_radius: float | None = None,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        topk_candidates: int = 1000,
        **kwargs: object,
    ) -> None:
        strides = backbone.strides
        super().__init__(
            backbone,
            num_classes,
            anchor_generator=PyramidAnchorGenerator(strides, [(s,) for s in strides], (1.0,), offset=0.5),
            head=FCOSHead(backbone.out_channels, num_classes, len(strides), head_channels, head_convs),
            score_thresh=score_thresh,
            nms_thresh=nms_thresh,
            detections_per_img=detections_per_img,
            topk_candidates=topk_candidates,
            **kwargs,
        )
        self.num_classes = num_classes
        self.center_sampling_radius = center_sampling_radius
        self.box_coder = BoxLinearCoder(normalize_by_size=False)  # distances are in pixels

    def openmmlab_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the pyramid and head of an OpenMMLab FCOS, see `Detector`."""
        return rename_fcos(state_dict, maps=len(self.backbone.fpn.inner_blocks))

    def compute_loss(
        self,
        targets: list[dict[str, torch.Tensor]],
        head_outputs: dict[str, torch.Tensor],
        anchors: list[torch.Tensor],
        num_anchors_per_level: list[int],
    ) -> dict[str, torch.Tensor]:
        """Match positions and objects, then ask the head for its losses; see `FCOSHead.compute_loss`."""
        matched = [
            self.match(anchor, target["boxes"], num_anchors_per_level)
            for anchor, target in zip(anchors, targets, strict=True)
        ]
        return self.head.compute_loss(targets, head_outputs, anchors, matched)

    def match(self, anchors: torch.Tensor, boxes: torch.Tensor, num_anchors_per_level: list[int]) -> torch.Tensor:
        """Find the object that every position is to predict.

        It is the smallest one whose box surrounds the position and whose furthest edge lies in the range of the
        position's map: 4 to 8 strides; from 0 for the finest map, without end for the coarsest.

        Args:
            anchors: Squares ``(P, 4)`` of the size of the stride, centred on the positions.
            boxes: Objects ``(M, 4)``.
            num_anchors_per_level: Number of positions of every map.

        Returns:
            Index of the object ``(P,)``, -1 for none.
        """
        if len(boxes) == 0:
            return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
        strides, centres = anchors[:, 2] - anchors[:, 0], _centres(anchors)
        lower, upper = strides * 4, strides * 8
        lower[: num_anchors_per_level[0]] = 0
        upper[len(upper) - num_anchors_per_level[-1] :] = torch.inf
        distances = _distances(centres[:, None], boxes[None].to(centres.dtype))
        furthest = distances.amax(-1)
        allowed = (distances.amin(-1) > 0) & (furthest >= lower[:, None]) & (furthest <= upper[:, None])
        if self.center_sampling_radius is not None:
            offset = (centres[:, None] - _centres(boxes)[None]).abs().amax(-1)
            allowed &= offset < self.center_sampling_radius * strides[:, None]
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1).to(centres.dtype)
        area, index = torch.where(allowed, areas, torch.inf).min(dim=1)
        return index.where(area.isfinite(), -1)

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[torch.Tensor]],
        anchors: list[list[torch.Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, torch.Tensor]]:
        """Choose the detections of every image.

        Args:
            head_outputs: What the head returns, split by map.
            anchors: Squares centred on the positions, by image and map.
            image_shapes: Sizes of the images without padding.

        Returns:
            ``boxes (N, 4)``, ``scores (N,)`` and ``labels (N,)``, from 0, best first.
        """
        detections = []
        for image, size in enumerate(image_shapes):
            boxes, scores, labels = [], [], []
            levels = (head_outputs[name] for name in ("cls_logits", "bbox_regression", "bbox_ctrness"))
            for logits, distances, centerness, anchor in zip(*levels, anchors[image], strict=True):
                class_scores = logits[image].sigmoid()
                position, label = torch.where(class_scores > self.score_thresh)
                score, order = class_scores[position, label].sort(descending=True, stable=True)
                order = order[: self.topk_candidates]
                position, label, score = position[order], label[order], score[: self.topk_candidates]
                box = clip_boxes_to_image(self.box_coder.decode(distances[image][position], anchor[position]), size)
                visible = (box[:, 2:] > box[:, :2]).all(-1)
                boxes.append(box[visible])
                scores.append((score * centerness[image][position, 0].sigmoid())[visible])
                labels.append(label[visible])
            box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
            keep = batched_nms(box, score, label, self.nms_thresh)[: self.detections_per_img]
            detections.append({"boxes": box[keep], "scores": score[keep], "labels": label[keep]})
        return detections


def iou_loss(distances: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative logarithm of the IoU of boxes around the same points (Yu et al., "UnitBox", ACM MM 2016).

    Args:
        distances: Predicted distances to the left, upper, right and lower edge, ``(N, 4)``.
        targets: The true ones, ``(N, 4)``.

    Returns:
        ``(N,)``, at most ``-ln(1e-6)``.
    """
    inner = torch.minimum(distances, targets)
    overlap = (inner[:, :2] + inner[:, 2:]).clamp(min=0).prod(-1)
    union = (distances[:, :2] + distances[:, 2:]).prod(-1) + (targets[:, :2] + targets[:, 2:]).prod(-1) - overlap
    return -(overlap / union.clamp(min=1e-6)).clamp(min=1e-6).log()


def _flat(x: torch.Tensor) -> torch.Tensor:
    """``(N, K, H, W)`` to ``(N, H * W, K)``, at least float32."""
    return to_full_precision(x).flatten(2).transpose(1, 2)


def _centres(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _distances(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Distances from points ``(..., 2)`` to the left, upper, right and lower edge of boxes ``(..., 4)``."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)
