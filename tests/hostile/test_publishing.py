"""Folders to publish into that hold somebody's own files, are no folders, or cannot be written: nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from lk_backbones import hub as lk_hub
from lk_backbones.cli import main
from lk_backbones.tasks import DetectionTask, SegmentationTask
from tests.hostile.conftest import Refused
from tests.hub.conftest import ROOT

KERNELS = {"kernel_sizes": 3, "depths": [1, 1, 1, 1]}
MODEL_KWARGS = json.dumps(KERNELS)


@pytest.fixture
def weights(workspace: Path) -> Path:
    """A weight file of one's own."""
    torch.manual_seed(0)
    file = workspace / "weights.safetensors"
    save_file(timm.create_model("replknet_31n", num_classes=3, **KERNELS).state_dict(), file)
    return file


def command(kind: str, folder: str | Path, source: str | Path = "weights.safetensors") -> list[str]:
    model = ["--model", "replknet_31n", "--model-kwargs", MODEL_KWARGS]
    if kind == "convert":
        return ["convert", str(source), "--to", str(folder), *model]
    return ["hub", "publish", str(source), "--repo", "you/x", "--dry-run", "--folder", str(folder), *model]


def own_files(folder: Path) -> None:
    """A project of the user's whose files are called as ours."""
    folder.mkdir()
    (folder / "README.md").write_text("my own project")
    (folder / "config.json").write_text('{"architecture": "mine"}')
    (folder / "model.safetensors").write_bytes(b"my own weights")


def written(folder: Path) -> None:
    main(command("convert", folder))


