"""Every recipe parses, builds, and trains on the number of samples that its published result was trained on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lk_backbones.data
import lk_backbones.tasks
from lk_backbones.cli import main
from lk_backbones.tasks.base import without_encoder_weights

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PUBLISHED = [path for path in RECIPES if path.parent.name in ("cityscapes", "ade20k", "coco")]
# Samples of a whole training: crops for segmentation, epochs of 117266 pictures with objects for COCO.
SAMPLES = {"cityscapes": 1_280_000, "ade20k": 5_120_000, "3x": 36 * 117_266, "2x": 24 * 117_266, "1x": 12 * 117_266}


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def build(path: Path) -> Any:
    """The recipe's task, without weights, on the meta device if it can be built there."""
    model = read(path)["model"]
    task = getattr(lk_backbones.tasks, model["class_path"])
    with without_encoder_weights(), torch.device("meta"):
        return task(**model["init_args"])


def test_there_are_recipes() -> None:
    assert {path.parent.name for path in RECIPES} == {"quickstart", "camvid", "cityscapes", "ade20k", "bccd", "coco"}
    assert len(PUBLISHED) == 11


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_command_line_accepts_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code in (0, None)
    assert read(path)["seed_everything"] == yaml.safe_load(capsys.readouterr().out)["seed_everything"]


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_model_and_data_agree(path: Path) -> None:
    config = read(path)
    task = build(path)
    data = getattr(lk_backbones.data, config["data"]["class_path"])(**config["data"]["init_args"])
    if path.parent.name not in ("camvid", "bccd", "coco"):  # whose classes are read from their folders
        assert data.num_classes == task.hparams["num_classes"]
    if isinstance(task, lk_backbones.tasks.DetectionTask):
        assert getattr(data, "masks", True) or not task.has_masks
        return
    for mean, fill in zip(task.hparams["mean"], data.image_fill, strict=True):
        assert mean == pytest.approx(fill, abs=1e-3), "the padding must become 0 when normalised"


@pytest.mark.parametrize("path", PUBLISHED, ids=name)
def test_published_recipes_see_the_published_number_of_samples(path: Path) -> None:
    config = read(path)
    trainer = config["trainer"]
    (expected,) = [c["init_args"] for c in trainer["callbacks"] if c["class_path"].endswith("SamplesSeen")]
    batch_size = trainer["devices"] * config["data"]["init_args"]["batch_size"] * trainer["accumulate_grad_batches"]
    assert batch_size == expected["expected_batch_size"]
    if path.parent.name != "coco":  # whose length is given in epochs
        assert batch_size * trainer["max_steps"] == expected["expected_samples"]
        assert expected["expected_samples"] == SAMPLES[path.parent.name]
        return
    assert trainer["max_epochs"] * 117_266 == expected["expected_samples"] == SAMPLES[path.stem.split("_")[-1]]
    milestones = config["model"]["init_args"]["milestones"]
    assert milestones == {36: [27, 33], 24: [16, 22], 12: [8, 11]}[trainer["max_epochs"]]


@pytest.mark.parametrize("path", [p for p in PUBLISHED if p.parent.name != "coco"], ids=name)
def test_published_recipes_and_defaults_have_the_published_scales(path: Path) -> None:
    """Of the configurations in RepLKNet-pytorch: all of ADE20K, at crops of 640 too, and Cityscapes at crops of 769."""
    config = read(path)["data"]
    module = getattr(lk_backbones.data, config["class_path"])
    published = {"ade20k": (2048, 512), "cityscapes": (2049, 1025)}[path.parent.name]
    for data in (module(**config["init_args"]), module()):
        assert tuple(data.base_size) == tuple(data.test_size) == published
        assert tuple(data.scale_range) == (0.5, 2.0)
        assert data.cat_max_ratio == 0.75


@pytest.mark.parametrize("path", PUBLISHED, ids=name)
def test_published_recipes_have_the_published_size(path: Path) -> None:
    text = path.read_text()
    if "Nobody published a number" in text:
        pytest.skip("there is no published size")
    published = float(re.search(r"(\d+) M parameters", text).group(1))
    task = build(path)
    # The tables count the inference model, without the auxiliary head.
    parameters = sum(p.numel() for p in task.model.parameters()) / 1e6
    assert parameters == pytest.approx(published, rel=0.025)
    words = ("box AP", "val2017") if path.parent.name == "coco" else ("mIoU", "single-scale")
    assert all(word in text for word in words)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_head_comment_gives_the_command(path: Path) -> None:
    assert f"lk-backbones fit --config {path.relative_to(ROOT).as_posix()}" in path.read_text()
