"""Runs like their recipes, and runs that go on exactly where they stopped, through real trainers."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lk_backbones.tasks import ReproducibleSteps, SamplesSeen, SegmentationTask

from ..blocks import NUM_CLASSES, TRAIN_SIZES, Blocks, loader, trainer


def make(**kwargs: Any) -> SegmentationTask:
    return SegmentationTask("unet", "resnet18", **({"num_classes": NUM_CLASSES, "lr": 1e-3} | kwargs))


# --- recipes ----------------------------------------------------------------------------------------------


def test_a_run_like_the_recipe_is_silent(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    callback = SamplesSeen(expected_batch_size=4, expected_samples=16)
    fitter = trainer(tmp_path, callbacks=[callback], accumulate_grad_batches=2, max_epochs=2, limit_val_batches=0)
    fitter.fit(make(), loader(TRAIN_SIZES, 2))
    assert not [w for w in recwarn if "recipe" in str(w.message)]


def test_a_smaller_batch_is_mentioned_with_the_remedy(tmp_path: Path) -> None:
    callback = SamplesSeen(expected_batch_size=16, expected_samples=160)
    fitter = trainer(tmp_path, callbacks=[callback], max_epochs=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match="recipe") as warned:
        fitter.fit(make(), loader(TRAIN_SIZES, 4))
    batch, samples = (str(w.message) for w in warned if "recipe" in str(w.message))
    assert "made for 16 samples per optimiser step, this run has 4 (1 devices x 4 per device x 1 accumulated)" in batch
    assert "set accumulate_grad_batches=4" in batch
    assert "lr=0.00025 and the steps to 4 times the recipe's" in batch
    assert "trains on 160 samples, this run on 8: set the trainer's max_steps=40" in samples


# --- reproducible steps -----------------------------------------------------------------------------------


class Draws(L.Callback):
    """Record what the step's random generator would draw."""

    def __init__(self) -> None:
        self.draws: list[float] = []

    def on_before_zero_grad(self, trainer: L.Trainer, task: L.LightningModule, optimizer: Any) -> None:
        state = torch.get_rng_state()
        self.draws.append(torch.rand(()).item())
        torch.set_rng_state(state)


def fit(folder: Path, ckpt_path: Path | None = None, **kwargs: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    L.seed_everything(5, verbose=False)
    task = SegmentationTask(
        "unet",
        "replknet_31n",
        encoder_kwargs={"drop_path_rate": 0.5, "depths": [1, 1, 1, 1]},
        num_classes=NUM_CLASSES,
        lr=1e-3,
    )
    draws = Draws()
    fitter = trainer(folder, limit_val_batches=0, **kwargs)
    fitter.callbacks += [ReproducibleSteps(), draws]
    # the same picture again and again: the order of the data is not this callback's concern
    data = torch.utils.data.DataLoader([Blocks([(32, 48)])[0]] * 8, batch_size=2)
    fitter.fit(task, data, ckpt_path=ckpt_path)
    return {k: v.clone() for k, v in task.state_dict().items()}, draws.draws


def test_a_run_resumed_within_an_epoch_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    undisturbed, draws = fit(tmp_path, max_epochs=2, callbacks=[keep], enable_checkpointing=True)
    assert len(draws) == 8
    assert len(set(draws)) == 8
    torch.manual_seed(999)
    resumed, rest = fit(tmp_path, tmp_path / "step=3.ckpt", max_epochs=2)
    assert rest == draws[3:]
    for name, tensor in undisturbed.items():
        assert torch.equal(resumed[name], tensor), name


def test_a_seed_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    with pytest.raises(ValueError, match="ReproducibleSteps needs a seed"):
        trainer(tmp_path, callbacks=[ReproducibleSteps()]).fit(make(), loader(TRAIN_SIZES, 4))
    trainer(tmp_path, callbacks=[ReproducibleSteps(seed=1)], max_steps=1).fit(make(), loader(TRAIN_SIZES, 4))
    assert "PL_GLOBAL_SEED" not in os.environ
