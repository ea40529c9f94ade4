"""Checkpoints that lie: truncated, foreign, or made to run something when a command reads them."""

from __future__ import annotations

import collections
import copy
import importlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from lk_backbones import hub
from lk_backbones.cli import main
from lk_backbones.data import (
    ADE20KDataModule,
    PictureFolderDataModule,
    SegmentationDataModule,
    SyntheticScenesDataModule,
)
from lk_backbones.tasks import BaseTask, DetectionTask, SegmentationTask
from lk_backbones.weights import WeightsError
from tests.hostile.conftest import Refused

QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.num_sanity_val_steps", "0", "--trainer.logger", "false"),
]
SMALL = {"kernel_sizes": 3, "depths": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
TASK = [
    *("--model", "SegmentationTask", "--model.architecture", "fpn", "--model.encoder", "replknet_31n"),
    *("--model.num_classes", "9", "--model.encoder_kwargs", json.dumps(SMALL)),
    *("--model.architecture_kwargs", '{"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}'),
]
DATA = [
    *("--data", "SyntheticScenesDataModule", "--data.image_size", "[64, 64]", "--data.train_images", "2"),
    *("--data.val_images", "1", "--data.test_images", "1", "--data.num_workers", "0", "--data.batch_size", "2"),
]
FIT = [*TASK, *DATA, *QUIET, "--trainer.limit_val_batches", "0", "--trainer.max_steps", "1"]

Content = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `lk-backbones fit` writes it."""
    folder = tmp_path_factory.mktemp("trained")
    main(["fit", *FIT, "--trainer.default_root_dir", str(folder)])
    (path,) = folder.rglob("*.ckpt")
    return path


@pytest.fixture(scope="module")
def original(trained: Path) -> Content:
    content: Content = torch.load(trained, weights_only=True)
    assert content["hyper_parameters"]["_instantiator"] == "lightning.pytorch.cli.instantiate_module"
    return content


@pytest.fixture
def content(original: Content) -> Content:
    """The content of that checkpoint, to be tampered with."""
    return copy.deepcopy(original)


# ---- files that are no checkpoints ----

BROKEN = {
    "empty": b"",
    "text": b"not a checkpoint",
    "truncated": b"PK\x03\x04" + bytes(200),
    "pickle": b"\x80\x04cos\nsystem\n.",
    "zip": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("command", ["validate", "test", "predict", "fit"])
def test_a_broken_file_is_named(command: str, content: bytes, workspace: Path, refused: Refused) -> None:
    (workspace / "broken.ckpt").write_bytes(content)
    more = FIT if command == "fit" else []
    message = refused([command, *more, "--ckpt_path", "broken.ckpt"], "broken.ckpt is not a checkpoint")
    assert "weights_only" not in message


@pytest.mark.parametrize("command", ["validate", "fit"])
def test_half_a_checkpoint_is_named(command: str, trained: Path, workspace: Path, refused: Refused) -> None:
    (workspace / "half.ckpt").write_bytes(trained.read_bytes()[: trained.stat().st_size // 2])
    more = FIT if command == "fit" else []
    message = refused([command, *more, "--ckpt_path", "half.ckpt"], "half.ckpt", "truncated")
    assert "weights_only" not in message


@pytest.mark.parametrize("command", ["validate", "fit", "hub", "convert"])
def test_a_flipped_bit_is_found(command: str, trained: Path, workspace: Path, refused: Refused) -> None:
    """torch.load does not compare checksums: one bit of a weight changes without a word."""
    data = bytearray(trained.read_bytes())
    with zipfile.ZipFile(trained) as archive:
        weights = [part for part in archive.infolist() if "/data/" in part.filename]
        part = max(weights, key=lambda part: part.file_size)
        name_and_extra = int.from_bytes(data[part.header_offset + 26 : part.header_offset + 28], "little")
        name_and_extra += int.from_bytes(data[part.header_offset + 28 : part.header_offset + 30], "little")
    data[part.header_offset + 30 + name_and_extra + part.file_size // 2] ^= 0x10
    (workspace / "flipped.ckpt").write_bytes(data)
    torch.load(workspace / "flipped.ckpt", weights_only=True)  # the control: nothing is noticed
    args = {
        "validate": ["validate", "--ckpt_path", "flipped.ckpt"],
        "fit": ["fit", *FIT, "--ckpt_path", "flipped.ckpt"],
        "hub": ["hub", "publish", "flipped.ckpt", "--repo", "you/x", "--dry-run"],
        "convert": ["convert", "flipped.ckpt"],
    }
    refused(args[command], "flipped.ckpt", "checksum")


class Runs:
    """Runs a function when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.canary),))


