"""FCOS against the reference's numbers and keys, and its losses against plain loops."""

import json
import math

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from lk_backbones.heads.fcos import FCOS
from lk_backbones.heads.pyramid import EncoderPyramid
from tests.conftest import FIXTURES, assert_golden, load_golden
from tests.heads.conftest import Maps

TOLERANCE = 1e-4  # of the largest value, as the fixtures' authors state it
PIXELS = 1e-2  # for boxes


def build(num_classes=5, maps=(), **kwargs) -> FCOS:
    backbone = EncoderPyramid(Maps([8, 16, 32, 64], maps), 16, dense=True)
    return FCOS(backbone, num_classes, head_channels=64, head_convs=2, **kwargs)


@torch.no_grad()
def test_same_numbers_as_the_reference() -> None:
    golden = load_golden("fcos_tiny")
    test = json.loads((FIXTURES / "fcos_tiny.json").read_text())["config"]["test_cfg"]
    expected = golden["output"]
    model = build(
        maps=[golden["input"][str(i)] for i in range(4)],
        score_thresh=test["score_thr"],
        nms_thresh=test["nms"]["iou_threshold"],
        topk_candidates=test["nms_pre"],
        detections_per_img=test["max_per_img"],
    ).eval()
    model.load_state_dict(model.openmmlab_state_dict(golden["state"]), strict=True)

    features = list(model.backbone(torch.empty(1, 3, 128, 160)).values())
    for i, feature in enumerate(features):
        assert_golden(feature, expected[f"fpn.{i}"], TOLERANCE)
    sizes = [feature[0, 0].numel() for feature in features]
    outputs = {name: value.split(sizes, dim=1) for name, value in model.head(features).items()}
    (anchors,) = model.anchor_generator(ImageList(torch.empty(1, 3, 128, 160), [(120, 150)]), features)
    anchors = anchors.split(sizes)
    for name, theirs in (
        ("cls_logits", "cls_logits"),
        ("bbox_regression", "bbox_distances"),
        ("bbox_ctrness", "centerness_logits"),
    ):
        for i, value in enumerate(outputs[name]):
            assert_golden(value, expected[f"{theirs}.{i}"].flatten(2).mT, TOLERANCE)
    for i, anchor in enumerate(anchors):
        assert torch.equal((anchor[:, :2] + anchor[:, 2:]) / 2, expected[f"points.{i}"])

    (found,) = model.postprocess_detections(outputs, [anchors], [(120, 150)])
    assert torch.equal(found["labels"], expected["det_labels"])
    assert (found["boxes"] - expected["det_boxes"]).abs().max() <= PIXELS
    assert_golden(found["scores"], expected["det_scores"], TOLERANCE)
    (found,) = model.transform.postprocess([found], [(120, 150)], [(240, 300)])
    assert (found["boxes"] - expected["det_boxes_rescaled"]).abs().max() <= PIXELS


SIZE = (128, 160)


def dense_case(seed=0, **kwargs):
    """A model in float64, random outputs for two images, points, and objects of every size range."""
    torch.manual_seed(seed)
    model = build(**kwargs)
    grids = [(math.ceil(SIZE[0] / s), math.ceil(SIZE[1] / s)) for s in model.backbone.strides]
    count = sum(h * w for h, w in grids)
    outputs = {
        "cls_logits": torch.randn(2, count, 5).double().requires_grad_(),
        "bbox_regression": (40 * torch.rand(2, count, 4).double()).requires_grad_(),
        "bbox_ctrness": torch.randn(2, count, 1).double().requires_grad_(),
    }
    images = ImageList(torch.empty(2, 3, *SIZE), [SIZE] * 2)
    anchors = model.anchor_generator(images, [torch.empty(1, 1, h, w) for h, w in grids])
    targets = [
        {
            # whole pixels, so that a furthest edge may be exactly 64 away; the last box lies inside the second
            "boxes": torch.tensor([[4.0, 8, 40, 60], [20, 20, 160, 120], [30, 40, 140, 110]]).double(),
            "labels": torch.tensor([0, 2, 4]),
        },
        {"boxes": torch.tensor([[1.0, 2, 30, 20]]).double(), "labels": torch.tensor([3])},
    ]
    return model, outputs, [a.double() for a in anchors], targets, grids


@pytest.mark.parametrize("radius", [None, 1.5])
def test_losses_against_plain_loops(radius) -> None:
    model, outputs, anchors, targets, grids = dense_case(center_sampling_radius=radius)
    losses = model.compute_loss(targets, outputs, anchors, [h * w for h, w in grids])

    ranges = [(0, 64), (64, 128), (128, 256), (256, 512), (512, math.inf)]
    focal, boxes, centers, weights, count, at_border = 0.0, 0.0, 0.0, 0.0, 0, 0
    for image, target in enumerate(targets):
        position = 0
        for (height, width), stride, (low, high) in zip(grids, model.backbone.strides, ranges, strict=True):
            for y, x in ((y, x) for y in range(height) for x in range(width)):
                px, py = (x + 0.5) * stride, (y + 0.5) * stride
                best = None
                for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
                    edges = (px - box[0], py - box[1], box[2] - px, box[3] - py)
                    if min(edges) <= 0 or not low <= max(edges) <= high:
                        continue
                    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
                    if radius and max(abs(px - centre[0]), abs(py - centre[1])) >= radius * stride:
                        continue
                    at_border += max(edges) == high
                    area = (box[2] - box[0]) * (box[3] - box[1])
                    if best is None or area < best[0]:
                        best = area, label, torch.tensor(edges).double()
                for k in range(5):
                    p = outputs["cls_logits"][image, position, k].sigmoid()
                    hit = best is not None and best[1] == k
                    focal += -0.25 * (1 - p) ** 2 * p.log() if hit else -0.75 * p**2 * (1 - p).log()
                if best is not None:
                    truth, found = best[2], outputs["bbox_regression"][image, position]
                    inner = torch.minimum(truth, found)
                    overlap = (inner[0] + inner[2]) * (inner[1] + inner[3])
                    areas = [(side[0] + side[2]) * (side[1] + side[3]) for side in (truth, found)]
                    union = areas[0] + areas[1] - overlap
                    across, down = truth[0::2], truth[1::2]
                    center = (across.min() / across.max() * down.min() / down.max()).sqrt()
                    predicted = outputs["bbox_ctrness"][image, position, 0].sigmoid()
                    boxes += -center * (overlap / union).log()
                    centers += -center * predicted.log() - (1 - center) * (1 - predicted).log()
                    weights += center
                    count += 1
                position += 1
    assert count > 10
    torch.testing.assert_close(losses["classification"], focal / count, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses["bbox_regression"], boxes / weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses["bbox_ctrness"], centers / count, rtol=1e-6, atol=0)
    if radius is None:
        assert at_border > 0  # both maps of a border case take part
