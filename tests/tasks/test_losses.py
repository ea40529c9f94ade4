"""Losses against formulas, with ignored pixels and class weights."""

import pytest
import torch
import torch.nn.functional as F

from lk_backbones.tasks.losses import SegmentationLoss, parse_loss


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.randint(0, 4, (2, 8, 9), generator=torch.Generator().manual_seed(1))
    mask[:, :2] = 255
    return mask


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 0.0]])
def test_cross_entropy_is_torchs(logits, mask, weights) -> None:
    expected = F.cross_entropy(logits, mask, None if weights is None else torch.tensor(weights), ignore_index=255)
    torch.testing.assert_close(SegmentationLoss("ce", 4, weights)(logits, mask), expected)


@pytest.mark.parametrize("name", ["ce", "dice", "focal", "lovasz"])
def test_ignored_pixels_have_no_influence(logits, mask, name) -> None:
    loss = SegmentationLoss(name, 4)
    value = loss(logits, mask)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value > 0
    assert gradient[:, :, 2:].abs().sum() > 0
    assert gradient[:, :, :2].abs().sum() == 0
    cropped = loss(logits[:, :, 2:], mask[:, 2:])
    torch.testing.assert_close(value, cropped)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("ce", None), ("ce", [1.0, 2.0, 0.5, 1.0]), ("dice", None), ("focal", None), ("lovasz", None), ("ce+focal", None)],
)
def test_nothing_but_ignored_pixels_gives_zero_not_nan(logits, name, weights) -> None:
    value = SegmentationLoss(name, 4, weights)(logits, torch.full((2, 8, 9), 255))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value == 0
    assert not gradient.any()


def test_a_sum_is_the_sum_of_its_terms(logits, mask) -> None:
    terms = sum(SegmentationLoss(name, 4)(logits, mask) for name in ("ce", "dice", "focal", "lovasz"))
    for loss in ("ce+dice+focal+lovasz", ["lovasz", "ce", "focal", "dice"]):
        torch.testing.assert_close(SegmentationLoss(loss, 4)(logits, mask), terms)


@pytest.mark.parametrize("name", ["ce", "dice", "focal", "lovasz"])
def test_perfect_predictions_cost_nothing(mask, name) -> None:
    perfect = 100.0 * F.one_hot(mask.clamp(max=3), 4).permute(0, 3, 1, 2) - 50
    assert SegmentationLoss(name, 4)(perfect, mask) < 1e-4


def test_is_computed_in_float32(logits, mask) -> None:
    half = logits.detach().bfloat16()
    for name in ("ce", "dice", "focal", "lovasz"):
        torch.testing.assert_close(SegmentationLoss(name, 4)(half, mask), SegmentationLoss(name, 4)(half.float(), mask))


def test_no_ignore_index(logits) -> None:
    mask = torch.zeros(2, 8, 9, dtype=torch.int64)
    torch.testing.assert_close(SegmentationLoss("ce", 4, None, None)(logits, mask), F.cross_entropy(logits, mask))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cee", 4), "unknown loss 'cee', choose from ce, dice, focal, lovasz; did you mean 'ce'"),
        (("ce+ce", 4), "each only once"),
        (([], 4), "at least one loss"),
        (("ce", 4, [1.0, 2.0]), "class_weights must be 4 non-negative numbers"),
        (("ce", 2, [1.0, -2.0]), "non-negative"),
        (("dice", 2, [1.0, 2.0]), "class_weights are used by the loss 'ce' only, not by dice"),
    ],
)
def test_errors(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(*arguments)


def test_parse_loss() -> None:
    assert parse_loss("CE + dice") == ["ce", "dice"]
