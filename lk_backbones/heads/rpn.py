"""The region proposal network of the published cascades, on torchvision's.

Source: Ren et al., "Faster R-CNN" (NeurIPS 2015), in OpenMMLab's form, which differs from torchvision's in training:
anchors that cross the border of the image take no part, and an object whose best anchor is bad gets none.
"""

from collections.abc import Sequence

import torch
from torchvision.models.detection import rpn
from torchvision.models.detection.image_list import ImageList

from lk_backbones._private.torchvision import Matcher
from lk_backbones.heads.predictors import RPNHead
from lk_backbones.heads.regions import BoxCoder, PyramidAnchorGenerator

__all__ = ["RegionProposalNetwork"]


class _Matcher(Matcher):
    """torchvision's matcher; an object's best anchors are its own, unless even they overlap too little.

    Args:
        high_threshold: IoU from which an anchor is positive.
        low_threshold: IoU below which an anchor is negative.
        min_quality: IoU from which the best anchors of an object are positive in any case.
    """

    def __init__(self, high_threshold: float, low_threshold: float, min_quality: float) -> None:
        super().__init__(high_threshold, low_threshold, allow_low_quality_matches=True)
        self.min_quality = min_quality

    def set_low_quality_matches_(
        self, matches: torch.Tensor, all_matches: torch.Tensor, match_quality_matrix: torch.Tensor
    ) -> None:
        """Give every object its best anchors, in place; the later object wins an anchor that is the best of two."""
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        objects, anchors = torch.where((match_quality_matrix == best) & (best >= self.min_quality))
        matches.scatter_reduce_(0, anchors, objects, "amax", include_self=False)


class RegionProposalNetwork(rpn.RegionProposalNetwork):
    """Proposals from anchors, trained as published.

    Args:
        in_channels: Channels of the pyramid's maps.
        anchor_generator: The anchors, not rounded.
        fg_iou_thresh: IoU with an object from which an anchor is positive.
        bg_iou_thresh: IoU below which it is negative.
        min_iou_thresh: IoU from which the best anchors of an object are positive in any case.
        allowed_border: Pixels by which an anchor may cross the border of the image to take part in training; ``None``
            or, as in OpenMMLab, a negative number for any. Images much smaller than the coarsest anchors (256 and 512
            pixels by default) need that, or else those anchors are never trained.
        batch_size_per_image: Anchors of an image in the loss.
        positive_fraction: Largest share of positive ones among them.
        pre_nms_top_n: Best anchors of every map, ``"training"`` and ``"testing"``.
        post_nms_top_n: Proposals of an image, ``"training"`` and ``"testing"``.
        nms_thresh: IoU above which the weaker of two proposals from one map is dropped.
    """

    def __init__(
        self,
        in_channels: int,
        anchor_generator: PyramidAnchorGenerator,
        fg_iou_thresh: float = 0.7,
        bg_iou_thresh: float = 0.3,
        min_iou_thresh: float = 0.3,
        allowed_border: float | None = 0,
        batch_size_per_image: int = 256,
        positive_fraction: float = 0.5,
        pre_nms_top_n: dict[str, int] | None = None,
        post_nms_top_n: dict[str, int] | None = None,
        nms_thresh: float = 0.7,
    ) -> None:
        super().__init__(
            anchor_generator,
            RPNHead(in_channels, anchor_generator.num_anchors_per_location()[0]),
            fg_iou_thresh,
            bg_iou_thresh,
            batch_size_per_image,
            positive_fraction,
            pre_nms_top_n or {"training": 2000, "testing": 1000},
            post_nms_top_n or {"training": 2000, "testing": 1000},
            nms_thresh,
        )
        self.proposal_matcher = _Matcher(fg_iou_thresh, bg_iou_thresh, min_iou_thresh)
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.allowed_border = allowed_border
        self.min_size = torch.finfo(torch.float32).tiny  # drop empty proposals only

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Propose regions, as torchvision's: boxes ``(N, 4)`` for every image, and in training mode the losses."""
        if targets is not None:
            sizes = (torch.tensor(size) for size in images.image_sizes)
            targets = [{**target, "image_size": size} for target, size in zip(targets, sizes, strict=True)]
        return super().forward(images, features, targets)

    def assign_targets_to_anchors(
        self, anchors: Sequence[torch.Tensor], targets: Sequence[dict[str, torch.Tensor]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Label anchors.

        Args:
            anchors: ``(A, 4)`` for every image.
            targets: ``boxes (N, 4)`` and ``image_size (2,)`` of every image.

        Returns:
            For every image, labels ``(A,)``, 1 for positive, 0 for negative and -1 for neither, and the boxes
            ``(A, 4)`` of their objects.
        """
        inside = [self._inside(anchor, target["image_size"]) for anchor, target in zip(anchors, targets, strict=True)]
        found = super().assign_targets_to_anchors([a[i] for a, i in zip(anchors, inside, strict=True)], targets)
        labels, boxes = [], []
        for anchor, index, label, box in zip(anchors, inside, *found, strict=True):
            labels.append(label.new_full((len(anchor),), -1).index_copy(0, index, label))
            boxes.append(torch.zeros_like(anchor).index_copy(0, index, box.to(anchor.dtype)))
        return labels, boxes

    def _inside(self, anchors: torch.Tensor, image_size: torch.Tensor) -> torch.Tensor:
        """Return indices of the anchors inside an image, or of all where none is."""
        border = self.allowed_border
        everything = torch.arange(len(anchors), device=anchors.device)
        if border is None or border < 0:
            return everything
        height, width = image_size.tolist()
        ends = anchors.new_tensor([width + border, height + border])
        index = torch.where(((anchors[:, :2] >= -border) & (anchors[:, 2:] < ends)).all(dim=1))[0]
        return index if len(index) else everything
