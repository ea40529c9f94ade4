"""The cascade against the reference's numbers and keys, and against torchvision where it becomes torchvision's."""

import json

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from lk_backbones.heads.cascade import CascadeRCNN, checkpoint_filter_fn
from lk_backbones.heads.pyramid import EncoderPyramid
from lk_backbones.heads.regions import paste_masks
from tests.conftest import FIXTURES, assert_golden, load_golden
from tests.heads.conftest import Maps

TOLERANCE = 1e-4  # of the largest value, as the fixtures' authors state it
PIXELS = 1e-2  # for boxes


@pytest.fixture(scope="module")
def golden():
    return load_golden("cascade_tiny")


@pytest.fixture(scope="module")
def model(golden):
    config = json.loads((FIXTURES / "cascade_tiny.json").read_text())["config"]
    encoder = Maps(config["neck"]["in_channels"], (golden["input"][str(i)] for i in range(4)))
    model = CascadeRCNN(
        EncoderPyramid(encoder, config["neck"]["out_channels"]),
        num_classes=5,
        masks=True,
        box_head_channels=16,
        box_head_fc_channels=32,
        mask_head_channels=16,
        rpn_pre_nms_top_n_test=config["test_cfg"]["rpn"]["nms_pre"],
        rpn_post_nms_top_n_test=config["test_cfg"]["rpn"]["max_per_img"],
        box_detections_per_img=config["test_cfg"]["rcnn"]["max_per_img"],
    )
    model.load_state_dict(checkpoint_filter_fn(golden["state"], model), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def features(model):
    with torch.no_grad():
        return model.backbone(torch.empty(1, 3, 128, 160))


IMAGES = ImageList(torch.empty(1, 3, 128, 160), [(120, 150)])


@torch.no_grad()
def test_pyramid_and_proposals(golden, model, features, monkeypatch):
    scores = []
    choose = model.rpn.filter_proposals

    def keep_scores(*args):
        boxes, found = choose(*args)
        scores.extend(found)
        return boxes, found

    monkeypatch.setattr(model.rpn, "filter_proposals", keep_scores)
    expected = golden["output"]
    for i, feature in enumerate(features.values()):
        assert_golden(feature, expected[f"fpn.{i}"], TOLERANCE)
    objectness, deltas = model.rpn.head(list(features.values()))
    for i in range(5):
        assert_golden(objectness[i], expected[f"rpn_objectness.{i}"], TOLERANCE)
        assert_golden(deltas[i], expected[f"rpn_deltas.{i}"], TOLERANCE)
    (proposals,), _ = model.rpn(IMAGES, features)
    assert proposals.shape == expected["proposals"].shape
    assert (proposals - expected["proposals"]).abs().max() <= PIXELS
    assert_golden(scores[0], expected["proposal_scores"], TOLERANCE)


@torch.no_grad()
def test_every_stage_on_given_regions(golden, model, features):
    expected = golden["output"]
    rois, mask_rois = golden["input"]["rois"][:, 1:], golden["input"]["mask_rois"][:, 1:]
    for i, stage in enumerate(model.roi_heads.stages):
        if i == 0:
            assert_golden(stage.box_roi_pool(features, [rois], []), expected["rois_bbox_feats"], TOLERANCE)
        logits, deltas = stage.predict(features, [rois], [])
        assert_golden(logits.roll(-1, dims=1), expected[f"rois_cls_score.{i}"], TOLERANCE)
        assert_golden(deltas[:, 4:], expected[f"rois_bbox_pred.{i}"], TOLERANCE)
        masks = stage.mask_logits(stage.mask_roi_pool(features, [mask_rois], []))
        assert_golden(masks[:, 1:], expected[f"rois_mask_logits.{i}"], TOLERANCE)


@torch.no_grad()
def test_refinement_and_averaged_scores(golden, model, features):
    expected = golden["output"]
    (boxes,), logits, deltas = model.roi_heads.cascade(features, [expected["proposals"]], [(120, 150)])
    assert (boxes - expected["refined_rois_last_stage"][:, 1:]).abs().max() <= PIXELS
    assert_golden(logits.roll(-1, dims=1), expected["avg_cls_score"], TOLERANCE)
    assert_golden(deltas[:, 4:], expected["last_bbox_pred"], TOLERANCE)


@torch.no_grad()
def test_detections_end_to_end(golden, model, features):
    expected = golden["output"]
    proposals, _ = model.rpn(IMAGES, features)
    (found,), losses = model.roi_heads(features, proposals, IMAGES.image_sizes)
    assert losses == {}
    assert torch.equal(found["labels"] - 1, expected["det_labels"])
    assert (found["boxes"] - expected["det_boxes"]).abs().max() <= PIXELS
    assert_golden(found["scores"], expected["det_scores"], TOLERANCE)
    assert_golden(found["masks"][:, 0], expected["det_mask_prob"], TOLERANCE)
    pasted = paste_masks(found["masks"][:4, 0], found["boxes"][:4], (120, 150))
    assert torch.equal(pasted >= 0.5, expected["det_masks_first4"])

    (given,) = model.transform.postprocess([found], [(120, 150)], [(240, 300)])
    assert (given["boxes"] - expected["det_boxes_rescaled"]).abs().max() <= PIXELS
    assert given["masks"].shape == (20, 1, 240, 300)
