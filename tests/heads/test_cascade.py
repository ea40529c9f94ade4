"""The cascade against the reference's numbers and keys, and against torchvision where it becomes torchvision's."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, generalized_box_iou, roi_align

from lk_backbones.heads.cascade import CascadeRCNN
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
    model.load_state_dict(model.openmmlab_state_dict(golden["state"]), strict=True)
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


def one_stage(**kwargs):
    torch.manual_seed(0)
    return CascadeRCNN(
        EncoderPyramid(Maps([8, 16, 32, 64]), 16),
        num_classes=5,
        box_head_channels=16,
        box_head_fc_channels=32,
        box_loss="smooth_l1",
        stage_iou_thresh=(0.5,),
        stage_loss_weights=(1.0,),
        stage_box_stds=((0.1, 0.1, 0.2, 0.2),),
        box_score_thresh=0.1,
        box_batch_size_per_image=64,
        roi_sampling_ratio=2,
        roi_aligned=False,
        **kwargs,
    ).roi_heads


def regions(seed=0):
    """Maps of two images of 128 x 192, proposals around their objects and elsewhere, and targets."""
    generator = torch.Generator().manual_seed(seed)
    maps = {str(i): torch.randn(2, 16, 32 >> i, 48 >> i, generator=generator) for i in range(4)}
    boxes = torch.tensor([[10.0, 12, 60, 80], [70, 20, 150, 110], [100, 5, 180, 40]])
    targets, proposals = [], []
    for image in range(2):
        truth = boxes[image:]
        masks = torch.zeros(len(truth), 128, 192, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, truth.int().tolist(), strict=True):
            mask[y0:y1, x0 : (x0 + x1) // 2] = 1
        targets.append({"boxes": truth, "labels": torch.tensor([1, 3, 5])[image:], "masks": masks})
        near = truth.repeat(40, 1) + 6 * torch.randn(40 * len(truth), 4, generator=generator)
        corner = torch.rand(80, 2, generator=generator) * torch.tensor([120.0, 60.0])
        far = torch.cat([corner, corner + 4 + 60 * torch.rand(80, 2, generator=generator)], dim=1)
        proposals.append(torch.cat([near, far]))
    return maps, proposals, [(128, 192)] * 2, targets


def test_one_stage_is_the_head_of_faster_rcnn() -> None:
    """Three stages shrunk to one give torchvision's losses, gradients and detections on the same weights."""
    ours = one_stage()
    theirs = detection.FasterRCNN(
        EncoderPyramid(Maps([8, 16, 32, 64]), 16),
        box_head=FastRCNNConvFCHead((16, 7, 7), [16] * 4, [32], nn.BatchNorm2d),
        box_predictor=FastRCNNPredictor(32, 6),
        box_score_thresh=0.1,
        box_batch_size_per_image=64,
    ).roi_heads
    for parameter in ours.parameters():  # so that scores and boxes differ from region to region
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    theirs.load_state_dict({k.removeprefix("stages.0."): v for k, v in ours.state_dict().items()}, strict=True)
    maps, proposals, shapes, targets = regions()

    gradients = []
    for heads in (ours, theirs):
        torch.manual_seed(3)
        _, losses = heads.train()(maps, list(proposals), shapes, targets)
        sum(losses.values()).backward()
        gradients.append([parameter.grad for parameter in heads.parameters()])
        values = {name.removesuffix("_stage0"): loss for name, loss in losses.items()}
        if heads is ours:
            expected = values
    torch.testing.assert_close(values, expected)
    assert values["loss_box_reg"] > 0
    torch.testing.assert_close(*gradients)

    with torch.no_grad():
        (found, _), (their_found, _) = (heads.eval()(maps, proposals, shapes) for heads in (ours, theirs))
    for one, other in zip(found, their_found, strict=True):
        assert len(one["boxes"]) > 10
        torch.testing.assert_close(one, other)


