"""Anchors, RoIAlign, box coding, pasting and losses against the reference's numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

from lk_backbones.heads.fcos import iou_loss
from lk_backbones.heads.regions import BoxCoder, PyramidAnchorGenerator, PyramidRoIAlign, paste_masks
from tests.conftest import assert_golden, load_golden

TOLERANCE = 1e-5  # of the largest value, as the fixtures' authors state it
STRIDES = (4, 8, 16, 32, 64)


@pytest.fixture(scope="module")
def golden():
    return load_golden("detection_ops")


def test_levels_and_aligned_pooling(golden) -> None:
    features = {str(i): golden["input"][f"feat.{i}"] for i in range(4)}
    boxes = golden["input"]["rois"][:, 1:]
    for size in (7, 14):
        pool = PyramidRoIAlign(STRIDES[:4], size)
        assert torch.equal(pool.levels(boxes), golden["output"]["roi_levels"])
        assert_golden(pool(features, [boxes], []), golden["output"][f"roi_align_{size}"], TOLERANCE)
    for i in range(4):
        single = PyramidRoIAlign(STRIDES[i : i + 1], 7)
        expected = golden["output"][f"roi_align_7_level{i}_all_rois"]
        assert_golden(single({"0": features[str(i)][:, :1]}, [boxes], []), expected, TOLERANCE)


@pytest.mark.parametrize(
    ("name", "stds"),
    [
        ("rpn", (1, 1, 1, 1)),
        ("stage0", (0.1, 0.1, 0.2, 0.2)),
        ("stage1", (0.05, 0.05, 0.1, 0.1)),
        ("stage2", (0.033, 0.033, 0.067, 0.067)),
    ],
)
def test_box_coder(golden, name, stds) -> None:
    coder = BoxCoder([1 / std for std in stds])
    priors, deltas, truth = (golden["input"][f"coder_{key}"] for key in ("priors", "deltas", "gt"))
    decoded = coder.decode_single(deltas, priors)
    assert_golden(decoded, golden["output"][f"coder_decode_{name}"], TOLERANCE)
    clipped = clip_boxes_to_image(decoded, (120, 150))
    assert_golden(clipped, golden["output"][f"coder_decode_clipped_{name}"], TOLERANCE)
    assert_golden(coder.encode_single(truth, priors), golden["output"][f"coder_encode_{name}"], TOLERANCE)
    # several classes at once, as the box predictor gives them
    both = coder.decode_single(torch.cat([deltas, -deltas], dim=1), priors)
    torch.testing.assert_close(both[:, :4], decoded)
    torch.testing.assert_close(both[:, 4:], coder.decode_single(-deltas, priors))


def test_anchors(golden) -> None:
    generator = PyramidAnchorGenerator(STRIDES, [(8 * s,) for s in STRIDES], (0.5, 1.0, 2.0), rounded=False)
    for i, anchors in enumerate(generator.cell_anchors):
        assert_golden(anchors, golden["output"][f"base_anchors.{i}"], TOLERANCE)
    maps = [torch.empty(1, 1, math.ceil(128 / s), math.ceil(160 / s)) for s in STRIDES]
    (anchors,) = generator(ImageList(torch.empty(1, 3, 128, 160), [(120, 150)]), maps)
    levels = anchors.split([3 * m.numel() for m in maps])
    for i in range(1, 5):
        assert_golden(levels[i], golden["output"][f"grid_anchors.{i}"], TOLERANCE)
    ends = torch.cat([levels[0][:300], levels[0][-300:]])
    assert_golden(ends, golden["output"]["grid_anchors_level0_first_and_last_300"], TOLERANCE)


def test_anchors_are_exact_in_half_precision_and_after_rounding_up() -> None:
    generator = PyramidAnchorGenerator(STRIDES, [(8 * s,) for s in STRIDES], (0.5, 1.0, 2.0))
    sizes = [(math.ceil(1056 / s), math.ceil(32 / s)) for s in STRIDES]  # stride 64 rounds up both
    image = ImageList(torch.empty(1, 3, 1056, 32), [(1056, 32)])
    (anchors,) = generator(image, [torch.empty(1, 1, *size, dtype=torch.bfloat16) for size in sizes])
    assert anchors.dtype == torch.float32
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert torch.equal(centres.amax(0), torch.tensor([28.0, 1052.0]))
    assert torch.equal(centres[-3:], torch.tensor([[0.0, 1024.0]]).expand(3, 2))
    assert torch.equal(anchors, anchors.round())


def test_non_maximum_suppression(golden) -> None:
    boxes, scores, classes = (golden["input"][f"nms_{key}"] for key in ("boxes", "scores", "idxs"))
    for threshold in (5, 7):
        keep = batched_nms(boxes, scores, classes, threshold / 10)
        assert torch.equal(keep, golden["output"][f"nms_keep_{threshold}"])


def test_paste_masks(golden) -> None:
    pasted = paste_masks(golden["input"]["paste_probs"], golden["input"]["paste_boxes"], (120, 150))
    assert_golden(pasted[:3], golden["output"]["paste_soft_first3"], TOLERANCE)
    assert torch.equal(pasted >= 0.5, golden["output"]["paste_bool"])


def test_losses(golden) -> None:
    predicted, target = golden["input"]["loss_boxes_pred"], golden["input"]["loss_boxes_target"]
    assert_golden(generalized_box_iou_loss(predicted, target), golden["output"]["giou_loss_none"], TOLERANCE)
    signs = torch.tensor([-1, -1, 1, 1])  # distances from the origin
    assert_golden(iou_loss(predicted * signs, target * signs), golden["output"]["iou_loss_none"], TOLERANCE)
    # the fixture's deltas are the boxes in units of 20 pixels
    smooth = F.smooth_l1_loss(predicted / 20, target / 20, reduction="none", beta=1 / 9)
    assert_golden(smooth, golden["output"]["smooth_l1_beta_1_9_none"], TOLERANCE)
    logits, labels = golden["input"]["focal_logits"], golden["input"]["focal_labels"]
    one_hot = F.one_hot(labels, 6)[:, :5].float()
    assert_golden(sigmoid_focal_loss(logits, one_hot), golden["output"]["focal_loss_none"], TOLERANCE)
