"""How much memory stays after many pictures with masks went through the metrics; a script, for a fresh process."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lk_backbones.metrics.detection import DetectionMetrics
from lk_backbones.metrics.masks import encode_masks


def resident() -> int:
    """Megabytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20


def picture(number: int, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """A picture of 640×480 with one to 13 ellipses, and detections that equal them."""
    count = int(torch.randint(1, 14, (), generator=generator))
    boxes = torch.rand(count, 4, generator=generator) * torch.tensor([480.0, 320, 140, 140])
    centre, radius = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:] / 2 + 2
    x = (torch.arange(640) - centre[:, :1]) / radius[:, :1]
    y = (torch.arange(480) - centre[:, 1:]) / radius[:, 1:]
    masks = ((x[:, None] ** 2 + y[:, :, None] ** 2) < 1).to(torch.uint8)
    labels = torch.ones(count, dtype=torch.int64)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    target = {"image_id": number, "boxes": corners, "labels": labels, "masks": masks, "area": masks.sum((1, 2))}
    found = {"boxes": corners, "labels": labels, "scores": torch.rand(count, generator=generator)}
    return found | {"segmentation": encode_masks(masks)}, target


def main(pictures: int) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    metrics = DetectionMetrics(masks=True)
    prediction, target = picture(0, generator)
    metrics.update([prediction], [target])
    metrics.reset()
    before = resident()
    for number in range(pictures):
        prediction, target = picture(number, generator)
        metrics.update([prediction], [target])
    del prediction, target
    print(resident() - before)


if __name__ == "__main__":
    main(int(sys.argv[1]))
