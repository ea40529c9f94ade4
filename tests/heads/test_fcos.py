"""FCOS against the reference's numbers and keys, and its losses against plain loops."""

import json
import math

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from lk_backbones.heads.fcos import FCOS, FCOSHead, checkpoint_filter_fn
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
    model.load_state_dict(checkpoint_filter_fn(golden["state"], model), strict=True)

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