@pytest.mark.parametrize("place", ["state_dict", "hyper_parameters", "datamodule_hyper_parameters", "callbacks"])
@pytest.mark.parametrize("command", ["validate", "fit"])
def test_a_pickle_is_not_unpickled(
    command: str, place: str, content: Content, canary: Path, workspace: Path, refused: Refused
) -> None:
    content[place] = {**content[place], "extra": Runs(canary)}
    torch.save(content, workspace / "pickle.ckpt")
    more = FIT if command == "fit" else []
    message = refused([command, *more, "--ckpt_path", "pickle.ckpt"], "pickle.ckpt", "posix.mkdir")
    assert "weights_only" not in message


# ---- checkpoints of tensors and plain values only, that name what to run ----


def opens(canary: Path) -> dict[str, Any]:
    """What an instantiator would turn into an open file, at once."""
    return {"class_path": "logging.FileHandler", "init_args": {"filename": str(canary)}}


def starts(canary: Path) -> dict[str, Any]:
    """What an instantiator would turn into a process."""
    command = [sys.executable, "-c", f"open({str(canary)!r}, 'w')"]
    return {"class_path": "subprocess.Popen", "init_args": {"args": command}}


def model(**values: Any) -> Callable[[Content], None]:
    return lambda content: content["hyper_parameters"].update(values)


def data(**values: Any) -> Callable[[Content], None]:
    return lambda content: content["datamodule_hyper_parameters"].update(values)


def model_only(**values: Any) -> Callable[[Content], None]:
    return lambda content: content.update(hyper_parameters=values)


def data_only(**values: Any) -> Callable[[Content], None]:
    return lambda content: content.update(datamodule_hyper_parameters=values)


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Content], None]:
    return lambda content: content["state_dict"].update({key: change(v) for key, v in content["state_dict"].items()})


