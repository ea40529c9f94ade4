"""Memory of an evaluation at COCO's size: what stays after many pictures with masks, and the peak to the end.

Each contestant runs in a fresh process: our metrics, and torchmetrics' own, where every picture leaves tensors and
texts between the large masks that come and go::

    python benchmarks/coco_memory.py
    python benchmarks/coco_memory.py --pictures 5000 --detections 100 --only ours --compute
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torchmetrics.detection import MeanAveragePrecision

from lk_backbones.metrics.detection import DetectionMetrics
from lk_backbones.metrics.masks import encode_masks


class Plain(MeanAveragePrecision):
    """torchmetrics' own records: every box, label and text an object of its own."""

    def __init__(self) -> None:
        super().__init__(iou_type=("bbox", "segm"))

    def update(self, predictions: list[dict[str, Any]], targets: list[dict[str, Any]]) -> None:
        keys = ("boxes", "labels", "scores", "masks")
        found = [{key: prediction[key] for key in keys} for prediction in predictions]
        super().update(found, [{key: target[key] for key in ("boxes", "labels", "masks")} for target in targets])


def resident() -> float:
    """Megabytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def objects(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes and masks of ellipses in a picture of 640×480."""
    boxes = torch.rand(count, 4, generator=generator) * torch.tensor([480.0, 320, 140, 140])
    centre, radius = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:] / 2 + 2
    x = (torch.arange(640) - centre[:, :1]) / radius[:, :1]
    y = (torch.arange(480) - centre[:, 1:]) / radius[:, 1:]
    masks = ((x[:, None] ** 2 + y[:, :, None] ** 2) < 1).to(torch.uint8)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1), masks


def measure(contestant: str, pictures: int, detections: int, compute: bool) -> None:
    """Run in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    metrics: Any = DetectionMetrics(masks=True) if contestant == "ours" else Plain()
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []
    before = resident()
    for number in range(pictures):
        count = int(torch.randint(1, 14, (), generator=generator))
        boxes, masks = objects(count, generator)
        labels = torch.randint(1, 81, (count,), generator=generator)
        area = masks.sum((1, 2)).float()
        target = {"image_id": number, "boxes": boxes, "labels": labels, "masks": masks, "area": area}
        boxes, masks = objects(detections, generator) if number < 8 else drawn[number % 8]  # drawing takes the time
        if number < 8:
            drawn.append((boxes, masks))
        found = {"boxes": boxes, "labels": torch.randint(1, 81, (detections,), generator=generator)}
        found |= {"scores": torch.rand(detections, generator=generator), "masks": masks.bool()}
        metrics.update([found | {"segmentation": encode_masks(masks)}], [target])
    print(f"{contestant:6} {pictures} pictures × {detections}: {resident() - before:6.0f} MB stay", end="")
    if compute:
        metrics.compute()
        print(f", {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before:6.0f} MB at the peak", end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--detections", type=int, default=7, help="per picture")
    parser.add_argument("--compute", action="store_true", help="compute the metrics too")
    parser.add_argument("--only", choices=["ours", "plain"])
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_this_process:
        measure(arguments.only, arguments.pictures, arguments.detections, arguments.compute)
        return
    for contestant in [arguments.only] if arguments.only else ["ours", "plain"]:
        command = [sys.executable, *sys.argv, "--only", contestant, "--in-this-process"]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
