"""What the figures of a task say, besides what they show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lk_backbones.drawing import figures
from lk_backbones.drawing.figures import SegmentationFigures


def test_the_legend_tells_the_iou_of_every_class_that_occurs(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    original = figures.draw_panels
    monkeypatch.setattr(figures, "draw_panels", lambda *args: shown.append(args) or original(*args))
    colors = [(10 * i, 0, 0) for i in range(5)]
    task = SimpleNamespace(class_names=list("abcde"), class_colors=colors, hparams={"num_classes": 5})
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 255]])
    prediction = torch.tensor([[0, 0, 1, 1], [1, 4, 0, 3]], dtype=torch.uint8)
    batch = {"image": torch.rand(1, 3, 2, 4), "mask": truth[None]}
    drawn = SegmentationFigures(task, 0.6, 0.3)
    drawn.compared(batch, {"label_map": prediction[None]}, 0, "folder/name.png")
    _, legend, caption = shown.pop()
    # "d" is predicted on an ignored pixel only, "e" once in the place of "b"; "c" does not occur
    assert legend[0] == ("ignored", None)
    assert dict(legend[1:]) == {"a  67 %": colors[0], "b  50 %": colors[1], "d  0 %": colors[3], "e  0 %": colors[4]}
    assert caption == "name.png, 4 x 2, IoU in this picture by class"

    nothing = {"image": batch["image"], "mask": torch.full((1, 2, 4), 255)}
    drawn.compared(nothing, {"label_map": prediction[None]}, 0, "name.png")
    assert {text for text, _ in shown.pop()[1]} == {"ignored", "a  0 %", "b  0 %", "d  0 %", "e  0 %"}

    drawn.predicted(batch, {"label_map": prediction[None]}, 0, "name.png")
    assert [text for text, _ in shown.pop()[1]] == ["a", "b", "d", "e"]
