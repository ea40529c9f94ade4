"""``config.json`` that lies: arguments that fetch or read, wrong types, no JSON. Each is one error of file and key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from lk_backbones import hub as lk_hub
from lk_backbones.tasks import ClassificationTask, DetectionTask, SegmentationTask
from lk_backbones.tasks.base import without_encoder_weights
from lk_backbones.weights import WeightsError
from tests.hostile.conftest import Refused
from tests.hub.conftest import client, hub  # noqa: F401
from tests.hub.server import LoopbackHub, Repository

TINY = {"depths": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "kernel_sizes": 3}
TASK = {"encoder": "replknet_31n", "encoder_kwargs": TINY, "architecture": "unet", "num_classes": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, an smp model and a task, as they are published."""
    import segmentation_models_pytorch as smp

    folder = tmp_path_factory.mktemp("published")
    models = {
        "encoder": timm.create_model("replknet_31n", num_classes=5, **TINY),
        "smp": smp.Unet("tu-replknet_31n", encoder_weights=None, **TINY),
        "task": SegmentationTask(**TASK),
    }
    for name, model in models.items():
        lk_hub.push(model, f"you/{name}", folder=folder / name, dry_run=True)
    return folder


@pytest.fixture
def published(folders: Path, workspace: Path) -> Callable[[str, Callable[[dict[str, Any]], Any]], Path]:
    """Copy a published folder into the workspace and change its ``config.json``."""

    def make(kind: str, change: Callable[[dict[str, Any]], Any]) -> Path:
        folder = workspace / kind
        shutil.copytree(folders / kind, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        change(config)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make


PUBLISH = ["hub", "publish", "--repo", "you/x", "--dry-run", "--folder", "out"]


@pytest.mark.parametrize("kind", ["encoder", "smp", "task"])
def test_an_honest_one_passes(kind: str, published: Any) -> None:
    folder = published(kind, lambda config: config)
    assert lk_hub.load_model(folder).state_dict().keys()


class Payload:
    """What a malicious weight file does when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.canary,))


# Keyword arguments with which timm fetches or reads; what each needs of FILE and URL is put in.
FETCHING: dict[str, dict[str, Any]] = {
    "checkpoint_path": {"checkpoint_path": "FILE"},
    "pretrained_cfg url": {"pretrained": True, "pretrained_cfg": {"url": "URL", "architecture": "replknet_31n"}},
    "pretrained_cfg file": {"pretrained": True, "pretrained_cfg": {"file": "FILE", "architecture": "replknet_31n"}},
    "pretrained_cfg_overlay": {"pretrained": True, "pretrained_cfg_overlay": {"file": "FILE"}},
    "overlay hub": {"pretrained": True, "pretrained_cfg_overlay": {"hf_hub_id": "you/evil", "source": "hf-hub"}},
    "cache_dir": {"cache_dir": "FILE"},
    "pretrained_strict": {"pretrained_strict": True},
    "hf_hub_id": {"hf_hub_id": "you/evil"},
    "encoder_weights": {"encoder_weights": "hf-hub:you/evil"},
}


def change_encoder(config: dict[str, Any], arguments: dict[str, Any]) -> None:
    config["model_args"] |= arguments


def change_smp(config: dict[str, Any], arguments: dict[str, Any]) -> None:
    config |= {key: value for key, value in arguments.items() if key != "encoder_weights"}
    config["aux_params"] = {"classes": 2} | {key: value for key, value in arguments.items() if key == "encoder_weights"}


def change_task(config: dict[str, Any], arguments: dict[str, Any]) -> None:
    config["_lk_backbones"]["hyper_parameters"]["encoder_kwargs"] |= arguments


def change_architecture(config: dict[str, Any], arguments: dict[str, Any]) -> None:
    config["_lk_backbones"]["hyper_parameters"]["architecture_kwargs"] = arguments


def by_publish(folder: Path, refused: Refused) -> str:
    return refused([*PUBLISH, str(folder)])


def by_encoder(folder: Path, refused: Refused) -> str:
    task = {"class_path": "SegmentationTask", "init_args": TASK | {"encoder": f"local-dir:{folder}"}}
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        SegmentationTask(**task["init_args"] | {"encoder_kwargs": None})
    return str(raised.value)


def by_checkpoint(folder: Path, refused: Refused) -> str:
    config = json.loads((folder / "config.json").read_text())
    checkpoint = {
        "state_dict": SegmentationTask(**TASK).state_dict(),
        "hyper_parameters": config["_lk_backbones"]["hyper_parameters"],
    }
    torch.save(checkpoint, folder / "task.ckpt")
    return refused([*PUBLISH, str(folder / "task.ckpt")])


ROUTES = {
    "timm form": ("encoder", change_encoder, by_publish),
    "encoder=local-dir:": ("encoder", change_encoder, by_encoder),
    "smp form": ("smp", change_smp, by_publish),
    "task, encoder_kwargs": ("task", change_task, by_publish),
    "task, architecture_kwargs": ("task", change_architecture, by_publish),
    "checkpoint": ("task", change_task, by_checkpoint),
}


def fill(value: Any, file: Path, url: str) -> Any:
    if isinstance(value, dict):
        return {key: fill(inner, file, url) for key, inner in value.items()}
    return {"FILE": str(file), "URL": url}.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize("arguments", FETCHING.values(), ids=FETCHING)
@pytest.mark.parametrize("route", ROUTES)
def test_an_argument_that_fetches_is_refused_by_name(
    route: str,
    arguments: dict[str, Any],
    published: Any,
    hub: LoopbackHub,  # noqa: F811
    canary: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    kind, change, read = ROUTES[route]
    evil = tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "evil": Payload(canary)}, evil)
    hub.repositories["mirror"] = Repository()
    hub.repositories["mirror"].commit({"evil.pth": evil.read_bytes()})
    hub.add("you/evil", {"pytorch_model.bin": evil.read_bytes(), "config.json": b"{}"})
    filled = fill(arguments, evil, f"{hub.endpoint}/mirror/evil.pth")
    folder = published(kind, lambda config: change(config, filled))
    message = read(folder, refused) if read is not by_checkpoint else read(folder, allow(refused, "task.ckpt"))
    assert any(name in message for name in arguments), message
    assert hub.requests == []
    assert not canary.exists()


def allow(refused: Refused, name: str) -> Refused:
    return lambda args, *names: refused(args, *names, leaves=[name])


@pytest.mark.parametrize("weights", [None, True])
@pytest.mark.parametrize(
    "name", ["hf-hub:you/evil", "tu-hf-hub:you/evil", "local-dir:EVIL", "tu-resnet18.hf-hub:you/evil"]
)
def test_a_repository_in_place_of_an_encoder_is_not_fetched(
    name: str,
    weights: bool | None,
    published: Any,
    hub: LoopbackHub,  # noqa: F811
    refused: Refused,
) -> None:
    hub.add("you/evil", {"config.json": b'{"architecture": "resnet18"}'})
    smp_form = published("smp", lambda config: config.update(encoder_name=name, encoder_weights=weights))
    refused([*PUBLISH, str(smp_form)], "encoder_name", name.removeprefix("tu-"))
    task_form = published(
        "task",
        lambda config: config["_lk_backbones"]["hyper_parameters"].update(
            encoder=name, encoder_weights=weights, encoder_kwargs=None
        ),
    )
    refused([*PUBLISH, str(task_form)], name.removeprefix("tu-"))
    assert hub.requests == []


@pytest.mark.parametrize("task", [ClassificationTask, DetectionTask, SegmentationTask])
@pytest.mark.parametrize("kwargs", [{"pretrained_cfg_overlay": {"file": "x.pth"}}, {"checkpoint_path": "x.pth"}])
def test_a_task_names_what_would_be_right(task: Any, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"encoder_kwargs: '{next(iter(kwargs))}'.*encoder_weights takes a file"):
        task(encoder_kwargs=TINY | kwargs)
    with without_encoder_weights(), pytest.raises(ValueError, match="not fetched from elsewhere"):
        task(encoder="hf-hub:you/evil")


@pytest.mark.parametrize(
    "arguments",
    [{"channels": [100_000] * 4}, {"depths": [100_000] * 4}, {"channels": [1.5] * 4}, {"nonsense": 1}, {"depths": "x"}],
    ids=str,
)
def test_an_encoder_that_cannot_be_built_names_its_source(arguments: dict[str, Any], published: Any) -> None:
    folder = published("encoder", lambda config: change_encoder(config, arguments))
    with pytest.raises(WeightsError, match=r"encoder='local-dir:.*encoder' describes a model that"):
        SegmentationTask("unet", f"local-dir:{folder}", True)


@pytest.mark.parametrize("source", ["hf-hub:you/encoder", "local-dir:FOLDER"])
@pytest.mark.parametrize("arguments", FETCHING.values(), ids=FETCHING)
def test_timm_itself_fetches_nothing_for_our_encoders(
    source: str,
    arguments: dict[str, Any],
    published: Any,
    hub: LoopbackHub,  # noqa: F811
    canary: Path,
    tmp_path: Path,
) -> None:
    evil = tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "evil": Payload(canary)}, evil)
    hub.add("you/evil", {"pytorch_model.bin": evil.read_bytes()})
    filled = fill(arguments, evil, f"{hub.endpoint}/mirror/evil.pth")
    folder = published("encoder", lambda config: change_encoder(config, filled))
    hub.add("you/encoder", {file.name: file.read_bytes() for file in folder.iterdir()})
    name = source.replace("FOLDER", str(folder))
    with suppress(Exception):  # timm refuses some in its own words, and has no use for others
        timm.create_model(name, pretrained=True)
    assert not [path for _, path in hub.requests if "evil" in path]


def at(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


DEEP: Any = 1
for _ in range(20):
    DEEP = [DEEP]

# kind of folder, key, value
WRONG = [
    ("encoder", ("architecture",), "hf-hub:you/evil"),
    ("encoder", ("architecture",), "you/evil"),
    ("encoder", ("architecture",), "local-dir:/etc"),
    ("encoder", ("architecture",), "resnet18.hf-hub:you/evil"),
    ("encoder", ("architecture",), ["resnet18"]),
    ("encoder", ("architecture",), "x" * 100_000),
    ("encoder", ("num_classes",), "ten"),
    ("encoder", ("num_classes",), True),
    ("encoder", ("num_classes",), -1),
    ("encoder", ("num_classes",), 10**15),
    ("encoder", ("num_classes",), [5]),
    ("encoder", ("model_args",), [1]),
    ("encoder", ("model_args",), "x"),
    ("encoder", ("model_args", "kernel_sizes"), 10**9),
    ("encoder", ("model_args", "kernel_sizes"), "seven"),
    ("encoder", ("model_args", "kernel_sizes"), {"a": None}),
    ("encoder", ("model_args", "depths"), [100_000] * 4),
    ("encoder", ("model_args", "channels"), [100_000] * 4),
    ("encoder", ("model_args", "channels"), -3),
    ("encoder", ("model_args", "nonsense"), 1),
    ("encoder", ("model_args", "no name"), 1),
    ("encoder", ("model_args", "depths"), DEEP),
    ("encoder", ("pretrained_cfg",), [1]),
    ("encoder", ("pretrained_cfg", "mean"), "abc"),
    ("encoder", ("pretrained_cfg", "tag"), {"a": 1}),
    ("encoder", ("mean",), {"a": 1}),
    ("encoder", ("mean",), [0.5, "0.5", 0.5]),
    ("encoder", ("mean",), [0.5, float("nan"), 0.5]),
    ("encoder", ("std",), [0.5, float("inf"), 0.5]),
    ("encoder", ("std",), [0.5, 0, 0.5]),
    ("encoder", ("std",), [0.5]),
    ("encoder", ("_lk_backbones",), "x"),
    ("encoder", ("_lk_backbones", "mean"), 3),
    ("smp", ("_model_class",), ["Unet"]),
    ("smp", ("_model_class",), "MyUnet"),
    ("smp", ("encoder_name",), {"a": 1}),
    ("smp", ("encoder_name",), "resnet19"),
    ("smp", ("encoder_depth",), "five"),
    ("smp", ("classes",), 10**30),
    ("smp", ("classes",), 900_000),
    ("smp", ("activation",), "rm -rf"),
    ("smp", ("aux_params",), [1]),
    ("smp", ("decoder_channels",), [1]),
    ("task", ("_lk_backbones", "class"), ["SegmentationTask"]),
    ("task", ("_lk_backbones", "class"), "Overlays"),
    ("task", ("_lk_backbones", "class"), "subprocess.Popen"),
    ("task", ("_lk_backbones", "extra"), "yes"),
    ("task", ("_lk_backbones", "hyper_parameters"), [1]),
    ("task", ("_lk_backbones", "hyper_parameters", "encoder"), 5),
    ("task", ("_lk_backbones", "hyper_parameters", "encoder"), "resnet19"),
    ("task", ("_lk_backbones", "hyper_parameters", "encoder_kwargs"), "x"),
    ("task", ("_lk_backbones", "hyper_parameters", "architecture_kwargs"), [1]),
    ("task", ("_lk_backbones", "hyper_parameters", "num_classes"), "x"),
    ("task", ("_lk_backbones", "hyper_parameters", "mean"), "abc"),
    ("task", ("_lk_backbones", "hyper_parameters", "lr"), float("nan")),
    ("task", ("_lk_backbones", "hyper_parameters", "class_weights"), {"a": DEEP}),
    ("task", ("_lk_backbones", "hyper_parameters", "unheard_of"), 1),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "keys", "value"), WRONG, ids=[f"{k[-1]} {str(v)[:20]}" for _, k, v in WRONG])
def test_a_wrong_value_is_named(kind: str, keys: tuple[str, ...], value: Any, published: Any, refused: Refused) -> None:
    folder = published(kind, at(*keys, value=value))
    message = refused([*PUBLISH, str(folder)], str(folder))
    constructor = keys[-1] in ("kernel_sizes", "depths", "channels", "nonsense", "encoder", "num_classes", "mean")
    constructor |= keys[-1] in ("encoder_depth", "classes", "activation", "aux_params", "decoder_channels")
    assert constructor or keys[-1] in message or str(value) in message, message
    assert len(message) < 1500


DIGITS = "9" * 5000
RAW = {
    "empty": (b"", "not JSON"),
    "latin-1": ('{"architecture": "é"}'.encode("latin-1"), "not JSON in UTF-8"),
    "utf-16": ('{"architecture": "resnet18"}'.encode("utf-16"), "not JSON in UTF-8"),
    "deep list": (b"[" * 200_000, "nested too deeply"),
    "deep object": (b'{"a":' * 200_000, "nested too deeply"),
    "two of a key": (b'{"architecture": "resnet18", "architecture": "replknet_31n"}', "'architecture' twice"),
    "no object": (b'"architecture"', "must hold a JSON object"),
    "an integer of 5000 digits": (f'{{"num_classes": {DIGITS}}}'.encode(), "'num_classes'"),
    "digits in a list": (f'{{"mean": [{DIGITS}, 1, 1]}}'.encode(), "'mean'"),
    "digits in an argument": (f'{{"model_args": {{"x": {DIGITS}}}}}'.encode(), "'model_args'['x']"),
    "1e400": (b'{"mean": [1e400, 0, 0]}', "'mean'"),
    "NaN": (b'{"std": [NaN, 1, 1]}', "'std'"),
    "nul": (b'{"architecture": "resnet18\\u0000"}', "names the architecture"),
    "half a surrogate": (b'{"architecture": "\\ud800"}', "names the architecture"),
    "20 MB": (b'{"a": "' + bytes(b"a" * 20_000_000) + b'"}', "20000009 bytes"),
}


@pytest.mark.parametrize(("content", "name"), RAW.values(), ids=RAW)
def test_what_is_no_json_is_named(content: bytes, name: str, published: Any, refused: Refused) -> None:
    folder = published("encoder", lambda config: config)
    (folder / "config.json").write_bytes(content)
    refused(["hub", "pull", str(folder)], str(folder / "config.json"), name)


def test_a_config_that_is_a_folder(published: Any, refused: Refused) -> None:
    folder = published("encoder", lambda config: config)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(["hub", "pull", str(folder)], str(folder / "config.json"), "cannot be read as a file")


def test_a_byte_order_mark_does_no_harm(published: Any) -> None:
    folder = published("encoder", lambda config: config)
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert lk_hub.pull(folder).config["architecture"] == "replknet_31n"
