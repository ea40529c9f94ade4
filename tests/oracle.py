"""A detector that knows the answers and spoils them a little, so that metrics have something to measure.

Run as a script (see test_distributed.py) it validates in two processes and writes what the trainer logged.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lk_backbones.data import CocoDataModule
from lk_backbones.tasks import CocoResults, DetectionTask
from tests.blocks import trainer

# Pictures of the second of two processes, in which it is to see nothing.
SILENT = (11, 13, 15, 17)
ANCHORS = {"anchor_sizes": [[8], [16], [32], [64], [128]]}
SMALL_BOX = {**ANCHORS, "fpn_channels": 16, "box_head_fc_channels": 32, "rpn_post_nms_top_n_train": 100}
SMALL_DENSE: dict[str, Any] = {"fpn_channels": 32}
SMALL: dict[str, dict[str, Any]] = {
    "faster_rcnn": SMALL_BOX,
    "mask_rcnn": {**SMALL_BOX, "mask_head_channels": 16},
    "cascade_rcnn": {**SMALL_BOX, "box_head_channels": 16, "rpn_allowed_border": None},
    "cascade_mask_rcnn": {
        **SMALL_BOX,
        "box_head_channels": 16,
        "mask_head_channels": 16,
        "rpn_allowed_border": None,
    },
    "fcos": {**SMALL_DENSE, "head_channels": 64, "head_convs": 1},
    "retinanet": SMALL_DENSE,
}


def make(architecture: str = "faster_rcnn", **kwargs: Any) -> DetectionTask:
    """A detector small enough for tests."""
    defaults: dict[str, Any] = {
        "encoder": "replknet_31n",
        "encoder_kwargs": {"kernel_sizes": 3, "depths": [1, 1, 1, 1]},
        "architecture_kwargs": SMALL[architecture],
        "num_classes": 5,
        "min_size": 64,
        "max_size": 96,
        "lr": 1e-3,
    }
    return DetectionTask(architecture, **(defaults | kwargs))


class Oracle(nn.Module):
    """Knows images by their pixels.

    It shifts boxes and masks, mistakes some labels, invents some objects, and leaves out others, all drawn from the
    image's id. Scores are few, so that many are equal.

    Args:
        samples: Pairs of image and target.
        num_classes: Number of classes.
        silent: Ids of the images in which it sees nothing.
        needs_masks: Whether it predicts masks.
    """

    def __init__(
        self,
        samples: Iterable[tuple[torch.Tensor, dict[str, Any]]],
        num_classes: int,
        silent: Iterable[int] = (),
        needs_masks: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.needs_masks = needs_masks
        self.answers = {
            self.key(image): self.answer(image, target, target["image_id"] in set(silent)) for image, target in samples
        }

    @staticmethod
    def key(image: torch.Tensor) -> tuple[Any, ...]:
        return (*image.shape, image.double().sum().item())

    def answer(self, image: torch.Tensor, target: dict[str, Any], silent: bool) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(target["image_id"])
        height, width = image.shape[1:]
        kept = torch.rand(len(target["labels"]), generator=generator) < (0.0 if silent else 0.9)
        boxes, labels, masks = target["boxes"][kept], target["labels"][kept].clone(), target["masks"][kept].float()
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        boxes = boxes + sides * 0.04 * torch.randn(boxes.shape, generator=generator)
        if not silent:  # something that is not there, also in images without an object
            boxes = torch.cat([boxes, torch.tensor([[1.0, 1.0, width / 3, height / 2]])])
            labels = torch.cat([labels, torch.tensor([1])])
            masks = torch.cat([masks, torch.zeros(1, height, width)])
            masks[-1, : height // 2, : width // 3] = 1
        masks = masks.roll(1, dims=2)
        mistaken = torch.rand(len(labels), generator=generator) < 0.1
        labels[mistaken] = labels[mistaken] % self.num_classes + 1
        scores = torch.randint(3, 10, (len(labels),), generator=generator) / 10
        order = scores.argsort(descending=True)
        found = {"boxes": boxes[order], "labels": labels[order], "scores": scores[order]}
        return found | ({"masks": masks[order][:, None]} if self.needs_masks else {})

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [self.answers[self.key(image)] for image in images]


def oracle_task(data: CocoDataModule, silent: Iterable[int] = (), **kwargs: Any) -> DetectionTask:
    """A task whose network is an oracle for the validation pictures."""
    data.setup("validate")
    task = make("mask_rcnn", num_classes=data.num_classes, **kwargs)
    dataset = data.dataset("val")
    task.model = Oracle((dataset[i] for i in range(len(dataset))), data.num_classes, silent)
    task.setup = lambda stage: None  # type: ignore[method-assign] # which looks for an encoder
    task.hparams["category_ids"] = data.category_ids
    return task


def main(root: Path, out: Path) -> None:
    data = CocoDataModule(str(root), num_workers=0)
    validator = trainer(out, strategy="ddp", devices=2, callbacks=[CocoResults(str(out))])
    validator.validate(oracle_task(data, silent=SILENT), datamodule=data, verbose=False)
    if validator.is_global_zero:
        metrics = {key: value.item() for key, value in validator.callback_metrics.items()}
        (out / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
