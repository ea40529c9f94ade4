from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lk_backbones.data import PictureFolderDataModule
from tests.data.conftest import save_image


def test_all_pictures_in_natural_order(tmp_path: Path) -> None:
    for name in ("frame10.png", "frame9.jpg", "later/frame1.bmp"):
        save_image(tmp_path / name, 20, 30, seed=0)
    Image.fromarray(np.full((5, 7), 51, np.uint8)).save(tmp_path / "grey.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    data = PictureFolderDataModule(str(tmp_path), num_workers=0)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    names = [Path(path).relative_to(tmp_path).as_posix() for batch in batches for path in batch["path"]]
    assert names == ["frame9.jpg", "frame10.png", "grey.png", "later/frame1.bmp"]
    assert set(batches[0]) == {"image", "path", "original_size", "image_id"}
    assert [number for batch in batches for number in batch["image_id"]] == [1, 2, 3, 4]
    assert batches[2]["original_size"] == [(5, 7)]
    assert torch.equal(batches[2]["image"], torch.full((1, 3, 5, 7), 0.2))
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "frame10.png"))).permute(2, 0, 1)
    assert torch.equal(batches[1]["image"][0], picture.float() / 255)


def test_pictures_can_be_resized_and_batched(tmp_path: Path) -> None:
    for i in range(3):
        save_image(tmp_path / f"{i}.png", 20, 30, seed=i)
    data = PictureFolderDataModule(str(tmp_path), batch_size=2, num_workers=0, test_size=(90, 40))
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [tuple(batch["image"].shape) for batch in batches] == [(2, 3, 40, 60), (1, 3, 40, 60)]
    assert batches[0]["original_size"] == [(20, 30), (20, 30)]


def test_one_picture(tmp_path: Path) -> None:
    save_image(tmp_path / "only.png", 8, 9, seed=0)
    data = PictureFolderDataModule(str(tmp_path / "only.png"), num_workers=0)
    data.setup("predict")
    assert [batch["path"] for batch in data.predict_dataloader()] == [[str(tmp_path / "only.png")]]


def test_nothing_to_predict(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"holds no pictures \(\.jpg.*It holds: a\.txt"):
        PictureFolderDataModule(str(tmp_path)).setup("predict")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*/nowhere"):
        PictureFolderDataModule(str(tmp_path / "nowhere")).setup("predict")
    with pytest.raises(RuntimeError, match=r"call setup\(\)"):
        PictureFolderDataModule(str(tmp_path)).predict_dataloader()
