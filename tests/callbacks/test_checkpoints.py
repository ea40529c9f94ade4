"""Checkpoints when a run is killed, told to terminate, or out of disk space: real trainers, signals and limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO

from lk_backbones._files import UNFINISHED
from lk_backbones.cli import main
from lk_backbones.data import SyntheticScenesDataModule
from lk_backbones.tasks import AtomicCheckpointIO, ReproducibleSteps, SafeCheckpoints, SegmentationTask

from ..blocks import NUM_CLASSES, TRAIN_SIZES, loader, trainer

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals and limits")


def make(**kwargs: Any) -> SegmentationTask:
    L.seed_everything(5, verbose=False)
    encoder = {"encoder_kwargs": {"drop_path_rate": 0.5, "kernel_sizes": 3, "depths": [1, 1, 1, 1]}}
    return SegmentationTask("fpn", "replknet_31n", **({"num_classes": 9, "lr": 1e-3} | encoder | kwargs))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- atomic ---------------------------------------------------------------------------------------------------


def test_every_task_saves_atomically_whatever_the_trainer(tmp_path: Path) -> None:
    def plugin(**kwargs: Any) -> Any:
        fitter = trainer(tmp_path, max_steps=1, limit_val_batches=0, **kwargs)
        task = make(num_classes=NUM_CLASSES)
        fitter.fit(task, loader(TRAIN_SIZES, 4))
        fitter.fit(task, loader(TRAIN_SIZES, 4))
        assert sum(isinstance(callback, SafeCheckpoints) for callback in fitter.callbacks) == 1
        return fitter.strategy.checkpoint_io

    class Own(TorchCheckpointIO):
        pass

    assert type(plugin()) is AtomicCheckpointIO
    assert type(plugin(plugins=[Own()])) is Own
    asynchronous = plugin(plugins=[AsyncCheckpointIO(AtomicCheckpointIO())])
    assert type(asynchronous) is AsyncCheckpointIO
    assert type(asynchronous.checkpoint_io) is AtomicCheckpointIO
    assert type(plugin(callbacks=[SafeCheckpoints()])) is AtomicCheckpointIO


def test_saved_checkpoints_are_ordinary_files(tmp_path: Path) -> None:
    plugin, path = AtomicCheckpointIO(), tmp_path / "new" / ("ö" * 80 + ".ckpt")
    plugin.save_checkpoint({"number": 1}, path)
    plugin.save_checkpoint({"number": 2, "tensor": torch.arange(3)}, str(path))
    assert plugin.load_checkpoint(path, weights_only=True)["number"] == 2
    assert names(tmp_path) == [f"new/{path.name}"]
    if sys.platform != "win32":
        (tmp_path / "plain").touch()
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    plugin.save_checkpoint({"number": 3}, f"file://{tmp_path}/remote.ckpt")  # as any address: Lightning's way
    assert torch.load(tmp_path / "remote.ckpt", weights_only=True) == {"number": 3}
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint({}, path, storage_options={})


def test_what_a_killed_run_left_behind_is_removed_later(tmp_path: Path) -> None:
    running, abandoned, own = (tmp_path / UNFINISHED.replace("*", name) for name in ("running", "abandoned", "own"))
    own = tmp_path / ".my.tmp"
    for file in (running, abandoned, own):
        file.touch()
    for file in (abandoned, own):
        os.utime(file, (time.time() - 90_000,) * 2)
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert names(tmp_path) == sorted([own.name, running.name, "last.ckpt"])


class FullDisk(L.Callback):
    """Lets no file grow beyond half of a checkpoint from the third step on."""

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            import resource

            (checkpoint,) = Path("run").glob("last.ckpt")
            resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint.stat().st_size // 2, resource.RLIM_INFINITY))


SCENES = [
    *("--model", "SegmentationTask", "--model.architecture", "fpn", "--model.encoder", "replknet_31n"),
    *("--model.num_classes", "9"),
    *("--model.encoder_kwargs", '{"drop_path_rate": 0.2, "kernel_sizes": 3, "depths": [1, 1, 1, 1]}'),
    *("--data", "SyntheticScenesDataModule", "--data.image_size", "[64, 64]", "--data.batch_size", "2"),
    *("--data.train_images", "12", "--data.val_images", "2"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.num_sanity_val_steps", "0", "--trainer.logger", "false"),
    *("--trainer.limit_val_batches", "0", "--seed_everything", "7", "--trainer.deterministic", "true"),
    *("--trainer.callbacks", "lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.dirpath", "run"),
    *("--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.save_last", "true"),
    *("--trainer.callbacks.save_top_k", "0"),
]


@posix
def test_a_full_disk_leaves_the_earlier_checkpoint_and_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = ["--data.num_workers", "0", "--trainer.callbacks+", f"{__name__}.FullDisk", "--trainer.max_epochs", "1"]
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *SCENES, *full])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert f"the checkpoint {Path('run').absolute()}/last.ckpt cannot be saved: [Errno 27] File too large" in error
    assert "Traceback" not in error
    assert names(tmp_path / "run") == ["last.ckpt"]
    assert torch.load("run/last.ckpt", weights_only=True)["global_step"] == 2


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    # Lightning would write to this folder first: it is to be another file system.
    memory = {"TMPDIR": "/dev/shm"} if Path("/dev/shm").is_dir() else {}
    command = [sys.executable, "-m", "lk_backbones.cli", "fit", *SCENES, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | memory
    return subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


class Ballast(L.Callback):
    """Makes checkpoints so large that saving takes a while."""

    def on_save_checkpoint(self, trainer: L.Trainer, task: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["ballast"] = torch.zeros(32 * 2**20)


@posix
def test_a_kill_while_saving_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    process = start(
        tmp_path, "--data.num_workers", "0", "--trainer.callbacks+", f"{__name__}.Ballast", "--trainer.max_epochs", "9"
    )
    folder, size = tmp_path / "run", 128 * 2**20
    while process.poll() is None and not any(written >= size for written in sizes(folder)):
        time.sleep(0.01)
    while process.poll() is None and not any(written < size for written in sizes(folder)):
        time.sleep(0.0005)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] >= 1
    assert len(checkpoint["ballast"]) == size // 4
    assert all(path.match(UNFINISHED) or path.name == "last.ckpt" for path in folder.iterdir())


def sizes(folder: Path) -> list[int]:
    found = []
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):
            found.append(path.stat().st_size)
    return found


# --- SIGTERM --------------------------------------------------------------------------------------------------


class Terminate(L.Callback):
    """Sends this process a SIGTERM in the midst of a run."""

    def __init__(self, step: int, validating: bool = False) -> None:
        self.step = step
        self.validating = validating

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.validating:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and self.validating:
            os.kill(os.getpid(), signal.SIGTERM)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start


def fit(folder: Path, ckpt_path: str | None, *more: L.Callback, **options: Any) -> dict[str, torch.Tensor]:
    keep = ModelCheckpoint(folder, **options.pop("keep", {"save_last": True}))
    # three steps per epoch
    data = SyntheticScenesDataModule((64, 64), 6, 2, val_batch_size=1, batch_size=2, num_workers=0, seed=3)
    callbacks = [ReproducibleSteps(), *more, keep]
    fitter = trainer(folder, callbacks=callbacks, enable_checkpointing=True, max_epochs=2, **options)
    task = make()
    fitter.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return {key: value.clone() for key, value in task.state_dict().items()}


def averaging() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.5)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {None: fit(folder / "plain", None), averaging: fit(folder / "averaged", None, averaging())}


@posix
@pytest.mark.parametrize(
    ("signalled", "more", "options"),
    [
        (Terminate(1), None, {}),
        (Terminate(2), None, {}),
        (Terminate(4), None, {"keep": {}}),
        (Terminate(5), None, {}),
        (Terminate(3, validating=True), None, {}),
        (Terminate(1, validating=True), None, {"val_check_interval": 1}),
        (Terminate(3, validating=True), averaging, {}),
        (Terminate(4), averaging, {}),
    ],
    ids=["within an epoch", "in its last batch", "no last.ckpt kept", "in the very last batch", "in validation",
         "in validation within an epoch", "in validation with averaged weights", "with averaged weights"],
)  # fmt: skip
def test_sigterm_saves_and_the_resumed_run_ends_like_an_undisturbed_one(
    signalled: Terminate,
    more: Callable[[], L.Callback] | None,
    options: dict[str, Any],
    tmp_path: Path,
    undisturbed: dict[Any, dict[str, torch.Tensor]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    callbacks = [more()] if more else []
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, None, signalled, *callbacks, **options)
    assert stopped.value.code == 143
    last = tmp_path / "last.ckpt"
    assert f"--ckpt_path {last}" in caplog.text
    assert torch.load(last, weights_only=True)["global_step"] == signalled.step + (not signalled.validating)
    resumed = fit(tmp_path, str(last), *callbacks, **options)
    for key, value in undisturbed[more].items():
        assert torch.equal(resumed[key], value), key


@posix
def test_sigterm_to_all_processes_at_once_as_timeout_sends_it(tmp_path: Path) -> None:
    process = start(tmp_path, "--data.num_workers", "2", "--trainer.max_epochs", "500")
    while process.poll() is None and not (tmp_path / "run" / "last.ckpt").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 143, output
    assert f"--ckpt_path {tmp_path}/run/last.ckpt" in output.replace("\n", "")
    assert "Traceback" not in output
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] >= 1
    assert names(tmp_path / "run") == ["last.ckpt"]


@posix
def test_sigterm_ends_other_runs_without_saving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = make()
    data = SyntheticScenesDataModule((64, 64), 2, 3, 3, val_batch_size=1, batch_size=2, num_workers=0)
    for command in ("validate", "test", "predict"):
        caplog.clear()
        ended = trainer(tmp_path, callbacks=[Terminate(0, validating=True)])
        with pytest.raises(SystemExit) as stopped:
            getattr(ended, command)(task, data)
        assert stopped.value.code == 143
        assert "Terminated by SIGTERM." in caplog.text
    with pytest.raises(SystemExit) as stopped:  # checkpoints are switched off
        trainer(tmp_path, callbacks=[Terminate(0)]).fit(task, data)
    assert stopped.value.code == 143
    with pytest.raises(SystemExit) as stopped:
        trainer(tmp_path, callbacks=[Terminate(0, validating=True)], num_sanity_val_steps=2, enable_checkpointing=True,
                max_epochs=1).fit(task, data)  # fmt: skip
    assert stopped.value.code == 143
    assert names(tmp_path) == []
