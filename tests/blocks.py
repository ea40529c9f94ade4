"""A tiny data set of coloured blocks, and a script that trains on it in several processes.

Run as a script (see test_distributed.py) it fits a task with two processes, each validating a different number of
pictures, and writes what the trainer logged.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

NUM_CLASSES = 4
COLORS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.1, 0.2, 0.9], [0.9, 0.9, 0.2]])


class Blocks(Dataset):
    """Pictures of 16 pixel blocks, each in its class's colour with noise; one row of blocks is ignored."""

    def __init__(self, sizes: list[tuple[int, int]], mask_scale: int = 1) -> None:
        self.sizes = sizes
        self.mask_scale = mask_scale

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        height, width = self.sizes[index]
        generator = torch.Generator().manual_seed(index)
        blocks = torch.randint(NUM_CLASSES, (-(-height // 16), -(-width // 16)), generator=generator)
        mask = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[:height, :width].clone()
        image = COLORS[mask].permute(2, 0, 1) + 0.1 * torch.randn(3, height, width, generator=generator)
        mask[-5:] = 255
        s = self.mask_scale
        mask = mask.repeat_interleave(s, 0).repeat_interleave(s, 1)
        return {"image": image.clamp(0, 1), "mask": mask, "path": f"folder/block_{index}.jpg"}


def loader(sizes: list[tuple[int, int]], batch_size: int = 1, **kwargs: Any) -> DataLoader:
    return DataLoader(Blocks(sizes, kwargs.pop("mask_scale", 1)), batch_size, **kwargs)


def trainer(folder: Path, **kwargs: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
        "default_root_dir": folder,
    }
    return L.Trainer(**(defaults | kwargs))


TRAIN_SIZES = [(32, 48)] * 8
UNEVEN_SIZES = [(32, 48), (40, 33), (64, 32), (50, 70), (32, 32)]


class Shard(torch.utils.data.Sampler):
    """Every second index, so that of five pictures one process has three and the other two."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.indices = list(range(rank, length, world_size))

    def __iter__(self):
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class ShardedBlocks(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader(TRAIN_SIZES, 2, sampler=self._shard(TRAIN_SIZES))

    def val_dataloader(self) -> DataLoader:
        return loader(UNEVEN_SIZES, 1, sampler=self._shard(UNEVEN_SIZES))

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    def _shard(self, sizes: list[tuple[int, int]]) -> Shard:
        return Shard(len(sizes), self.trainer.global_rank, self.trainer.world_size)


def main(folder: Path) -> None:
    from lk_backbones.tasks import SegmentationTask

    L.seed_everything(0, verbose=False)
    task = SegmentationTask("unet", "resnet18", num_classes=NUM_CLASSES, lr=1e-3, auxiliary_weight=0.4)
    fitter = trainer(folder, strategy="ddp", devices=2, use_distributed_sampler=False, max_epochs=2)
    fitter.fit(task, datamodule=ShardedBlocks())
    metrics = {key: value.item() for key, value in fitter.callback_metrics.items()}
    fitter.save_checkpoint(folder / "last.ckpt")
    fitter.test(task, datamodule=ShardedBlocks(), verbose=False)
    metrics |= {key: value.item() for key, value in fitter.callback_metrics.items()}
    if fitter.is_global_zero:
        (folder / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
