"""What a run in Python says in the end, through real trainers and in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lk_backbones.callbacks import ClosingLines, CocoResults, Overlays
from lk_backbones.cli import main
from lk_backbones.data import CocoDataModule
from lk_backbones.tasks import SegmentationTask

from ..blocks import NUM_CLASSES, TRAIN_SIZES, UNEVEN_SIZES, loader, trainer
from ..data.conftest import CocoMaker, save_image
from ..oracle import oracle_task


def make() -> SegmentationTask:
    return SegmentationTask("unet", "resnet18", num_classes=NUM_CLASSES, lr=1e-3)


def closing(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("pictures:", "detections:", "checkpoint:"))]


def test_a_script_ends_as_the_command_line_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keep = ModelCheckpoint(tmp_path / "kept", filename="best")
    last = ModelCheckpoint(tmp_path / "kept", save_top_k=0, save_last=True, every_n_train_steps=1)
    overlays = Overlays(str(tmp_path / "out"), num_pictures=1)
    fitter = trainer(tmp_path, callbacks=[overlays, keep, last], enable_checkpointing=True)
    task = make()
    pictures = f"pictures:   {tmp_path / 'out'}"
    fitter.fit(task, loader(TRAIN_SIZES, 4), loader(UNEVEN_SIZES))
    kept = [f"checkpoint: {Path('kept', name)}" for name in ("best.ckpt", "last.ckpt")]
    assert closing(capsys.readouterr().out) == [pictures, *kept]
    fitter.test(task, loader(UNEVEN_SIZES), verbose=False)
    assert closing(capsys.readouterr().out) == [pictures]
    overlays.num_pictures = 0  # what another run has drawn is not this one's
    fitter.validate(task, loader(UNEVEN_SIZES), verbose=False)
    assert closing(capsys.readouterr().out) == []
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, callbacks=[Overlays(str(tmp_path / "out"))]).predict(task, failing())
    assert closing(capsys.readouterr().out) == []


def failing():
    yield next(iter(loader(UNEVEN_SIZES)))
    raise ZeroDivisionError


def test_results_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(10, 14):
        save_image(tmp_path / "coco" / "val2017" / f"{number}.png", 60, 80, seed=number)
    root = CocoMaker(tmp_path / "coco").write()
    data = CocoDataModule(str(root), num_workers=0)
    name = "wei\x1b[31mß"  # a terminal would obey
    results = CocoResults(str(tmp_path / name))
    trainer(tmp_path, callbacks=[results]).test(oracle_task(data), datamodule=data, verbose=False)
    folder = f"detections: {tmp_path}/wei\\x1b[31mß/test/"
    assert closing(capsys.readouterr().out) == [f"{folder}predictions.json", f"{folder}predictions_masks.json"]
    assert all(file.is_file() for file in results.files)


def test_a_second_one_and_other_modules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keep = ModelCheckpoint(tmp_path, filename="best")
    with_own = trainer(tmp_path, callbacks=[ClosingLines(), keep], enable_checkpointing=True, max_steps=1)
    with_own.fit(make(), loader(TRAIN_SIZES, 4))
    assert closing(capsys.readouterr().out) == ["checkpoint: best.ckpt"]
    boring = f"{BoringModel.__module__}."
    modules = ["--model", boring + BoringModel.__name__, "--data", boring + BoringDataModule.__name__]
    short = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu"]
    main(["fit", *modules, *short, "--trainer.enable_progress_bar", "false"])
    (line,) = closing(capsys.readouterr().out)
    assert line.startswith(f"checkpoint: {Path('lightning_logs', 'version_0', 'checkpoints')}")


def test_two_processes_say_it_once_whatever_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "größe"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "tests.callbacks.test_closing", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert closing(run.stdout) == [f"pictures:   {tmp_path!s}/gr\\xf6\\xdfe/out"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    callbacks = [Overlays(str(folder / "out"), num_pictures=1)]
    two = trainer(folder, strategy="ddp", devices=2, callbacks=callbacks)
    two.validate(make(), loader(UNEVEN_SIZES), verbose=False)