def edited(name: str, text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        written(folder)
        file = folder / name
        file.write_bytes(file.read_bytes() + text.encode())

    return make


def changed_config(folder: Path) -> None:
    written(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["mean"] = [0.1, 0.2, 0.3]
    (folder / "config.json").write_text(json.dumps(config))


def with_notes(folder: Path) -> None:
    written(folder)
    (folder / "notes\x1b[31m.txt").write_text("of value")


def with_a_subfolder(folder: Path) -> None:
    written(folder)
    (folder / "runs").mkdir()
    (folder / "runs" / "1.csv").write_text("of value")


def marked_by_hand(folder: Path) -> None:
    own_files(folder)
    (folder / "config.json").write_text('{"_lk_backbones": {"kind": "encoder", "files": {}}}')


def absurd_record(folder: Path) -> None:
    own_files(folder)
    (folder / "config.json").write_text('{"_lk_backbones": {"files": {"config.json": [1], "README.md": 7}}}')


def linked_file(folder: Path) -> None:
    written(folder)
    (folder / "README.md").rename(folder.parent / "elsewhere.md")
    (folder / "README.md").symlink_to(folder.parent / "elsewhere.md")


def a_file(folder: Path) -> None:
    folder.write_text("of value")


def a_link(folder: Path) -> None:
    own_files(folder.with_name("real"))
    folder.symlink_to("real", target_is_directory=True)


def a_link_to_an_empty_folder(folder: Path) -> None:
    folder.with_name("real").mkdir()
    folder.symlink_to("real", target_is_directory=True)


def a_dangling_link(folder: Path) -> None:
    folder.symlink_to("nowhere")


PLACES = {
    "files of one's own": (own_files, "['README.md', 'config.json', 'model.safetensors'] were not written by"),
    "a card that was edited": (edited("README.md", "\nmy words"), "['README.md'] were not written by"),
    "weights that were changed": (edited("model.safetensors", "x"), "['model.safetensors'] were not written by"),
    "a configuration that is no JSON": (edited("config.json", "x"), "'config.json'"),
    "a configuration that was changed": (changed_config, "'config.json'"),
    "a file beside": (with_notes, r"holds other files (['notes\x1b[31m.txt'])"),
    "a folder beside": (with_a_subfolder, "holds other files (['runs'])"),
    "our mark, by hand": (marked_by_hand, "'model.safetensors'"),
    "a record of nonsense": (absurd_record, "'model.safetensors'"),
    "a link in it": (linked_file, "holds other files (['README.md'])"),
    "a file": (a_file, "is a file"),
    "a link": (a_link, "is a symbolic link"),
    "a link to an empty folder": (a_link_to_an_empty_folder, "is a symbolic link"),
    "a link to nothing": (a_dangling_link, "is a symbolic link"),
}


@pytest.mark.parametrize("kind", ["convert", "publish"])
@pytest.mark.parametrize(("make", "named"), PLACES.values(), ids=PLACES)
def test_what_somebody_made_is_not_replaced(
    kind: str, make: Callable[[Path], None], named: str, weights: Path, workspace: Path, refused: Refused
) -> None:
    make(workspace / "folder")
    refused(command(kind, "folder"), "'folder'", named)


@pytest.mark.parametrize("kind", ["convert", "publish"])
def test_what_was_written_here_is_replaced(kind: str, weights: Path, workspace: Path) -> None:
    folder = workspace / "deep" / "folder"
    folder.mkdir(parents=True)  # empty
    for value in (0.0, 1.0):
        state = load_file(weights)
        state["head.fc.bias"] = torch.full_like(state["head.fc.bias"], value)
        save_file(state, weights)
        main(command(kind, folder))
        assert load_file(folder / "model.safetensors")["head.fc.bias"].tolist() == [value] * 3
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["folder"]
    (folder / "README.md").unlink()  # what is missing cannot be lost
    main(command(kind, folder))


SELF = {
    "the current folder": (["."], "is the current folder"),
    "the folder above": ([".."], "is the current folder or one that it lies in"),
    "the folder of the source": (["inner", "inner/weights.safetensors"], "is the folder of the source"),
    "a folder above the source": (["inner/..", "inner/weights.safetensors"], "the current folder"),
    "the source": (["weights.safetensors"], "is the source itself"),
    "below a file": (["weights.safetensors/folder"], "weights.safetensors"),
    "a source folder onto itself": (["inner", "inner"], "is the source itself"),
}


@pytest.mark.parametrize("kind", ["convert", "publish"])
@pytest.mark.parametrize(("arguments", "named"), SELF.values(), ids=SELF)
def test_the_source_and_the_folder_of_the_command(
    kind: str, arguments: list[str], named: str, weights: Path, workspace: Path, refused: Refused
) -> None:
    written(workspace / "inner")
    for file in ("README.md", "config.json", "model.safetensors"):
        (workspace / "inner" / file).replace(workspace / "inner" / file.replace("model", "weights"))
    refused(command(kind, *arguments), named)


def test_a_name_without_suffix(weights: Path, workspace: Path, refused: Refused) -> None:
    weights.rename(workspace / "weights")
    refused(["convert", "weights", "--model", "replknet_31n"], "'weights'", "--to")
    refused(["convert", "weights", "--to", "weights"], "is the source itself")
    refused(["convert", "none.pth"], "there is no file or folder 'none.pth'")


NAMES = ["nonsense", "you/..", "you/a b", "you/--x", "../x", "/x", "you/", "you/x/y", "you/\x1b[31m", ""]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_repositories(name: str, weights: Path, refused: Refused) -> None:
    refused(["hub", "publish", "weights.safetensors", "--repo", name, "--dry-run"], "is no repository name")


@pytest.mark.parametrize("folder", ["-my model-", "日本", "a--b", "x" * 120, "[red]"])
def test_a_folder_may_be_called_anything(folder: str, weights: Path, workspace: Path) -> None:
    main(command("convert", folder))
    assert (workspace / folder / "model.safetensors").is_file()


# Even root then obeys file permissions (capset with nothing in it).
WITHOUT_PRIVILEGES = """
import ctypes
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
assert ctypes.CDLL(None).capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())) == 0
"""
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may grow beyond this
"""
NO_RENAME = """
import pathlib
rename = pathlib.Path.rename
def fail(self, target):
    if self.name.endswith(".partial"):
        raise OSError(28, "No space left on device")
    return rename(self, target)
pathlib.Path.rename = fail
"""
TROUBLE = {
    "a full disk": (FULL_DISK, "convert", "folder", "could not be written"),
    "a full disk at the last moment": (NO_RENAME, "publish", "folder", "No space left on device"),
    "no permission": (WITHOUT_PRIVILEGES, "publish", "readonly/folder", "Permission denied"),
    "no permission for folders above": (WITHOUT_PRIVILEGES, "convert", "readonly/a/b/folder", "Permission denied"),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and privileges in Linux's way")
@pytest.mark.parametrize(("setup", "kind", "place", "named"), TROUBLE.values(), ids=TROUBLE)
def test_trouble_while_writing(setup: str, kind: str, place: str, named: str, weights: Path, workspace: Path) -> None:
    written(workspace / "folder")
    (workspace / "readonly").mkdir()
    written(workspace / "readonly" / "folder")
    before = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    folders = {path for path in workspace.rglob("*") if path.is_dir()}
    (workspace / "readonly").chmod(0o555)
    script = f"import sys\nfrom lk_backbones.cli import main\n{setup}\nmain(sys.argv[1:])\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, *command(kind, place)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=workspace,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert named in done.stderr
    assert {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()} == before
    assert {path for path in workspace.rglob("*") if path.is_dir()} == folders


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits in Linux's way")
def test_a_full_disk_for_temporary_files(weights: Path, workspace: Path) -> None:
    script = f"import sys\nfrom lk_backbones.cli import main\n{FULL_DISK}\nmain(sys.argv[1:])\n"
    args = [arg for arg in command("publish", "none") if arg not in ("--dry-run", "--folder", "none")]
    (workspace / "temporary").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": "temporary", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script, *args], capture_output=True, text=True, env=environment, cwd=workspace
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "'you/x' could not be written into a temporary folder: File too large. Nothing was uploaded" in done.stderr
    assert not list((workspace / "temporary").iterdir())


# ---- what a card claims ----

CLAIMS = ("not retrained", "83.5", "top-1", "mit.", "ImageNet-1K.", "bibtex", "Published by the authors")


def claims(folder: Path) -> list[str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return [claim for claim in CLAIMS if claim in text]


@pytest.fixture
def big(workspace: Path) -> Path:
    """Weights that fit replknet_31b and are not the authors'."""
    with torch.device("meta"):
        model = timm.create_model("replknet_31b", num_classes=10)
    file = workspace / "mine.pth"
    torch.save({key: torch.full(value.shape, 0.5).to(value.dtype) for key, value in model.state_dict().items()}, file)
    return file


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        pytest.param(
            "mine.pth",
            ["--model", "replknet_31b.in1k"],
            "a SHA-256 that begins with fd08e268, this one has another",
            id="by --model",
        ),
        pytest.param("replknet-31B_3rdparty_in1k_20221118-fd08e268.pth", [], "begins with fd08e268", id="by file name"),
        pytest.param("mine.pth", ["--model", "replknet_31b.in22k"], "it holds no checksum", id="no checksum known"),
    ],
)
def test_a_name_is_no_proof(name: str, options: list[str], why: str, big: Path, workspace: Path) -> None:
    big.rename(workspace / name)
    main(["hub", "publish", name, "--repo", "you/mine", "--dry-run", *options])
    assert claims(workspace / "mine") == []
    card = ModelCard.load(workspace / "mine" / "README.md")
    assert card.data.license is None
    assert "cannot confirm" in card.content
    assert why in card.content
    assert "The weights: not stated by the publisher." in card.content
    config = json.loads((workspace / "mine" / "config.json").read_text())
    assert not {"tag", "license", "origin_url", "url"} & config["pretrained_cfg"].keys()
    assert config["architecture"] == "replknet_31b"


