"""Order, seeds and position of training samples: with real Trainers that stop and go on."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed, nn
from torch.multiprocessing import start_processes

from lk_backbones.data import SyntheticScenesDataModule
from lk_backbones.data.sampling import SampleKey, TrainingSampler, derive_seed, evaluation_loader

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You requested to overfit")

Stream = list[tuple[int, int, str, int]]


class TinyModel(LightningModule):
    """One convolution, and the list of what it was shown: (epoch, batch, path, checksum of picture and mask)."""

    def __init__(self, plans_ahead: bool = False) -> None:
        super().__init__()
        self.plans_ahead = plans_ahead
        self.layer = nn.Conv2d(3, 9, 1)
        self.stream: Stream = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        for path, image, mask in zip(batch["path"], batch["image"], batch["mask"], strict=True):
            checksum = zlib.crc32(mask.numpy().tobytes(), zlib.crc32(image.numpy().tobytes()))
            self.stream.append((self.current_epoch, batch_idx, path, checksum))
        return nn.functional.cross_entropy(self.layer(batch["image"]), batch["mask"], ignore_index=255)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert not self.training
        assert batch["image"].shape[1] == 3

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.plans_ahead:  # Lightning makes the loader for this, before it restores the checkpoint
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(Callback):
    """Ends a run as a kill would: without any of the Trainer's farewells."""

    def __init__(self, after: int):
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, model: LightningModule, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.after:
            raise KeyboardInterrupt


def make_data(num_workers: int = 0, seed: int | None = 3) -> SyntheticScenesDataModule:
    # 22 scenes in batches of 4: five batches per epoch and two scenes left out.
    return SyntheticScenesDataModule(
        image_size=(64, 64), train_images=22, val_images=2, batch_size=4, num_workers=num_workers, seed=seed
    )


def run(
    folder: Path, stop_after: int | None = None, resume: Path | None = None, num_workers: int = 0, **trainer_args: Any
) -> tuple[Stream, dict[str, torch.Tensor]]:
    every, data = trainer_args.pop("save_every", 1), trainer_args.pop("data", None) or make_data(num_workers)
    callbacks: list[Callback] = [ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=every)]
    callbacks += trainer_args.pop("callbacks", [])
    if stop_after is not None:
        callbacks.append(Stop(stop_after))
    torch.manual_seed(0)
    model = TinyModel(trainer_args.pop("plans_ahead", False))
    trainer = Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **trainer_args,
    )
    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume)
    except (KeyboardInterrupt, SystemExit):
        assert stop_after is not None
    return model.stream, {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.filterwarnings("error:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 3},
        {"max_steps": 13, "max_epochs": -1},
        {"max_epochs": 3, "accumulate_grad_batches": 2},
        {"max_steps": 7, "accumulate_grad_batches": 2, "max_epochs": -1},
        {"max_epochs": 3, "limit_train_batches": 4},
        {"max_epochs": 3, "val_check_interval": 2},
        {"max_steps": 13, "max_epochs": -1, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1},
        {"max_epochs": 3, "plans_ahead": True},
        {"max_steps": 13, "max_epochs": -1, "plans_ahead": True},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_resumed_run_sees_what_an_undisturbed_run_sees(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, final = run(tmp_path / "whole", **options)
    per_epoch = options.get("limit_train_batches", 5)
    assert len(whole) >= 12 * 4
    assert {batch for _, batch, _, _ in whole} == set(range(per_epoch))

    accumulated = options.get("accumulate_grad_batches", 1)
    # With epochs of 5 batches: in the middle, before the last batch, at the end, and in a later epoch.
    for step in (2, 4, 5, 8) if accumulated == 1 else (1, 2, 3, 4):
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
        rest, weights = run(tmp_path / f"rest_{step}", resume=checkpoint, **options)
        assert rest == whole[len(whole) - len(rest) :], step
        batches = step if accumulated == 1 else (step // 3) * 5 + (step % 3) * 2  # the last of 5 batches steps alone
        assert len(whole) - len(rest) == 4 * batches
        for key, value in final.items():
            assert torch.equal(weights[key], value), (step, key)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path, num_workers: int) -> None:
    options: dict[str, Any] = {"max_epochs": 3, "num_workers": num_workers, "save_every": 4}
    whole, final = run(tmp_path / "whole", **options)
    head, _ = run(tmp_path / "head", stop_after=11, **options)
    assert head == whole[: 11 * 4]
    tail, weights = run(tmp_path / "tail", resume=tmp_path / "head" / "step=8.ckpt", **options)
    assert tail == whole[8 * 4 :]
    for key, value in final.items():
        assert torch.equal(weights[key], value), key


def test_stream_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "save_every": 100}
    assert run(tmp_path, num_workers=0, **options)[0] == run(tmp_path, num_workers=2, **options)[0]


def test_epochs_differ_in_order_and_augmentation(tmp_path: Path) -> None:
    stream, _ = run(tmp_path, max_epochs=2, save_every=100)
    first, second = stream[:20], stream[20:]
    assert [path for *_, path, _ in first] != [path for *_, path, _ in second]
    sums = {path: checksum for *_, path, checksum in first}
    common = [(sums[path], checksum) for *_, path, checksum in second if path in sums]
    assert len(common) > 10
    assert sum(one != other for one, other in common) > len(common) // 2


def test_seed_is_kept_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    data = make_data(seed=None)
    assert data.seed == 11
    run(tmp_path, max_epochs=1, save_every=2)
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    state = {"seed": 3, "training_images": 22, "batch_size": 4, "processes": 1}
    assert checkpoint["SyntheticScenesDataModule"] == state
    data.load_state_dict(checkpoint["SyntheticScenesDataModule"])
    assert data.seed == 3


def test_a_loader_used_outside_the_loop_gives_whole_epochs(tmp_path: Path) -> None:
    data = make_data()
    seen: list[int] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
            self.on_train_epoch_end(trainer, model)

        def on_train_epoch_end(self, trainer: Trainer, model: LightningModule) -> None:
            for loader in (trainer.train_dataloader, data.train_dataloader()):
                seen.append(sum(len(batch["path"]) for batch in loader))

    options: dict[str, Any] = {"max_epochs": 2, "data": data, "callbacks": [Look()]}
    whole, _ = run(tmp_path, save_every=3, **options)
    assert seen == [20] * 6
    rest, _ = run(tmp_path / "resumed", resume=tmp_path / "step=3.ckpt", **options)
    assert seen == [20] * 12
    assert rest == whole[3 * 4 :]
    assert sum(len(batch["path"]) for batch in data.train_dataloader()) == 20


def test_overfit_batches_works(tmp_path: Path) -> None:
    stream, _ = run(tmp_path, max_epochs=2, overfit_batches=2)
    paths = [path for *_, path, _ in stream]
    assert paths == [f"scene_train_{i:05d}" for i in range(8)] * 2


@pytest.mark.filterwarnings("error:The checkpoint was saved within an epoch")
def test_data_that_changed_within_an_epoch_is_pointed_out(tmp_path: Path) -> None:
    run(tmp_path, max_epochs=2)
    data = make_data()
    data.batch_size = 2
    with pytest.raises(UserWarning, match=r"the data has changed since \(batch_size 4 -> 2\)"):
        run(tmp_path / "within", resume=tmp_path / "step=3.ckpt", data=data, max_epochs=2)
    data.batch_size = 5  # four batches per epoch: after five of four pictures, an epoch is over in any case
    assert len(run(tmp_path / "between", resume=tmp_path / "step=5.ckpt", data=data, max_epochs=2)[0]) == 20


def test_seeds_are_well_mixed() -> None:
    seeds = {derive_seed(seed, epoch, position) for seed in range(3) for epoch in range(10) for position in range(100)}
    assert len(seeds) == 3000
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    bits = np.array([derive_seed(0, 0, position) & 1 for position in range(1000)])
    assert 400 < bits.sum() < 600


def _as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world)
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)