def _deep(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def _bomb() -> list[Any]:
    value: list[Any] = [0]
    for _ in range(40):
        value = [value, value]
    return value


def _endless() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["again"] = value
    return value


# What is done to the checkpoint, and what the error names. `C` stands for the canary.
TAMPERED: dict[str, tuple[Callable[[Any], Callable[[Content], None]], tuple[str, ...]]] = {
    "encoder_kwargs": (lambda c: model(encoder_kwargs=opens(c)), ("class_path",)),
    "a process": (lambda c: model(encoder_kwargs={"kernel_sizes": 3, "act_layer": starts(c)}), ()),
    "below encoder_kwargs": (lambda c: model(encoder_kwargs={"kernel_sizes": 3, "act_layer": opens(c)}), ()),
    "a list in encoder_kwargs": (lambda c: model(encoder_kwargs={"kernel_sizes": [opens(c)]}), ()),
    "architecture_kwargs": (lambda c: model(architecture_kwargs=opens(c)), ("class_path",)),
    "below architecture_kwargs": (lambda c: model(architecture_kwargs={"decoder_dropout": opens(c)}), ()),
    "class_names": (lambda c: model(class_names=opens(c)), ("class_names",)),
    "a class's name": (lambda c: model(class_names=[opens(c)] * 9), ("class_names",)),
    "encoder": (lambda c: model(encoder=opens(c)), ("encoder",)),
    "loss": (lambda c: model(loss=opens(c)), ("loss",)),
    "a number": (lambda c: model(lr=opens(c)), ("lr",)),
    "the arguments themselves": (lambda c: model(**opens(c)), ("class_path",)),
    "nothing but that": (lambda c: model_only(**opens(c)), ("class_path",)),
    "dict_kwargs": (lambda c: model(dict_kwargs={"encoder_kwargs": opens(c)}), ("dict_kwargs",)),
    "init_args": (lambda c: model(init_args={"encoder_kwargs": opens(c)}), ("init_args",)),
    "model class": (
        lambda c: model_only(_class_path="logging.FileHandler", filename=str(c)),
        ("logging.FileHandler", "--model"),
    ),
    "model module": (lambda c: model(_class_path="evil.SegmentationTask"), ("evil.SegmentationTask", "--model")),
    "model class of Lightning": (
        lambda c: model(_class_path="lightning.pytorch.demos.boring_classes.BoringModel"),
        ("BoringModel",),
    ),
    "abstract class": (lambda c: model(_class_path="lk_backbones.tasks.BaseTask"), ("BaseTask",)),
    "another class of ours": (lambda c: model(_class_path="lk_backbones.tasks.Overlays"), ("Overlays",)),
    "model class as a dictionary": (lambda c: model(_class_path=opens(c)), ("_class_path",)),
    "model class as a list": (lambda c: model(_class_path=["lk_backbones.tasks.SegmentationTask"]), ("_class_path",)),
    "instantiator": (lambda c: model(_instantiator="evil.instantiate", encoder_kwargs=opens(c)), ()),
    "hparams of old": (
        lambda c: lambda content: content.update(hparams=opens(c), hyper_parameters=opens(c)),
        ("class_path",),
    ),
    "data class": (
        lambda c: data_only(_class_path="logging.FileHandler", filename=str(c)),
        ("logging.FileHandler", "--data"),
    ),
    "data module": (lambda c: data(_class_path="evil.Data"), ("evil.Data", "--data")),
    "data factory": (
        lambda c: data_only(_class_path="lightning.pytorch.LightningDataModule.from_datasets", train_dataset=opens(c)),
        ("from_datasets",),
    ),
    "data base": (lambda c: data(_class_path="lightning.pytorch.LightningDataModule"), ("LightningDataModule",)),
    "data abstract": (lambda c: data(_class_path="lk_backbones.data.SegmentationDataModule"), ()),
    "data that is a task": (lambda c: data(_class_path="lk_backbones.tasks.SegmentationTask"), ("SegmentationTask",)),
    "data size": (lambda c: data(image_size=opens(c)), ("image_size",)),
    "data seed": (lambda c: data(seed=opens(c)), ("seed",)),
    "data unknown": (lambda c: data(transform=opens(c)), ("transform",)),
    "data kwargs": (lambda c: data(dict_kwargs=opens(c)), ("dict_kwargs",)),
    "data arguments": (lambda c: data(**opens(c)), ("class_path",)),
    # values that are no exploit, but no arguments either
    "no arguments": (lambda c: lambda content: content.pop("hyper_parameters"), ("hyper_parameters",)),
    "arguments as a list": (lambda c: lambda content: content.update(hyper_parameters=[1]), ("hyper_parameters",)),
    "data as text": (
        lambda c: lambda content: content.update(datamodule_hyper_parameters="x"),
        ("datamodule_hyper_parameters",),
    ),
    "no state": (lambda c: lambda content: content.pop("state_dict"), ("state_dict",)),
    "state as a list": (lambda c: lambda content: content.update(state_dict=[]), ("state_dict",)),
    "weights as numbers": (
        lambda c: lambda content: content["state_dict"].update({next(iter(content["state_dict"])): 1.0}),
        ("no ordinary tensors",),
    ),
    "weights that are not numbers": (lambda c: weights(lambda value: value * float("nan")), ("holds NaN",)),
    "complex weights": (lambda c: weights(lambda value: value.to(torch.complex64)), ("complex64",)),
    "whole numbers as weights": (lambda c: weights(lambda value: value.to(torch.int8)), ("int8",)),
    "too deep": (lambda c: model(encoder_kwargs={"a": _deep(1, 60)}), ("encoder_kwargs",)),
    "too many": (lambda c: model(encoder_kwargs={"a": _bomb()}), ("encoder_kwargs",)),
    "endless": (lambda c: model(architecture_kwargs=_endless()), ("architecture_kwargs",)),
    "number as text": (lambda c: model(lr="1"), ("lr",)),
    "text as number": (lambda c: model(architecture=1), ("architecture",)),
    "switch as text": (lambda c: model(tta_flip="no"), ("tta_flip",)),
    "tensor": (lambda c: model(lr=torch.tensor(1.0)), ("lr",)),
    "set": (lambda c: model(class_names={"a"}), ("class_names",)),
    "keys of numbers": (lambda c: model(encoder_kwargs={1: 2}), ("encoder_kwargs",)),
    "argument of a number": (lambda c: lambda content: content["hyper_parameters"].update({1: 2}), ("key 1",)),
    "huge number": (lambda c: model(num_classes=10**500), ("num_classes",)),
    "not finite": (lambda c: model(lr=float("inf")), ("lr",)),
    "huge list": (lambda c: model(class_names=["a"] * 200_000), ("hyper_parameters",)),
    # further ways in
    "subclass specification": (
        lambda c: model(encoder_kwargs={"kernel_sizes": 3, "a": {"b": [{"c": {"d": opens(c)}}]}}),
        (),
    ),
    "specification with dict_kwargs": (
        lambda c: model(architecture_kwargs={"a": {"class_path": "logging.FileHandler", "dict_kwargs": {"x": 1}}}),
        (),
    ),
    "factory as a class": (lambda c: model_only(_class_path="os.mkdir", path=str(c)), ("os.mkdir",)),
    "path of a method": (
        lambda c: model(_class_path="lk_backbones.tasks.SegmentationTask.load_from_checkpoint"),
        ("load_from_checkpoint",),
    ),
    "private module": (lambda c: model(_class_path="lk_backbones.tasks.base.os.system"), ("os.system",)),
    "the module of a class": (lambda c: model(_class_path="lk_backbones.tasks.segmentation"), ("_class_path",)),
    "trailing class": (lambda c: model(_class_path="evil;SegmentationTask"), ("evil;SegmentationTask",)),
    "class that is no text": (lambda c: model(_class_path=7), ("_class_path",)),
    "self": (lambda c: model(self=opens(c)), ("self",)),
    "class of the object": (lambda c: model(__class__=opens(c), __init__=opens(c), learning=1), ("learning",)),
    "weights from a file": (
        lambda c: model(encoder_kwargs={"kernel_sizes": 3, "checkpoint_path": str(c)}),
        ("checkpoint_path",),
    ),
    "weights from the network": (
        lambda c: model(encoder_kwargs={"kernel_sizes": 3, "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x"}}),
        ("pretrained_cfg_overlay",),
    ),
    "weights of the architecture": (
        lambda c: model(architecture_kwargs={"encoder_weights": "imagenet"}),
        ("encoder_weights",),
    ),
    "encoder of the network": (lambda c: model(encoder="hf-hub:you/evil"), ("hf-hub:you/evil", "may not say where")),
    "encoder of a folder": (lambda c: model(encoder="local-dir:/tmp"), ("local-dir:/tmp", "may not say where")),
    "escape sequences": (lambda c: model(**{"\x1b[31mred": 1}), ("red",)),
    "escape sequences in a class": (lambda c: model(_class_path="\x1b]0;title\x07.Task"), ("_class_path",)),
    "half a letter": (lambda c: model(encoder="\ud800"), ("encoder",)),
    "an allowed function": (
        lambda c: model(encoder_kwargs={"a": torch._utils._rebuild_tensor_v2}),
        ("encoder_kwargs",),
    ),
    "an allowed class": (lambda c: model(loss=collections.OrderedDict), ("loss",)),
    "a type of numbers": (lambda c: model(lr=torch.float32), ("lr",)),
    "loops as text": (lambda c: lambda content: content.update(loops="x"), ("loops",)),
    "states as numbers": (lambda c: lambda content: content.update(callbacks=5), ("callbacks",)),
    "version as a dictionary": (
        lambda c: lambda content: content.update({"pytorch-lightning_version": opens(c)}),
        ("pytorch-lightning_version",),
    ),
    "weights without values": (
        lambda c: (
            lambda content: content["state_dict"].update(
                {key: value.to("meta") for key, value in content["state_dict"].items()}
            )
        ),
        (),
    ),
    "no weights": (lambda c: lambda content: content.update(state_dict={}), ("missing",)),
    "data state": (lambda c: lambda content: content.update(SyntheticScenesDataModule={"seed": opens(c)}), ()),
    "data state as a list": (lambda c: lambda content: content.update(SyntheticScenesDataModule=[1]), ()),
    "data class of a task": (lambda c: data(_class_path="lk_backbones.data.ClassTable"), ("ClassTable",)),
    "data number of workers": (lambda c: data(num_workers=-1), ("num_workers",)),
    "data size of nothing": (lambda c: data(image_size=[0, 0]), ("image_size",)),
    "data below a list": (lambda c: data(image_size=[opens(c), opens(c)]), ("image_size",)),
    "unknown argument": (lambda c: model(learning_rate=1.0), ("learning_rate",)),
}