def test_losses_against_plain_loops() -> None:
    """Three stages in float64, every term written out; the sampler takes everything, so nothing is drawn."""
    torch.manual_seed(0)
    heads = (
        CascadeRCNN(
            EncoderPyramid(Maps([8, 16, 32, 64]), 16),
            num_classes=5,
            masks=True,
            box_head_channels=8,
            box_head_fc_channels=16,
            mask_head_channels=8,
            box_batch_size_per_image=4000,
            box_positive_fraction=1.0,
        )
        .roi_heads.double()
        .eval()  # batch norms keep still
    )
    for stage in heads.stages:  # deltas of some size
        nn.init.normal_(stage.box_predictor.bbox_pred.weight, std=0.3)
    maps, proposals, shapes, targets = regions()
    maps = {name: value.double() for name, value in maps.items()}
    targets = [{**t, "boxes": t["boxes"].double()} for t in targets]
    boxes = [p.double() for p in proposals]
    losses = heads.losses(maps, list(boxes), shapes, targets)
    assert set(losses) == {f"loss_{n}_stage{i}" for n in ("classifier", "box_reg", "mask") for i in range(3)}

    positives = []
    for i, (stage, weight, threshold) in enumerate(zip(heads.stages, (1, 0.5, 0.25), (0.5, 0.6, 0.7), strict=True)):
        everything = [torch.cat([b, t["boxes"]]) for b, t in zip(boxes, targets, strict=True)]
        logits, deltas = stage.predict(maps, everything, shapes)
        stds = torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]][i]).double()
        classes, giou, masks, moved, row, wanted_rois = [], [], [], [], 0, [[], []]
        for image, target in enumerate(targets):
            overlaps = box_iou(everything[image], target["boxes"])
            moved.append([])
            for k, box in enumerate(everything[image]):
                label = int(target["labels"][overlaps[k].argmax()]) if overlaps[k].max() >= threshold else 0
                classes.append(-logits[row].log_softmax(0)[label])
                chosen = label or 1 + int(logits[row, 1:].argmax())
                dx, dy, dw, dh = deltas[row, 4 * chosen : 4 * chosen + 4] * stds
                dw, dh = (d.clamp(-math.log(1000 / 16), math.log(1000 / 16)) for d in (dw, dh))
                w, h = box[2] - box[0], box[3] - box[1]
                x, y = box[0] + w / 2 + dx * w, box[1] + h / 2 + dy * h
                new = torch.stack(
                    [x - w * dw.exp() / 2, y - h * dh.exp() / 2, x + w * dw.exp() / 2, y + h * dh.exp() / 2]
                )
                if label:
                    truth = target["boxes"][overlaps[k].argmax()]
                    giou.append(1 - generalized_box_iou(new[None], truth[None])[0, 0])
                    wanted_rois[image].append((box, label, target["masks"][overlaps[k].argmax()]))
                if k < len(boxes[image]):
                    moved[-1].append(new.detach().clamp(min=0).minimum(torch.tensor([192.0, 128, 192, 128])))
                row += 1
        for image, entries in enumerate(wanted_rois):
            for box, label, mask in entries:
                feature = {name: value[image : image + 1] for name, value in maps.items()}
                predicted = stage.mask_logits(stage.mask_roi_pool(feature, [box[None]], shapes))[0, label]
                cut = roi_align(mask[None, None].double(), [box[None]], 28, sampling_ratio=0, aligned=True)[0, 0]
                masks.append(F.binary_cross_entropy(predicted.sigmoid(), (cut >= 0.5).double()))
        positives.append(len(giou))
        assert_same(losses[f"loss_classifier_stage{i}"], weight * sum(classes) / row)
        assert_same(losses[f"loss_box_reg_stage{i}"], weight * 10 * sum(giou) / row)
        assert_same(losses[f"loss_mask_stage{i}"], weight * sum(masks) / len(masks))
        boxes = [torch.stack(part) for part in moved]
    assert positives[0] > 50
    assert positives[2] > 5


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_class_agnostic_boxes() -> None:
    heads = one_stage(class_agnostic=True)
    (stage,) = heads.stages
    assert stage.box_predictor.bbox_pred.weight.shape == (4, 32)
    maps, proposals, shapes, targets = regions()
    _, deltas = stage.predict(maps, proposals, shapes)
    assert torch.equal(deltas, deltas[:, :4].repeat(1, 6))
    _, losses = heads.train()(maps, proposals, shapes, targets)
    losses["loss_box_reg_stage0"].backward()
    assert stage.box_predictor.bbox_pred.weight.grad.abs().sum() > 0


def test_no_proposal_at_all() -> None:
    model = CascadeRCNN(EncoderPyramid(Maps([8, 16, 32, 64]), 16), 5, masks=True).roi_heads
    maps, _, shapes, targets = regions()
    nothing = [torch.zeros(0, 4)] * 2
    empty = [{key: value[:0] for key, value in target.items()} for target in targets]
    losses = model.losses(maps, nothing, shapes, empty)
    sum(losses.values()).backward()
    assert all(loss == 0 for loss in losses.values())
    assert all(parameter.grad is not None for parameter in model.parameters())
    for found in model.eval().detect(maps, nothing, shapes):
        assert found["boxes"].shape == (0, 4)
        assert found["masks"].shape == (0, 1, 28, 28)


# --- region proposals -------------------------------------------------------------------------------------------------


def test_anchors_are_labelled_as_published() -> None:
    """Against plain loops over random anchors: borders, thresholds, and an object's best anchors."""
    model = CascadeRCNN(EncoderPyramid(Maps([8, 16, 32, 64]), 16), 5).rpn
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(400, 2, generator=generator) * 120 - 10
    anchors = torch.cat([corner, corner + 5 + 50 * torch.rand(400, 2, generator=generator)], dim=1)
    # the last object is too small for any anchor, the one before has a best anchor below 0.7 only
    truth = torch.tensor([[20.0, 20, 60, 60], [22.0, 24, 60, 62], [70, 10, 84, 90], [50, 50, 51, 51]])
    anchors[:20] = truth[:2].repeat(10, 1) + 3 * torch.randn(20, 4, generator=generator)
    inside = (anchors >= 0).all(1) & (anchors[:, 2] < 120) & (anchors[:, 3] < 100)
    overlaps = box_iou(anchors, truth)
    overlaps[~inside] = -1
    labels = torch.full((400,), -1.0)
    matched = torch.zeros(400, 4)
    for i in range(400):
        if inside[i]:
            best = overlaps[i].max()
            labels[i] = 1 if best >= 0.7 else 0 if best < 0.3 else -1
            matched[i] = truth[overlaps[i].argmax()]
    for k in range(4):
        if overlaps[:, k].max() >= 0.3:
            chosen = overlaps[:, k] == overlaps[:, k].max()
            labels[chosen], matched[chosen] = 1, truth[k]
    assert labels.eq(1).sum() > 10
    assert overlaps[:, 3].max() < 0.3 <= overlaps[:, 2].max() < 0.7

    target = {"boxes": truth, "image_size": torch.tensor([100, 120])}
    (found,), (boxes,) = model.assign_targets_to_anchors([anchors], [target])
    assert torch.equal(found, labels)
    assert torch.equal(boxes[found == 1], matched[found == 1])

    model.allowed_border = None
    (found,), _ = model.assign_targets_to_anchors([anchors], [target])
    assert (found[~inside] == 0).any()
    model.allowed_border = 0
    (found,), _ = model.assign_targets_to_anchors([anchors], [{**target, "image_size": torch.tensor([5, 5])}])
    assert (found == 1).any()  # no anchor is inside, so all take part