def test_processes_share_the_order_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = list(range(24))
    single = list(TrainingSampler(dataset, seed=5))  # type: ignore[arg-type]
    shares = []
    for rank in range(2):
        _as_process(monkeypatch, rank, 2)
        shares.append(list(TrainingSampler(dataset, seed=5)))  # type: ignore[arg-type]
    assert [key for pair in zip(*shares, strict=True) for key in pair] == single
    assert all(isinstance(key, SampleKey) for key in single)


@pytest.mark.parametrize("world", [2, 3])
def test_evaluation_gives_every_sample_once(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    seen: list[int] = []
    for rank in range(world):
        _as_process(monkeypatch, rank, world)
        for batch in evaluation_loader(list(range(7)), 2, 0, False, list):  # type: ignore[arg-type]
            seen += batch
    assert sorted(seen) == list(range(7))


def test_fewer_pictures_than_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _as_process(monkeypatch, 0, 4)
    with pytest.raises(ValueError, match="4 processes cannot share 3 pictures"):
        evaluation_loader([1, 2, 3], 1, 0, False, list)  # type: ignore[arg-type]


def _evaluate_in_process(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = make_data()
    data.setup("test")
    paths = [path for batch in data.test_dataloader() for path in batch["path"]]
    gathered: list[Any] = [None, None]
    distributed.all_gather_object(gathered, paths)
    if rank == 0:
        Path(folder, "paths").write_text("\n".join(gathered[0] + gathered[1]))
    distributed.destroy_process_group()


def test_two_real_processes_evaluate_every_picture_once(tmp_path: Path) -> None:
    start_processes(_evaluate_in_process, (str(tmp_path),), nprocs=2, start_method="fork")
    paths = (tmp_path / "paths").read_text().splitlines()
    assert sorted(paths) == [f"scene_test_{i:05d}" for i in range(100)]