def spoil(content: Content, name: str, canary: Path, file: Path) -> tuple[str, ...]:
    """Write the tampered checkpoint; returns what an error about it must name."""
    tamper, names = TAMPERED[name]
    tamper(canary)(content)
    torch.save(content, file)
    torch.load(file, weights_only=True)  # the control: torch finds nothing wrong
    # a module that runs something when it is imported
    sys.modules.pop("evil", None)
    importlib.invalidate_caches()
    (file.parent / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    return names


@contextmanager
def time_to_start(name: str) -> Iterator[None]:
    """A process that was started has not written its file yet when the command ends."""
    try:
        yield
    finally:
        time.sleep(0.5 if "process" in name else 0)


@pytest.fixture
def importable(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a command runs, from which modules are found, as with ``python -m lk_backbones``."""
    monkeypatch.syspath_prepend(str(workspace))
    return workspace


# Plain values, each of which is of the right type: what of memory, time or processes would they take?
GREEDY: dict[str, tuple[Callable[[Content], None], tuple[str, ...]]] = {
    "classes": (model(num_classes=60_000, class_names=None, class_colors=None), ("too many classes",)),
    "many more classes": (model(num_classes=10**9, class_names=None, class_colors=None), ("far larger",)),
    "input channels": (model(in_channels=10**9), ("far larger",)),
    "depths": (model(encoder_kwargs=SMALL | {"depths": [10**6] * 4}), ("far larger",)),
    "channels": (model(encoder_kwargs=SMALL | {"channels": [10**6] * 4}), ("far larger",)),
    "kernels": (model(encoder_kwargs=SMALL | {"kernel_sizes": 9999}), ("far larger",)),
    "branches": (
        model(
            encoder="unireplknet_a", encoder_kwargs=SMALL | {"kernel_sizes": 13, "branches": {"13": [[3, 1]] * 5000}}
        ),
        ("far larger",),
    ),
    "branches of a huge kernel": (
        model(
            encoder="unireplknet_a", encoder_kwargs=SMALL | {"kernel_sizes": 99_999, "branches": {"99999": [[5, 1]]}}
        ),
        ("far larger",),
    ),
    "another encoder": (model(encoder="replknet_xl", encoder_kwargs={}), ("far larger",)),
    "decoder": (model(architecture_kwargs={"decoder_pyramid_channels": 10**6}), ("far larger",)),
    "auxiliary head": (model(auxiliary_weight=1.0, auxiliary_channels=10**6), ("far larger",)),
    "scale": (model(tta_scales=[1e4]), ("tta_scales",)),
    "scales": (model(tta_scales=[1.0] * 50_000), ("tta_scales",)),
    "long message": (model(class_weights=[1.0] * 90_000), ("class_weights",)),
    "pictures": (data(val_images=10**9), ("val_images", "at most 1048576")),
    "picture": (data(image_size=[10**5, 10**5]), ("image_size[0]", "at most 8192")),
    "batch": (data(val_batch_size=10**9), ("val_batch_size", "at most 1024")),
    "processes": (data(num_workers=10**5), ("num_workers", "at most 256")),
    "no state of the loops": (lambda content: content.update(loops={}), ("'loops' lack fit_loop",)),
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_checkpoint_that_asks_for_any_amount_is_refused(
    name: str, content: Content, workspace: Path, refused: Refused
) -> None:
    change, names = GREEDY[name]
    change(content)
    torch.save(content, workspace / "greedy.ckpt")
    message = refused(["validate", "--ckpt_path", "greedy.ckpt", *QUIET], "greedy.ckpt", *names)
    assert len(message) < 2000


@pytest.mark.parametrize("name", ["classes", "kernels", "scale"])
def test_so_does_python(name: str, content: Content, workspace: Path) -> None:
    GREEDY[name][0](content)
    torch.save(content, workspace / "greedy.ckpt")
    with pytest.raises(WeightsError, match=r"greedy\.ckpt"):
        SegmentationTask.load_from_checkpoint("greedy.ckpt")


def test_numbers_that_a_file_repeats_without_holding_them_do_not_count(content: Content, workspace: Path) -> None:
    """A tensor of stride 0 takes a number's room on the disk, whatever its shape."""
    content["state_dict"]["large"] = torch.zeros(1).expand(10**6, 10**6)
    content["hyper_parameters"]["encoder_kwargs"] = SMALL | {"kernel_sizes": 9999}
    torch.save(content, workspace / "greedy.ckpt")
    with pytest.raises(WeightsError, match="far larger"):
        SegmentationTask.load_from_checkpoint("greedy.ckpt")


SIZES: dict[str, Callable[[Path], Any]] = {
    "text": lambda _: "large",
    "one": lambda _: [512],
    "zero": lambda _: [0, 0],
    "negative": lambda _: [2048, -512],
    "fractions": lambda _: [20.5, 10.5],
    "switches": lambda _: [True, True],
    "huge": lambda _: [10**6, 10**6],
    "endless digits": lambda _: [10**500, 10**500],
    "process": lambda canary: opens(canary),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_pictures_that_is_none(
    name: str, content: Content, canary: Path, workspace: Path, refused: Refused
) -> None:
    Image.new("RGB", (20, 10)).save(workspace / "a.png")
    content["datamodule_hyper_parameters"]["test_size"] = SIZES[name](canary)
    torch.save(content, workspace / "evil.ckpt")
    refused(["predict", "--ckpt_path", "evil.ckpt", "--pictures", "a.png", *QUIET], "evil.ckpt", "test_size")
    with pytest.raises(ValueError, match=r"evil\.ckpt.*test_size must be two lengths"):
        PictureFolderDataModule.load_from_checkpoint("evil.ckpt", folder="a.png")


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_checkpoint_is_refused(
    name: str, content: Content, canary: Path, importable: Path, refused: Refused
) -> None:
    names = spoil(content, name, canary, importable / "evil.ckpt")
    with time_to_start(name):
        refused(["validate", "--ckpt_path", "evil.ckpt", *QUIET], "evil.ckpt", *names)


ROUTES = (
    "encoder_kwargs",
    "a process",
    "architecture_kwargs",
    "model class",
    "model module",
    "data factory",
    "data module",
)


@pytest.mark.parametrize("name", ["a process", "model module", "data factory"])
@pytest.mark.parametrize("command", ["test", "predict"])
def test_so_do_the_other_commands(
    command: str, name: str, content: Content, canary: Path, importable: Path, refused: Refused
) -> None:
    names = spoil(content, name, canary, importable / "evil.ckpt")
    with time_to_start(name):
        refused([command, "--ckpt_path", "evil.ckpt", *QUIET], "evil.ckpt", *names)


OF_MODEL = [name for name, (_, _) in TAMPERED.items() if not name.startswith("data")]


@pytest.mark.parametrize("name", OF_MODEL)
def test_so_does_the_python_interface(name: str, content: Content, canary: Path, importable: Path) -> None:
    # whoever names a class gets that class, whatever the file says
    names_a_class = {"class", "module", "path"} & {*name.split()} and "allowed" not in name
    task = BaseTask if names_a_class else SegmentationTask
    spoil(content, name, canary, importable / "evil.ckpt")
    with time_to_start(name), pytest.raises(ValueError, match=r"evil\.ckpt"):
        task.load_from_checkpoint(importable / "evil.ckpt")


@pytest.mark.parametrize("name", [name for name in TAMPERED if name.startswith("data ")])
def test_so_do_data_modules(name: str, content: Content, canary: Path, importable: Path) -> None:
    spoil(content, name, canary, importable / "evil.ckpt")
    cls = SegmentationDataModule if "class" in name or "module" in name else SyntheticScenesDataModule
    if name in ("data factory", "data base", "data abstract", "data that is a task"):
        cls = SegmentationDataModule
    with pytest.raises(ValueError, match=r"evil\.ckpt"):
        cls.load_from_checkpoint(importable / "evil.ckpt")


@pytest.mark.parametrize("name", [*ROUTES[:5], "class_names", "dict_kwargs", "too deep", "too many", "endless", "set"])
def test_so_do_the_tools_of_the_hub(
    name: str, content: Content, canary: Path, importable: Path, refused: Refused
) -> None:
    spoil(content, name, canary, importable / "evil.ckpt")
    with time_to_start(name):
        with pytest.raises(ValueError, match=r"evil\.ckpt"):
            hub.load_model("evil.ckpt")
        refused(["convert", "evil.ckpt"], "evil.ckpt")
        refused(["hub", "publish", "evil.ckpt", "--repo", "you/x", "--dry-run"], "evil.ckpt")


@pytest.mark.parametrize("name", ["encoder_kwargs", "model class", "model module", "instantiator", "data factory"])
def test_weights_alone_and_a_resumed_run_heed_nothing_of_it(
    name: str, content: Content, canary: Path, importable: Path
) -> None:
    """The encoder's weights are wanted, or the run's own configuration counts: what else the file says is not read."""
    spoil(content, name, canary, importable / "evil.ckpt")
    task = SegmentationTask("fpn", "replknet_31n", encoder_weights="evil.ckpt", encoder_kwargs=SMALL)
    key = next(key for key in content["state_dict"] if key.startswith("model.encoder."))
    assert torch.equal(task.state_dict()[key], content["state_dict"][key])
    main(["fit", *FIT[:-1], "2", "--ckpt_path", "evil.ckpt", "--trainer.default_root_dir", "out"])
    assert list(Path("out").rglob("*.ckpt"))


# What the state of ModelCheckpoint calls its own earlier checkpoints; `C` is a folder of the user's.
EARLIER = {
    "another protocol": "local://{C}",
    "a chain of protocols": "simplecache::local://{C}/thesis.ckpt",
    "through the run's folder": "out/checkpoints/../../{name}/thesis.ckpt",
    "nothing like a path": 5,
}


@pytest.mark.parametrize("options", [{}, {"monitor": "step", "mode": "max", "save_last": True}], ids=["newest", "best"])
@pytest.mark.parametrize("path", EARLIER.values(), ids=EARLIER)
def test_a_resumed_run_removes_nothing_of_the_users(
    path: Any, options: dict[str, Any], content: Content, workspace: Path
) -> None:
    mine = workspace / "mine"
    mine.mkdir()
    (mine / "thesis.ckpt").write_bytes(b"years of work")
    forged = path.format(C=mine, name="mine") if isinstance(path, str) else path
    keeper = ModelCheckpoint(**options)
    state = dict.fromkeys(("best_model_path", "last_model_path", "kth_best_model_path"), forged)
    worst = torch.tensor(-1.0)
    state |= {"dirpath": "out/checkpoints", "best_model_score": worst, "kth_value": worst}
    content["callbacks"] = {keeper.state_key: state | {"best_k_models": {forged: worst}}}
    torch.save(content, "evil.ckpt")
    task = SegmentationTask.load_from_checkpoint("evil.ckpt")
    data = SyntheticScenesDataModule.load_from_checkpoint("evil.ckpt")
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=2, limit_val_batches=0, num_sanity_val_steps=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir="out", callbacks=[keeper],
    )  # fmt: skip
    trainer.fit(task, data, ckpt_path="evil.ckpt", weights_only=True)
    assert trainer.global_step == 2
    assert (mine / "thesis.ckpt").read_bytes() == b"years of work"
    assert list(Path("out").rglob("*.ckpt"))


# ---- what remains allowed ----


def test_a_resumed_run_still_replaces_its_own(trained: Path, workspace: Path) -> None:
    quiet = [*FIT[:-1], "1", "--trainer.default_root_dir", "out"]
    main(["fit", *quiet])
    (first,) = Path("out").rglob("*.ckpt")
    shutil.copy(first, "copy.ckpt")
    main(["fit", *quiet, "--trainer.max_steps", "2", "--ckpt_path", "copy.ckpt"])
    (second,) = Path("out").rglob("*.ckpt")
    assert second != first


def test_classes_that_a_user_names_are_built(trained: Path, workspace: Path) -> None:
    shutil.copy(trained, "my.ckpt")
    task = DetectionTask.load_from_checkpoint
    with pytest.raises(ValueError, match=r"my\.ckpt.*SegmentationTask"):
        task("my.ckpt")
    assert isinstance(BaseTask.load_from_checkpoint("my.ckpt"), SegmentationTask)

    class Mine(SegmentationTask):
        pass

    assert type(Mine.load_from_checkpoint("my.ckpt", lr=0.5)) is Mine
    again = SyntheticScenesDataModule.load_from_checkpoint("my.ckpt", val_images=7)
    assert (again.hparams["val_images"], again.hparams["train_images"], again.batch_size) == (7, 2, 2)
    assert type(SegmentationDataModule.load_from_checkpoint("my.ckpt")) is SyntheticScenesDataModule
    with pytest.raises(ValueError, match=r"my\.ckpt.*SyntheticScenesDataModule"):
        ADE20KDataModule.load_from_checkpoint("my.ckpt")


def test_a_class_of_the_users_own_is_asked_for_by_name(content: Content, workspace: Path, refused: Refused) -> None:
    content["datamodule_hyper_parameters"]["_class_path"] = "my.package.Streets"
    torch.save(content, "mine.ckpt")
    refused(["validate", "--ckpt_path", "mine.ckpt"], "mine.ckpt", "my.package.Streets", "--data", "--config")
    main(["validate", "--ckpt_path", "mine.ckpt", *DATA, *QUIET])
