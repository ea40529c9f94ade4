"""Results as tables in the terminal."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from lk_backbones._printing import printable

__all__ = ["accuracy_table", "ap_table", "iou_table"]

_TITLES = {"val": "Validation", "test": "Test"}
# COCO's twelve numbers, as its own summary names them
_COCO_ROWS = (
    ("ap", "AP, IoU 50 to 95 %"),
    ("ap50", "AP, IoU 50 %"),
    ("ap75", "AP, IoU 75 %"),
    ("ap_small", "AP, small objects"),
    ("ap_medium", "AP, medium objects"),
    ("ap_large", "AP, large objects"),
    ("ar1", "AR, 1 detection"),
    ("ar10", "AR, 10 detections"),
    ("ar100", "AR, 100 detections"),
    ("ar_small", "AR, small objects"),
    ("ar_medium", "AR, medium objects"),
    ("ar_large", "AR, large objects"),
)


def iou_table(metrics: Mapping[str, Any], class_names: list[str], stage: str) -> Table:
    """Make the table of a segmentation.

    Args:
        metrics: ``trainer.callback_metrics``.
        class_names: Names of the classes.
        stage: ``"val"`` or ``"test"``.

    Returns:
        A table; classes that occur nowhere show a dash.
    """
    table = Table(title=_TITLES[stage], show_footer=True)
    table.add_column("class", footer="mean IoU\npixel accuracy")
    footer = "\n".join(_percent(metrics[f"{stage}/{key}"]) for key in ("mean_iou", "pixel_accuracy"))
    table.add_column("IoU %", justify="right", footer=footer)
    for name in class_names:
        table.add_row(Text(printable(name)), _percent(metrics[f"{stage}/iou/{name}"]))
    return table


def ap_table(metrics: Mapping[str, Any], class_names: list[str], stage: str) -> Table:
    """Make the table of a detection.

    Args:
        metrics: ``trainer.callback_metrics``.
        class_names: Names of the classes.
        stage: ``"val"`` or ``"test"``.

    Returns:
        A table; what was not there to be measured shows a dash.
    """
    kinds = [kind for kind in ("box", "mask") if f"{stage}/{kind}_ap" in metrics]
    table = Table(title=_TITLES[stage])
    table.add_column("%")
    for kind in kinds:
        table.add_column({"box": "boxes", "mask": "masks"}[kind], justify="right")
    for key, title in _COCO_ROWS:
        table.add_row(
            title, *(_percent(metrics[f"{stage}/{kind}_{key}"]) for kind in kinds), end_section=key == "ar_large"
        )
    for name in class_names:
        if f"{stage}/box_ap/{name}" in metrics:
            values = (_percent(metrics[f"{stage}/{kind}_ap/{name}"]) for kind in kinds)
            table.add_row(Text(printable(f"AP, {name}")), *values)
    return table


def accuracy_table(metrics: Mapping[str, Any], class_names: list[str], stage: str) -> Table:
    """Make the table of a classification.

    Args:
        metrics: ``trainer.callback_metrics``.
        class_names: Names of the classes.
        stage: ``"val"`` or ``"test"``.

    Returns:
        A table; of the classes if they were logged, of which those without pictures show a dash.
    """
    table = Table(title=_TITLES[stage])
    table.add_column("accuracy")
    table.add_column("%", justify="right")
    for name in class_names:
        if f"{stage}/accuracy/{name}" in metrics:
            table.add_row(Text(printable(name)), _percent(metrics[f"{stage}/accuracy/{name}"]))
    table.add_section()
    for key, title in (("top1", "top-1"), ("top5", "top-5")):
        if f"{stage}/{key}" in metrics:
            table.add_row(title, _percent(metrics[f"{stage}/{key}"]))
    return table


def _percent(value: Any) -> str:
    number = 100 * float(value)
    return "–" if np.isnan(number) else f"{number:.2f}"