def test_a_checksum_is(big: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lk_backbones.repository import layout
    from lk_backbones.weights.catalogue import find_published

    monkeypatch.setattr(layout, "published_by_checksum", lambda sha256: find_published("replknet_31b.in1k"))
    main(["hub", "publish", "mine.pth", "--repo", "you/theirs", "--dry-run", "--model", "replknet_31b.in1k"])
    assert claims(workspace / "theirs") == list(CLAIMS)
    config = json.loads((workspace / "theirs" / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"] == "in1k"
    assert config["pretrained_cfg"]["license"] == "mit"
    assert "cannot confirm" not in (workspace / "theirs" / "README.md").read_text(encoding="utf-8")


def test_metrics_say_where_they_come_from(workspace: Path) -> None:
    task = SegmentationTask(
        "fpn", "replknet_31n", encoder_kwargs=KERNELS, num_classes=2, class_names=["a|b", "</p>[x](y)"]
    )
    lk_hub.push(task, "you/x", lk_hub.RepositoryInfo(metrics={"test|x\n# forged": 0.5}), dry_run=True)
    text = (workspace / "x" / "README.md").read_text(encoding="utf-8")
    assert "As stated by the publisher:\n\n| metric | value |\n|---|---|\n" in text
    assert r"| test\|x\\n\# forged | 0.5000 |" in text
    assert "Noted in the training checkpoint" not in text
    assert r"Classes, in order: a\|b, \</p\>\[x\](y)." in text
    assert "\n# forged" not in text


# Encoders whose stages are called by other names; depth 3 cuts the deepest off.
@pytest.mark.parametrize("name", ["tu-resnet10t", "tu-convnext_atto", "tu-mobilenetv3_small_050", "tu-regnetx_002"])
def test_an_encoder_that_was_cut_off_is_no_whole_network(name: str, workspace: Path) -> None:
    import segmentation_models_pytorch as smp

    encoder = smp.encoders.get_encoder(name, depth=3, weights=None)
    with pytest.raises(lk_hub.WeightsError, match=r"later stages were cut off \(encoder_depth\), publish the whole"):
        lk_hub.push(encoder, "you/cut", dry_run=True)
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize("name", ["tu-resnet10t", "tu-convnext_atto", "tu-regnetx_002"])
def test_a_whole_foreign_encoder_is_published_bit_for_bit(name: str, workspace: Path) -> None:
    import segmentation_models_pytorch as smp

    encoder = smp.encoders.get_encoder(name, weights=None).eval()
    folder = lk_hub.push(encoder, "you/whole", dry_run=True)
    model = lk_hub.load_model(folder)
    x = torch.rand(1, 3, 64, 64)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(features[-1], encoder(x)[-1])
    card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    assert "large-kernel" not in card
    assert ("head.norm.weight" in card and "new, not trained" in card) == ("convnext" in name)


def test_smp_models_and_tasks_of_encoders_that_compute_while_they_are_built(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As timm's RegNet does, with an operation that torch 2.10 cannot do without memory."""
    import segmentation_models_pytorch as smp

    def unique(*args: Any, **kwargs: Any) -> Any:
        if torch.empty(0).is_meta:
            raise NotImplementedError("aten::_unique2: attempted to run this operator with Meta tensors")
        return original(*args, **kwargs)

    original = torch.unique
    monkeypatch.setattr(torch, "unique", unique)
    x = torch.rand(1, 3, 64, 64)
    model = smp.FPN("tu-regnetx_002", encoder_weights=None).eval()
    assert torch.equal(lk_hub.load_model(lk_hub.push(model, "you/smp", dry_run=True))(x), model(x))
    task = DetectionTask("fcos", "tu-regnetx_002", num_classes=2)
    again = lk_hub.load_model(lk_hub.push(task, "you/task", dry_run=True))
    assert again.state_dict().keys() == task.state_dict().keys()
    config = Path("smp/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"decoder_pyramid_channels": 1_000_000}))
    with pytest.raises(lk_hub.WeightsError, match="far larger than its weights can be"):
        lk_hub.load_model("smp")
