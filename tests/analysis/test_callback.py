"""The receptive field in a training: it is drawn, and the training is bit for bit the one without it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lk_backbones.analysis import ReceptiveField, effective_receptive_field
from lk_backbones.analysis.pictures import scene_pictures
from lk_backbones.data import SyntheticScenesDataModule
from lk_backbones.tasks import SegmentationTask


def train(folder: Path, *callbacks: L.Callback, **arguments: Any) -> tuple[L.Trainer, SegmentationTask]:
    L.seed_everything(7)
    task = SegmentationTask(
        "fpn", "replknet_31n", encoder_kwargs={"drop_path_rate": 0.3, "kernel_sizes": 3}, num_classes=9, **arguments
    )
    data = SyntheticScenesDataModule((64, 64), 12, 2, 2, batch_size=2, num_workers=0)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        accumulate_grad_batches=1 if arguments else 2,  # so that it is measured between two halves of a step too
        limit_val_batches=1,
        val_check_interval=2,
        logger=TensorBoardLogger(folder),
        callbacks=[*callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, data)
    return trainer, task


def state_of(task: SegmentationTask) -> dict[str, Any]:
    return {
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "python": random.getstate(),
        "torch": torch.get_rng_state().tolist(),
        "modes": [module.training for module in task.modules()],
        "trained": [parameter.requires_grad for parameter in task.parameters()],
        "optimiser": str(task.optimizers().optimizer.state_dict()),  # type: ignore[union-attr]
        "weights": {key: value.clone() for key, value in task.state_dict().items()},
    }


@pytest.mark.parametrize("arguments", [{}, {"freeze_encoder": True}], ids=["whole", "frozen encoder"])
def test_a_training_is_the_same_with_it(arguments: dict[str, Any], tmp_path: Path) -> None:
    callback = ReceptiveField(every=1, size=64, num_images=1)
    trainer, watched = train(tmp_path / "a", callback, **arguments)
    _, alone = train(tmp_path / "b", **arguments)
    assert len(list(callback.written()[0][1].glob("step_*.png"))) == 3
    with_it, without = state_of(watched), state_of(alone)
    for key, value in without.pop("weights").items():
        assert torch.equal(with_it["weights"][key], value), key
    with_it.pop("weights")
    for key, value in without.items():
        assert with_it[key] == value, key
    assert trainer.global_step == 2


def test_what_is_drawn_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = ReceptiveField(every=2, size=64, num_images=2, level="output")
    trainer, task = train(tmp_path, callback, freeze_encoder=True)
    folder = Path(trainer.log_dir or "") / "erf"
    assert callback.written() == [("receptive", folder)]
    assert str(folder) in capsys.readouterr().out
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["growth.png", *(f"step_{s:08d}.{kind}" for s in (0, 2) for kind in ("npy", "png"))]
    expected = effective_receptive_field(task, scene_pictures((64, 64), 2).make(3), "output")
    np.testing.assert_array_equal(np.load(folder / "step_00000002.npy"), expected.contribution)
    assert not np.array_equal(np.load(folder / "step_00000000.npy"), expected.contribution)
    single, growth = (Image.open(folder / name) for name in ("step_00000002.png", "growth.png"))
    assert growth.width > 1.8 * single.width
    logged = EventAccumulator(trainer.log_dir).Reload()
    assert [event.step for event in logged.Images("erf")] == [0, 2]
    areas = [event.value for event in logged.Scalars("erf/area_99")]
    assert areas[-1] == pytest.approx(expected.ratios[0.99])


def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    callback = ReceptiveField()
    trainer, _ = train(tmp_path, callback, freeze_encoder=True)
    assert callback.written() == []
    assert not (Path(trainer.log_dir or "") / "erf").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"level": 9}, "level 9: SegmentationTask has the levels 0"),
        ({"pictures": "no/such/folder"}, "There is no folder"),
        ({"size": 32}, "scenes are drawn at 64 × 64"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_step(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    callback = ReceptiveField(**{"every": 1, "size": 64, "num_images": 1, **arguments})
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train(tmp_path, callback, freeze_encoder=True)
    with pytest.raises(ValueError, match="every=-1"):
        ReceptiveField(every=-1)


def test_a_measurement_that_fails_later_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = ReceptiveField(every=1, size=64, num_images=1)
    measured = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        measured.append(args)
        if len(measured) > 1:
            raise ValueError("the gradients of all 1 images are infinite or not a number")
        return effective_receptive_field(*args, **kwargs)

    monkeypatch.setattr("lk_backbones.analysis.callback.effective_receptive_field", fail)
    with pytest.warns(UserWarning, match="at step 1 could not be measured: the gradients of all"):
        trainer, _ = train(tmp_path, callback, freeze_encoder=True)
    assert trainer.global_step == 2
    assert len(measured) == 3
