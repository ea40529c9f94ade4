"""Drawn shapes: outline and texture agree in training, disagree in the held-out pictures, and decisions are counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from lk_backbones.callbacks import ShapeDecisions
from lk_backbones.data import ImageFolderDataModule, SyntheticShapesDataModule
from lk_backbones.data.scenes.shapes import OUTLINES, TEXTURES, draw_shape
from lk_backbones.tasks import ClassificationTask
from tests.class_folders import draw_folders

SMALL: dict[str, Any] = {"image_size": 48, "train_images": 16, "val_images": 8, "test_images": 8, "num_workers": 0}


def shapes(**arguments: Any) -> SyntheticShapesDataModule:
    data = SyntheticShapesDataModule(**(SMALL | {"conflict_images": 112, "batch_size": 8} | arguments))
    data.setup()
    return data


def test_outline_and_texture_agree_but_in_the_held_out_pictures() -> None:
    data = shapes()
    for split in ("train", "val", "test"):
        dataset = data.dataset(split)
        assert all(sample["texture"] == sample["label"] for sample in map(dataset.__getitem__, range(len(dataset))))
    pairs: Counter[tuple[int, int]] = Counter()
    for batch in data.cue_conflict_dataloader():
        pairs.update(zip(batch["label"].tolist(), batch["texture"], strict=True))
    assert len(pairs) == 56
    assert set(pairs.values()) == {2}
    assert all(outline != texture for outline, texture in pairs)
    assert (data.num_classes, len(OUTLINES), len(TEXTURES)) == (8, 8, 8)
    assert data.class_names[0] == "disc, stripes"


def test_a_picture_is_always_the_same_and_no_other_ones() -> None:
    data, again, other = shapes(), shapes(), shapes(shape_seed=1)
    drawn = [data.drawn[series].draw(i) for series in data.drawn for i in range(8)]
    assert all(np.array_equal(drawn[i], again.drawn["train"].draw(i)) for i in range(8))
    assert not np.array_equal(drawn[0], other.drawn["train"].draw(0))
    assert len({picture.tobytes() for picture in drawn}) == 32
    with pytest.raises(IndexError, match="no picture 16"):
        data.drawn["train"].draw(16)


def test_colours_tell_nothing_and_every_shape_is_whole() -> None:
    rng = np.random.default_rng(0)
    for outline in range(8):
        means = []
        for _ in range(40):
            picture = draw_shape(rng, 64, outline, outline)
            assert picture.shape == (64, 64, 3)
            edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).astype(float)
            assert edge.std(axis=0).max() < 12, "a shape reaches beyond the picture"
            means.append(picture.mean(axis=(0, 1)))
        assert (np.std(means, axis=0) > 35).all()


class Decides(ClassificationTask):
    """Knows every picture, and decides by the outline, by the texture or for another class."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(image), 8)
        for row, picture in zip(logits, image, strict=True):
            outline, texture, place = self.known[picture.numpy().tobytes()]
            others = next(c for c in range(8) if c not in (outline, texture))
            row[[outline, outline, texture, others][place % 4]] = 1
        return logits


@pytest.fixture
def task() -> Decides:
    kwargs = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    return Decides("tu-convnext_atto", None, kwargs, 8, input_size=48, crop_pct=1.0)


def make_trainer(folder: Path, **arguments: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[ShapeDecisions()], **arguments,
    )  # fmt: skip


def test_decisions_are_counted(task: Decides, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shapes()
    task.known = {}
    for series in ("test", "conflict"):
        for i in range(data.drawn[series].length):
            picture = torch.from_numpy(data.drawn[series].draw(i)).permute(2, 0, 1).float() / 255
            task.known[picture.contiguous().numpy().tobytes()] = (*data.drawn[series].cues(i), i)
    trainer = make_trainer(tmp_path)
    trainer.test(task, data, verbose=False)
    bias = next(callback for callback in trainer.callbacks if isinstance(callback, ShapeDecisions))
    assert (bias.outline, bias.texture, bias.neither) == (56, 28, 28)
    assert bias.share == pytest.approx(2 / 3)
    assert "66.7 % of the decisions go by the outline (56 outline, 28 texture, 28 neither" in capsys.readouterr().out


def test_it_is_measured_after_a_training_and_only_where_there_are_such_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    small = ClassificationTask("tu-convnext_atto", None, kwargs, 8, input_size=48, crop_pct=1.0)
    make_trainer(tmp_path, max_steps=1, num_sanity_val_steps=0, log_every_n_steps=1).fit(small, shapes())
    assert "of 112 pictures" in capsys.readouterr().out
    assert small.training
    root = draw_folders(tmp_path / "folders", {"train": 2, "val": 1})
    six = ClassificationTask("tu-convnext_atto", None, kwargs, 6, input_size=48)
    make_trainer(tmp_path).test(six, ImageFolderDataModule(str(root), num_workers=0), verbose=False)
    assert "outline" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [{"image_size": 8}, {"train_images": 0}, {"conflict_images": 0}])
def test_arguments_that_cannot_be(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SyntheticShapesDataModule(**arguments)
