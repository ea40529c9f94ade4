"""The papers' mean IoU against a confusion matrix made by hand and against torchmetrics."""

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lk_backbones.metrics.segmentation import SegmentationMetrics


def test_against_a_matrix_made_by_hand() -> None:
    # rows: truth, columns: prediction; class 3 occurs nowhere, class 2 is predicted but never true
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 255, 255]])
    prediction = torch.tensor([[0, 0, 0, 1, 1, 2, 0, 3]])
    metrics = SegmentationMetrics(4, ignore_index=255)
    metrics.update(prediction, truth)
    result = metrics.compute()
    # class 0: 3 hits, 4 true, 3 predicted -> 3/4; class 1: 1 hit, 2 true, 2 predicted -> 1/3; class 2: 0/1
    torch.testing.assert_close(result["iou"], torch.tensor([3 / 4, 1 / 3, 0.0, torch.nan]), equal_nan=True)
    assert result["mean_iou"].item() == pytest.approx((3 / 4 + 1 / 3 + 0) / 3)
    assert result["pixel_accuracy"].item() == pytest.approx(4 / 6)


@pytest.mark.parametrize("ignore_index", [255, None, 2])
def test_equals_torchmetrics_over_many_batches(ignore_index: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = SegmentationMetrics(6, ignore_index)
    jaccard = MulticlassJaccardIndex(6, average="macro", ignore_index=ignore_index)
    accuracy = MulticlassAccuracy(6, average="micro", ignore_index=ignore_index)
    for _ in range(5):
        truth = torch.randint(0, 5, (2, 20, 30), generator=generator)  # class 5 occurs nowhere
        prediction = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth, (truth + 1) % 5)
        if ignore_index == 255:
            truth[:, :3] = 255
        for metric in (ours, jaccard, accuracy):
            metric.update(prediction, truth)
    result = ours.compute()
    torch.testing.assert_close(result["mean_iou"], jaccard.compute())
    torch.testing.assert_close(result["pixel_accuracy"], accuracy.compute())
    assert result["iou"].isnan().tolist() == [i == 5 or i == ignore_index for i in range(6)]


def test_is_not_the_mean_over_pictures() -> None:
    metrics = SegmentationMetrics(2)
    metrics.update(torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 0]]))
    metrics.update(torch.tensor([[1, 1, 0, 0]]), torch.tensor([[1, 0, 0, 0]]))
    # class 0: 6 of 7, class 1: 1 of 2; the mean over pictures would be (1 + (2/3 + 1/2) / 2) / 2
    assert metrics.compute()["mean_iou"].item() == pytest.approx((6 / 7 + 1 / 2) / 2)


def test_reset_forgets_and_nothing_seen_is_nan() -> None:
    metrics = SegmentationMetrics(2)
    metrics.update(torch.tensor([[0]]), torch.tensor([[1]]))
    assert metrics.compute()["mean_iou"] == 0
    metrics.reset()
    metrics.update(torch.tensor([[1]]), torch.tensor([[1]]))
    assert metrics.compute()["mean_iou"] == 1
    metrics.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metrics.compute()["mean_iou"].isnan()
