"""Callbacks through real trainers."""

import io
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from rich.console import Console

from lk_backbones.metrics.tables import ap_table, iou_table
from lk_backbones.tasks import MetricsTable, Overlays, ReproducibleSteps, SamplesSeen, SegmentationTask

from ..blocks import NUM_CLASSES, TRAIN_SIZES, UNEVEN_SIZES, Blocks, loader, trainer


def make(**kwargs: Any) -> SegmentationTask:
    return SegmentationTask("unet", "resnet18", **({"num_classes": NUM_CLASSES, "lr": 1e-3} | kwargs))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- overlays ---------------------------------------------------------------------------------------------


def test_overlays_of_validation_and_test(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    overlays = Overlays(num_pictures=2)
    fitter = trainer(tmp_path, logger=logger, callbacks=[overlays], max_epochs=2)
    task = make()
    fitter.fit(task, loader(TRAIN_SIZES, 4), loader(UNEVEN_SIZES))
    fitter.test(task, loader(UNEVEN_SIZES), verbose=False)
    folder = Path(logger.log_dir) / "overlays"
    # two of five pictures, evenly spread
    pictures = ["block_0.png", "block_2.png"]
    expected = [f"{part}/{p}" for part in ("test", "val/step_00000002", "val/step_00000004") for p in pictures]
    assert files(folder) == expected
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == ["val/block_0", "val/block_2", "test/block_0", "test/block_2"]
    assert [e.step for e in events.Images("val/block_0")] == [2, 4]
    png = np.array(Image.open(io.BytesIO(events.Images("test/block_0")[0].encoded_image_string)))
    assert np.array_equal(png, np.array(Image.open(folder / "test" / "block_0.png")))


def test_more_pictures_than_batches(tmp_path: Path) -> None:
    tester = trainer(tmp_path, callbacks=[Overlays(str(tmp_path / "out"), num_pictures=3)])
    tester.test(make(), loader([(32, 48)] * 4, 2), verbose=False)
    assert files(tmp_path / "out") == [f"test/block_{i}.png" for i in range(4)]


def test_predictions_become_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    items = [{k: v for k, v in item.items() if k != "mask"} for item in Blocks(UNEVEN_SIZES)]
    items[1]["path"] = "other/block_0.png"  # a second picture of the same name
    for item in items:
        item["original_size"] = (60, 90)
        item["image"] = item["image"][None]
        item["path"], item["original_size"] = [item["path"]], [item["original_size"]]
    task = make()
    data = torch.utils.data.DataLoader(items, batch_size=None)
    predictor = trainer(tmp_path, callbacks=[Overlays(str(tmp_path / "out"))])
    results = predictor.predict(task, data)
    names = ["block_0", "other_block_0", "block_2", "block_3", "block_4"]
    assert files(tmp_path / "out") == sorted(f"{d}/{n}.png" for d in ("label_maps", "overlays") for n in names)
    for name, result in zip(names, results, strict=True):
        labels = np.array(Image.open(tmp_path / "out" / "label_maps" / f"{name}.png"))
        assert labels.dtype == np.uint8
        assert labels.shape == (60, 90)
        assert np.array_equal(labels, result["label_map"][0].numpy())


def test_overlays_refuse_other_modules_and_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"draws a task that has a method figures.*; LightningModule has none"):
        Overlays().setup(trainer(tmp_path), L.LightningModule(), "fit")
    with pytest.raises(ValueError, match="opacity=2 in"):
        Overlays(opacity=2)


# --- table ------------------------------------------------------------------------------------------------


def test_table_shows_every_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"val/iou/road": 0.5, "val/iou/sky": float("nan"), "val/mean_iou": 0.25, "val/pixel_accuracy": 0.75}
    console = Console(file=io.StringIO(), width=60)
    console.print(iou_table(metrics, ["road", "sky"], "val"))
    lines = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]
    for expected in (["road", "50.00"], ["sky", "–"], ["mean", "IoU", "25.00"], ["pixel", "accuracy", "75.00"]):
        assert expected in lines

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

    task = make(class_names=list("abcd"))
    with_table = trainer(tmp_path, callbacks=[MetricsTable()])
    with_table.validate(task, loader(UNEVEN_SIZES), verbose=False)
    assert "Validation" in capsys.readouterr().out
    with_table.test(task, loader(UNEVEN_SIZES), verbose=False)
    assert "Test" in capsys.readouterr().out
    for every, times in ((False, 1), (True, 2)):
        fitter = trainer(tmp_path, callbacks=[MetricsTable(every)], max_epochs=2)
        fitter.fit(task, loader(TRAIN_SIZES, 4), loader(UNEVEN_SIZES))
        assert capsys.readouterr().out.count("mean IoU") == times


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
        "unet", "replknet_31n", encoder_kwargs={"drop_path_rate": 0.5}, num_classes=NUM_CLASSES, lr=1e-3
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
