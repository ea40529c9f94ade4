"""What ``lk-backbones benchmark`` counts and writes; how fast anything is, no test asks."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageDraw, ImageFont
from torch import nn

from lk_backbones.analysis.speed import benchmark, benchmark_operator, inference_run, training_run
from lk_backbones.analysis.timing import Timing
from lk_backbones.cli import main
from lk_backbones.drawing.scatter import draw_scatter
from lk_backbones.weights.catalogue import published_mean_iou


def test_models_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lk_backbones.analysis.speed.published_mean_iou", {"test_resnet": 42.0}.get)
    drawn: list[str] = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda s, xy, t, *a, **k: drawn.append(t) or text(s, xy, t, *a, **k)
    )
    models = ["test_resnet", "test_convnext,in_chans=5"]
    modes = ["plain", "folded", "packed", "training"]
    sizes = ["--input-size", "32x64", "--batch-size", "2", "--seconds", "0.001"]
    main(["benchmark", *models, "--modes", *modes, *sizes])
    printed = " ".join(capsys.readouterr().out.split())
    assert "contiguous, batch 2, 32 × 64" in printed
    with open("benchmark/models.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["mode"]) for row in rows] == [(model, mode) for model in models for mode in modes]
    for row in rows:
        low, median, high = (float(row[key]) for key in ("quartile_1_ms", "median_ms", "quartile_3_ms"))
        assert 0 < float(row["fastest_ms"]) <= low <= median <= high
        assert float(row["images_per_second"]) == pytest.approx(2000 / median, rel=1e-3)
        assert int(row["calls"]) >= 3
        assert int(row["peak_memory_bytes"]) > 0
    assert len({row["macs"] for row in rows}) == len({row["parameters"] for row in rows}) == 2
    assert [row["published_mean_iou"] for row in rows[::4]] == ["42.0", ""]
    markdown = Path("benchmark/models.md").read_text()
    assert markdown.count("\n| test_") == len(rows)
    assert Path("benchmark/models.png").is_file()
    assert any(line.endswith("batch 2, 32 x 64") for line in drawn)
    glyph = ImageFont.load_default(12).getmask
    assert not [c for c in set("".join(drawn)) if bytes(glyph(c)) == bytes(glyph("\uffff"))]  # what the font lacks
    with pytest.raises(SystemExit):
        main(["benchmark", *models])
    assert "benchmark/models.csv and 2 more exists" in " ".join(capsys.readouterr().err.split())


def test_parameters_and_multiply_adds_of_one_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    (row,) = benchmark({"net": model}, ["plain"], (32, 32), 4, seconds=0.001)
    assert row.parameters == 8 * 27 + 8 + 8 * 256 * 10 + 10
    assert row.macs == 8 * 16 * 16 * 27 + 8 * 256 * 10
    assert row.mean_iou is None
    with pytest.raises(ValueError, match=r"^net: mat1 and mat2 shapes cannot be multiplied"):
        benchmark({"net": model}, ["plain"], (16, 16), seconds=0.001)


def test_a_training_step_gives_every_parameter_its_gradient() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    step = training_run(model, torch.randn(2, 3, 4, 4))
    step()
    first = [parameter.grad.clone() for parameter in model.parameters()]
    torch.manual_seed(0)
    step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert model[1].training
    assert not torch.equal(first[0], model[0].weight.grad)  # neither added up nor kept
    assert inference_run(model.eval(), torch.randn(2, 3, 4, 4))().is_inference()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "either models are named, or --ops is given"),
        (["resnet5"], "there is no file, folder or model 'resnet5'"),
        (["test_resnet", "test_resnet"], "a model is named twice"),
        (["test_resnet", "--modes", "packed", "--dtype", "float16"], "float32 and bfloat16 on CPUs only"),
        (["torchvision:fcos_resnet50_fpn"], "is a detector, which cannot be trained without boxes"),
        (["test_resnet", "--modes", "fast"], "invalid choice: 'fast'"),
        (["test_resnet", "--input-size", "400000"], "images of"),
    ],
)
def test_what_the_command_refuses(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["benchmark", *args])
    assert exit_.value.code
    assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_operators() -> None:
    rows = list(benchmark_operator(4, 1, (8, 16), (3, 5), seconds=0.001))
    assert [(row.map_size, row.kernel_size) for row in rows] == [(8, 3), (8, 5), (16, 3), (16, 5)]
    assert all(row.ours_ms > 0 and row.torch_ms > 0 for row in rows)


def test_published_figures() -> None:
    """Those of docs/encoders.md."""
    figures = {"replknet_31b": 49.9, "replknet_31l": 52.4, "unireplknet_t": 48.6, "slak_small": 49.4}
    figures |= {"pelk_base_101": 50.6, "convnext_tiny": 46.0, "replknet_31n": None, "resnet18": None}
    table = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")
    for name, figure in figures.items():
        assert published_mean_iou(name) == figure
        if figure is not None:
            assert str(figure) in table
    assert published_mean_iou("replknet_31b.in22k") == 49.9


def test_quartiles() -> None:
    timing = Timing([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (timing.best, timing.median, timing.quartiles) == (1.0, 3.0, (2.0, 4.0))


@pytest.mark.parametrize("points", [[("a", 1.0, 50.0)], [("a", 3.0, 50.0), ("b", 3.0, 50.0), ("c" * 200, 700.0, 1.0)]])
def test_points_are_drawn(points: list[tuple[str, float, float]]) -> None:
    figure = np.asarray(draw_scatter(points, "x", "y", "title" * 50, "caption"))
    blank = np.asarray(draw_scatter([(" ", 1.0, 50.0)], "x", "y"))
    assert figure.shape == blank.shape
    assert (figure != blank).any()
