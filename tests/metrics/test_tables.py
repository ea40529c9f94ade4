"""What stands in the tables of results."""

import io

from rich.console import Console

from lk_backbones.metrics.tables import ap_table, iou_table


def test_ious_of_every_class() -> None:
    metrics = {"val/iou/road": 0.5, "val/iou/sky": float("nan"), "val/mean_iou": 0.25, "val/pixel_accuracy": 0.75}
    console = Console(file=io.StringIO(), width=60)
    console.print(iou_table(metrics, ["road", "sky"], "val"))
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]
    for expected in (["road", "50.00"], ["sky", "–"], ["mean", "IoU", "25.00"], ["pixel", "accuracy", "75.00"]):
        assert expected in lines


def test_the_twelve_numbers_and_measured_classes() -> None:
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    names += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
    metrics = {f"test/{kind}_{name}": i / 100 for kind in ("box", "mask") for i, name in enumerate(names)}
    metrics |= {"test/box_ap_large": float("nan"), "test/box_ap/road": 0.5, "test/mask_ap/road": 0.25}
    console = Console(file=io.StringIO(), width=60)
    console.print(ap_table(metrics, ["road", "sky"], "test"))
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]
    assert ["AP,", "large", "objects", "–", "5.00"] in lines
    assert ["AR,", "large", "objects", "11.00", "11.00"] in lines
    assert ["AP,", "road", "50.00", "25.00"] in lines
    assert not any("sky" in line for line in lines)
