"""What torchvision's detection parts lack to give the published numbers: anchors, RoIAlign, box coding, pasted masks.

Each class is torchvision's with a few lines changed, so it fits wherever torchvision asks for one. The reference is
OpenMMLab's detection library, whose configurations the published large-kernel detectors were trained with.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align

from lk_backbones._private import torchvision as _private
from lk_backbones._private.torchvision import skips_resize
from lk_backbones.heads.protocol import to_full_precision

__all__ = [
    "BoxCoder",
    "PictureTransform",
    "PyramidAnchorGenerator",
    "PyramidRoIAlign",
    "SmoothMaskTransform",
    "paste_masks",
]


class PyramidAnchorGenerator(AnchorGenerator):
    """Anchors on a grid with known strides.

    torchvision divides image size by map size instead, which is off wherever a map's size was rounded up (a 96 pixel
    image has a map of stride 64 with two rows, hence "stride" 48).

    Args:
        strides: Stride of every map.
        sizes: Square roots of the anchors' areas in pixels, one tuple per map.
        aspect_ratios: Height / width of the anchors, the same on every map.
        offset: Where in its cell an anchor is centred, as a part of the stride: 0 for the corner (torchvision,
            OpenMMLab's anchors), 0.5 for the middle (FCOS).
        rounded: Whether the edges of an anchor around the origin are rounded to whole pixels, as torchvision does and
            OpenMMLab does not.
    """

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        offset: float = 0.0,
        rounded: bool = True,
    ) -> None:
        if len(sizes) != len(strides):
            raise ValueError(f"anchor sizes are needed for {len(strides)} maps (strides {tuple(strides)}), got {sizes}")
        self.rounded = rounded
        super().__init__(tuple(tuple(s) for s in sizes), (tuple(aspect_ratios),) * len(sizes))
        self.strides = tuple(strides)
        self.offset = offset

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Anchors around the origin, shape ``(len(aspect_ratios) * len(scales), 4)`` in xyxy pixels."""
        areas = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths = (areas[None] / roots[:, None]).flatten()
        heights = (areas[None] * roots[:, None]).flatten()
        anchors = torch.stack([-widths, -heights, widths, heights], dim=1) / 2
        return anchors.round() if self.rounded else anchors

    def forward(self, image_list: ImageList, feature_maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Anchors of every image, the same for all: ``(A, 4)`` in xyxy pixels, by map, row, column, aspect ratio, size.

        They are float32 under autocast too, where the maps are not.
        """
        like = to_full_precision(feature_maps[0].new_empty(0))
        self.set_cell_anchors(like.dtype, like.device)
        steps = [[like.new_full((), stride, dtype=torch.int64)] * 2 for stride in self.strides]
        grids = self.grid_anchors([list(feature.shape[-2:]) for feature in feature_maps], steps)
        shifted = [grid + stride * self.offset for grid, stride in zip(grids, self.strides, strict=True)]
        return [torch.cat(shifted)] * len(image_list.image_sizes)


class PyramidRoIAlign(MultiScaleRoIAlign):
    """RoIAlign from the map whose stride suits a region's size, with known strides.

    torchvision guesses the strides from the first batch it sees, and wrongly where the padding is large beside the
    image; and it has no aligned mode.

    Args:
        strides: Strides of the maps to pool from, finest first; the first maps of the pyramid are meant.
        output_size: Height and width of what a region becomes.
        sampling_ratio: Samples per bin and axis; 0 for as many as the region has pixels in a bin (published models).
        aligned: Whether pixel centres lie at half pixels (published models), instead of at whole ones (torchvision).
    """

    def __init__(self, strides: Sequence[int], output_size: int, sampling_ratio: int = 0, aligned: bool = True) -> None:
        super().__init__([str(i) for i in range(len(strides))], output_size, sampling_ratio)
        self.strides = tuple(strides)
        self.aligned = aligned

    def levels(self, boxes: torch.Tensor) -> torch.Tensor:
        """Index of the map for every box ``(N, 4)``: a box of 112 x 112 pixels uses the second (FPN paper, eq. 1)."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        return torch.log2(sides / 56 + 1e-6).floor().clamp(0, len(self.strides) - 1).long()

    def forward(
        self, x: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """Pool regions.

        Args:
            x: Maps of the pyramid, by name.
            boxes: Regions of every image, ``(N_i, 4)`` in xyxy pixels of the network's input.
            image_shapes: Not used; part of torchvision's protocol.

        Returns:
            ``(sum of N_i, C, output_size, output_size)``.
        """
        maps = [x[name] for name in self.featmap_names]
        regions = torch.cat([F.pad(b, (1, 0), value=float(i)) for i, b in enumerate(boxes)])
        levels = self.levels(regions[:, 1:])
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (feature, stride) in enumerate(zip(maps, self.strides, strict=True)):
            index = torch.where(levels == level)[0]
            # an empty selection too, so that every map stays in the graph
            result = roi_align(
                to_full_precision(feature),
                regions[index],
                self.output_size,
                1 / stride,
                self.sampling_ratio,
                aligned=self.aligned,
            )
            pooled[index] = result.to(pooled.dtype)
        return pooled


class BoxCoder(_private.BoxCoder):
    """torchvision's box coder, clipping the logarithmic size changes on both sides to a factor of 1000 / 16.

    Args:
        weights: Reciprocals of the deviations of ``(dx, dy, dw, dh)``.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__(tuple(weights), math.log(1000 / 16))

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Move boxes ``(N, 4)`` in xyxy by codes ``(N, 4 K)``; returns ``(N, 4 K)`` in xyxy."""
        centre, size = rel_codes.unflatten(-1, (rel_codes.shape[-1] // 4, 4)).split(2, dim=-1)
        size = size.maximum(-self.bbox_xform_clip * size.new_tensor(self.weights[2:]))
        return super().decode_single(torch.cat([centre, size], dim=-1).flatten(-2), boxes)


class PictureTransform(GeneralizedRCNNTransform):
    """torchvision's pre- and post-processing, for pictures of any shape.

    torchvision rounds the short side of a very long picture down to no pixel at all, and fails.
    """

    @classmethod
    def like(cls, other: GeneralizedRCNNTransform) -> "PictureTransform":
        """Make a transform with the settings of another."""
        return cls(
            other.min_size,
            other.max_size,
            other.image_mean,
            other.image_std,
            other.size_divisible,
            other.fixed_size,
            **skips_resize(other),
        )

    def resize(
        self, image: torch.Tensor, target: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """Resize an image ``(C, H, W)``, as torchvision does, but to one pixel at least."""
        height, width = image.shape[-2:]
        if not self.training and self.fixed_size is None and not torch.jit.is_tracing():
            scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
            if min(height, width) * scale < 1:
                size = (max(int(height * scale), 1), max(int(width * scale), 1))
                return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0], target
        return super().resize(image, target)


class SmoothMaskTransform(PictureTransform):
    """torchvision's pre- and post-processing, pasting masks at their exact place.

    torchvision rounds a mask's box to whole pixels first.
    """

    def postprocess(
        self,
        result: list[dict[str, torch.Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, torch.Tensor]]:
        """Bring detections from the network's input to the size of the given images.

        Args:
            result: Detections with ``boxes (N, 4)`` and, if there are masks, ``masks (N, 1, M, M)`` in [0, 1].
            image_shapes: Sizes in the network's input, without padding.
            original_image_sizes: Sizes of the given images.

        Returns:
            The same with scaled boxes and ``masks (N, 1, H, W)``.
        """
        if self.training:
            return result
        masks = [detection.pop("masks", None) for detection in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for detection, mask, size in zip(result, masks, original_image_sizes, strict=True):
            if mask is not None:
                detection["masks"] = paste_masks(mask[:, 0], detection["boxes"], size)[:, None]
        return result


def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Stretch masks over their boxes, with bilinear interpolation between the centres of the pixels.

    Args:
        masks: Probabilities ``(N, M, M)``.
        boxes: ``(N, 4)`` in xyxy pixels.
        size: Height and width of the image.

    Returns:
        ``(N, height, width)``, 0 outside of the boxes.
    """
    height, width = size
    pasted = masks.new_zeros(len(masks), height, width)
    for i, (mask, (x0, y0, x1, y1)) in enumerate(zip(masks, boxes.tolist(), strict=True)):
        if x1 <= x0 or y1 <= y0:
            continue
        # half a pixel of the mask beyond its box it has faded to 0; nothing is computed further out
        across, down = (x1 - x0) / masks.shape[-1], (y1 - y0) / masks.shape[-2]
        left, right = max(math.floor(x0 - across), 0), min(math.ceil(x1 + across), width)
        top, bottom = max(math.floor(y0 - down), 0), min(math.ceil(y1 + down), height)
        if right <= left or bottom <= top:
            continue
        x = (torch.arange(left, right, device=mask.device, dtype=mask.dtype) + 0.5 - x0) / (x1 - x0) * 2 - 1
        y = (torch.arange(top, bottom, device=mask.device, dtype=mask.dtype) + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        pasted[i, top:bottom, left:right] = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
    return pasted
