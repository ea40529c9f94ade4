"""Loading processes however they are started: forked, or, as on macOS, Windows and from Python 3.14, with pickles."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lk_backbones.data import (
    ADE20KDataModule,
    CityscapesDataModule,
    CocoDataModule,
    PictureFolderDataModule,
    SegmentationFolderDataModule,
    SyntheticScenesDataModule,
    SyntheticScenesDetectionDataModule,
)
from tests.data.test_sampling import run

Make = Callable[[int], LightningDataModule]

SCENES = {"image_size": (64, 64), "train_images": 4, "val_images": 2, "test_images": 2, "seed": 3}


@pytest.fixture(
    params=["folder", "cityscapes", "ade20k", "coco", "pictures", "scenes", "scenes with boxes", "own subclass"]
)
def make(request: pytest.FixtureRequest) -> Make:
    """Every data module of the package, with a few pictures; takes the number of workers."""
    crops: dict[str, Any] = {"batch_size": 2, "crop_size": 32, "seed": 3}
    if request.param in ("folder", "pictures"):
        root = request.getfixturevalue("folder_root")({"train": 4, "val": 2})
        if request.param == "pictures":
            return lambda workers: PictureFolderDataModule(str(root / "images"), num_workers=workers)
        return lambda workers: SegmentationFolderDataModule(str(root), num_workers=workers, **crops)
    if request.param in ("cityscapes", "ade20k"):
        root = request.getfixturevalue(f"{request.param}_root")
        kind = CityscapesDataModule if request.param == "cityscapes" else ADE20KDataModule
        return lambda workers: kind(str(root), num_workers=workers, **crops)
    if request.param == "coco":
        root = request.getfixturevalue("coco").write()
        return lambda workers: CocoDataModule(str(root), sizes=[32], batch_size=1, num_workers=workers, seed=3)
    kinds = {"scenes": SyntheticScenesDataModule, "scenes with boxes": SyntheticScenesDetectionDataModule}
    own = kinds.get(request.param, OwnScenes)
    return lambda workers: own(**SCENES, batch_size=2, num_workers=workers)


class OwnScenes(SyntheticScenesDataModule):
    """As a user may write it."""

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return SyntheticScenesDataModule.collate(samples[::-1])


class Looker(LightningModule):
    """Notes what it is shown in every stage: names and checksums of all tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[str, int]] = []

    def look(self, stage: str, batch: Any) -> None:
        assert torch.utils.data.get_worker_info() is None
        self.seen.append((stage, checksum(batch)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.look("train", batch)
        return self.weight

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.look("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.look("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.look("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def checksum(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return zlib.crc32(value.numpy().tobytes(), zlib.crc32(repr((value.shape, value.dtype)).encode()))
    if isinstance(value, dict):
        return checksum([item for key in sorted(value) for item in (key, value[key])])
    if isinstance(value, list | tuple):
        return zlib.crc32(repr([checksum(item) for item in value]).encode())
    return zlib.crc32(repr(value).encode())


def seen_by(data: LightningDataModule) -> list[tuple[str, int]]:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        max_epochs=2,
    )
    model = Looker()
    if not isinstance(data, PictureFolderDataModule):
        trainer.fit(model, datamodule=data)
        trainer.validate(model, datamodule=data, verbose=False)
        trainer.test(model, datamodule=data, verbose=False)
    trainer.predict(model, datamodule=data)
    return model.seen


@pytest.fixture
def start_method() -> Iterator[Callable[[str], None]]:
    """Choose how processes are started, as a user's script does."""
    before = torch.multiprocessing.get_start_method(allow_none=True)
    yield lambda method: torch.multiprocessing.set_start_method(method, force=True)
    torch.multiprocessing.set_start_method(before, force=True)


def test_workers_give_what_the_main_process_gives(make: Make, start_method: Callable[[str], None]) -> None:
    # Only the server of forked processes imports the package; else every worker does, for some seconds.
    multiprocessing.set_forkserver_preload(["lk_backbones.data"])
    start_method("forkserver")
    expected = seen_by(make(0))
    assert {stage for stage, _ in expected} in ({"predict"}, {"train", "val", "test", "predict"})
    assert seen_by(make(1)) == expected


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_run_resumed_within_an_epoch_goes_on_exactly(
    method: str, tmp_path: Path, start_method: Callable[[str], None]
) -> None:
    multiprocessing.set_forkserver_preload(["lk_backbones.data"])
    options: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 0}
    whole, final = run(tmp_path / "whole", **options)
    start_method(method)
    tail, weights = run(tmp_path / "tail", num_workers=1, resume=tmp_path / "whole" / "step=8.ckpt", **options)
    assert tail == whole[8 * 4 :]
    for key, value in final.items():
        assert torch.equal(weights[key], value), key


class Sent(pickle.Pickler):
    """Pickles what a loading process gets, and lets nothing of the main process's follow."""

    def reducer_override(self, value: Any) -> Any:
        assert not isinstance(value, Trainer | LightningModule | LightningDataModule | DataLoader), type(value)
        return NotImplemented


def test_nothing_but_data_goes_to_the_workers(make: Make) -> None:
    data = make(1)
    trainer, loaders = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), []
    data.trainer = trainer
    for stage, kinds in {"fit": ["train", "val"], "test": ["test"], "predict": ["predict"]}.items():
        if stage == "predict" or not isinstance(data, PictureFolderDataModule):
            data.setup(stage)
            loaders += [getattr(data, f"{kind}_dataloader")() for kind in kinds]
    for loader in loaders:
        file = io.BytesIO()
        Sent(file).dump((loader.dataset, loader.collate_fn, loader.worker_init_fn))
        dataset, collate, _ = pickle.loads(file.getvalue())
        assert checksum(collate([dataset[0]])) == checksum(loader.collate_fn([loader.dataset[0]]))
        assert file.tell() < 200_000  # of a folder mostly its table of labels
