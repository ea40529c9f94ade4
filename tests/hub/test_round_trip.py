"""Push to the Hub, pull in a fresh process with an empty cache through timm, smp and ours: the same bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from lk_backbones import hub as lk_hub
from lk_backbones.tasks import SegmentationTask
from tests.conftest import SMALL_ENCODERS, randomize_norms
from tests.hub.conftest import finish
from tests.hub.server import LoopbackHub

KERNELS = {"kernel_sizes": 7, "depths": [1, 1, 1, 1]}
TASK = {
    "architecture": "upernet_openmmlab",
    "encoder": "replknet_31n",
    "encoder_kwargs": KERNELS,
    "architecture_kwargs": {"decoder_channels": 16},
    "num_classes": 4,
    "auxiliary_weight": 0.4,
    "auxiliary_channels": 8,
    "class_names": ["road", "car", "tree", "sky"],
}

# What a stranger does; prints nothing, writes the outputs.
FRESH = """
import sys
import lk_backbones, timm, torch
import segmentation_models_pytorch as smp
from lk_backbones import hub
from safetensors.torch import load_file, save_file

folder, encoders = sys.argv[1], sys.argv[2].split(",")
x = load_file(f"{folder}/input.safetensors")["x"]
out = {}
with torch.no_grad():
    for name in encoders:
        repo = f"hf-hub:you/{name}"
        out[f"{name} timm"] = timm.create_model(repo, pretrained=True).eval()(x)
        features = timm.create_model(repo, pretrained=True, features_only=True).eval()(x)
        out |= {f"{name} timm features {i}": f for i, f in enumerate(features)}
        maps = smp.encoders.get_encoder(name, weights=repo).eval()(x)[1:]
        out |= {f"{name} smp {i}": f for i, f in enumerate(m for m in maps if m.shape[1] > 0)}
        assert smp.encoders.get_preprocessing_params(name, repo)["mean"] == [0.25, 0.5, 0.75]
        out[f"{name} ours"] = hub.load_model(repo)(x)
        other = timm.create_model(name, num_classes=5)
        hub.load_weights(other, repo)
        out[f"{name} load_weights"] = other.eval()(x)
    out["model smp"] = smp.from_pretrained("you/model").eval()(x)
    out["model ours"] = hub.load_model("hf-hub:you/model")(x)
    task = hub.load_model("hf-hub:you/task")
    out["task ours"] = task(x)
    out["task auxiliary"] = task.auxiliary_head(task.encoder(task.normalize(x))[4])
    out["task smp"] = smp.from_pretrained("you/task").eval()(task.normalize(x))
save_file({key: value.contiguous() for key, value in out.items()}, f"{folder}/out.safetensors")
"""


def small(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model(name, num_classes=5, **kwargs)).eval()
    model.pretrained_cfg = model.pretrained_cfg | {"mean": (0.25, 0.5, 0.75)}
    return model


def make_task(**kwargs) -> SegmentationTask:
    torch.manual_seed(1)
    return randomize_norms(SegmentationTask(**(TASK | kwargs))).eval()


def test_bit_for_bit_in_a_fresh_process(hub: LoopbackHub, process: Callable, tmp_path: Path) -> None:
    x = torch.rand(1, 3, 64, 64)
    save_file({"x": x}, tmp_path / "input.safetensors")
    expected = {}
    with torch.no_grad():
        for name in SMALL_ENCODERS:
            model = small(name)
            lk_hub.push(model, f"you/{name}")
            levels = model.forward_intermediates(x, intermediates_only=True)
            expected |= {f"{name} {way}": model(x) for way in ("timm", "ours", "load_weights")}
            expected |= {f"{name} {way} {i}": f for way in ("timm features", "smp") for i, f in enumerate(levels)}
        unet = randomize_norms(
            smp.UPerNet("tu-replknet_31n", encoder_weights=None, decoder_channels=16, **KERNELS)
        ).eval()
        lk_hub.push(unet, "you/model")
        expected |= {"model smp": unet(x), "model ours": unet(x)}

        task = make_task()
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.strategy.connect(task)
        trainer.save_checkpoint(tmp_path / "task.ckpt")
        assert (
            lk_hub.push(tmp_path / "task.ckpt", "you/task")
            == f"hf-hub:you/task@{hub.repositories['you/task'].refs['main']}"
        )
        expected |= {"task ours": task(x), "task smp": task(x)}
        expected["task auxiliary"] = task.auxiliary_head(task.encoder(task.normalize(x))[4])

    finish(process(FRESH, str(tmp_path), ",".join(SMALL_ENCODERS)))
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == expected.keys()
    different = [key for key, value in expected.items() if not torch.equal(out[key], value)]
    assert different == []


def test_only_the_owner_may_push(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_owner"
    model = timm.create_model("replknet_31n", num_classes=0, **KERNELS)
    with pytest.raises(lk_hub.DownloadError, match=r"(?s)'you/x'.*HF_TOKEN to a token with write access"):
        lk_hub.push(model, "you/x")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(lk_hub.DownloadError, match=r"'you/x' was refused \(HTTP 403\).*write access"):
        lk_hub.push(model, "you/x")
    assert hub.repositories == {}
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    lk_hub.push(model, "you/x", revision="experiment")
    assert set(hub.repositories["you/x"].files("experiment")[1]) == {"README.md", "config.json", "model.safetensors"}
    assert hub.repositories["you/x"].files("main") is None


def test_nothing_is_asked_of_the_network_for_what_is_here(hub: LoopbackHub, tmp_path: Path) -> None:
    lk_hub.push(small("replknet_31n", **KERNELS), "you/encoder")
    commit = hub.repositories["you/encoder"].refs["main"]
    task = make_task(encoder_weights="hf-hub:you/encoder")
    # the commit is recorded, and the mean of the weights is the task's
    assert task.hparams["encoder_weights"] == f"hf-hub:you/encoder@{commit}"
    assert task.hparams["mean"] == [0.25, 0.5, 0.75]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    model = smp.Unet("tu-replknet_31n", encoder_weights=None, **KERNELS)
    lk_hub.load_weights(model, "hf-hub:you/encoder")
    lk_hub.push(model, "you/unet", folder=tmp_path / "unet")

    hub.requests.clear()
    again = SegmentationTask.load_from_checkpoint(tmp_path / "task.ckpt")
    assert again.hparams["encoder_weights"] == f"hf-hub:you/encoder@{commit}"
    assert isinstance(lk_hub.load_model(tmp_path / "task.ckpt"), SegmentationTask)
    smp.from_pretrained(tmp_path / "unet")
    assert hub.requests == []
    smp.from_pretrained("you/unet")  # its own two files, and not the encoder's again
    assert not any("you/encoder" in path for _, path in hub.requests)


def test_a_pinned_revision_is_what_a_task_starts_from(hub: LoopbackHub) -> None:
    lk_hub.push(small("replknet_31n", **KERNELS), "you/encoder")
    first = hub.repositories["you/encoder"].refs["main"]
    other = small("replknet_31n", **KERNELS)
    torch.nn.init.zeros_(other.stem[0].conv.weight)
    lk_hub.push(other, "you/encoder")
    for source, zero in ((f"hf-hub:you/encoder@{first}", False), ("hf-hub:you/encoder", True)):
        task = make_task(encoder_weights=source)
        assert bool((task.encoder.model.stem_0.conv.weight == 0).all()) is zero


def test_an_encoder_can_be_a_repository(hub: LoopbackHub) -> None:
    model = randomize_norms(timm.create_model("replknet_31n", num_classes=0, **KERNELS))
    lk_hub.push(model, "you/encoder")
    commit = hub.repositories["you/encoder"].refs["main"]
    task = make_task(encoder="hf-hub:you/encoder", encoder_weights=True, encoder_kwargs=None)
    # from now on without the repository: architecture and arguments are known
    assert task.hparams["encoder"] == "tu-replknet_31n"
    assert task.hparams["encoder_kwargs"]["kernel_sizes"] == 7
    assert task.hparams["encoder_weights"] == f"hf-hub:you/encoder@{commit}"
    assert torch.equal(
        task.encoder.model.stem_0.conv.weight,
        make_task(encoder_weights="hf-hub:you/encoder").encoder.model.stem_0.conv.weight,
    )


def test_a_namespace_comes_first(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = timm.create_model("replknet_13b.in1k_120ep", num_classes=0)
    model = model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(0.5) if value.is_floating_point() else value.fill_(1)
    lk_hub.push(model, "team/replknet_13b.in1k_120ep")
    name = "replknet_13b.in1k_120ep"
    with pytest.raises(lk_hub.DownloadError, match="lies on a file-sharing drive"):
        lk_hub.pull(name)
    with pytest.raises(lk_hub.DownloadError, match=r"(?s)no model repository 'others/.*lies on a file-sharing drive"):
        lk_hub.pull(name, namespace="others")
    assert lk_hub.pull(name, namespace="team").source.startswith(f"hf-hub:team/{name}@")
    monkeypatch.setenv("LK_BACKBONES_NAMESPACE", "team")
    weights = lk_hub.pull(name)
    assert weights.published.name == name
    # smp's default, which is "imagenet"
    encoder = smp.encoders.get_encoder("replknet_13b", weights="imagenet", depth=3)
    assert float(encoder.model.stem_0.conv.weight[0, 0, 0, 0]) == 0.5
    with pytest.raises(lk_hub.DownloadError, match=r"no model repository 'team/replknet_xl"):
        smp.encoders.get_encoder("replknet_xl", weights="imagenet", depth=1)


def test_one_layout_is_also_a_folder(hub: LoopbackHub, tmp_path: Path) -> None:
    model = small("replknet_31n", **KERNELS)
    folder = lk_hub.push(model, "you/encoder", folder=tmp_path / "folder", dry_run=True)
    assert hub.requests == []
    assert sorted(path.name for path in Path(folder).iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["mean"] == config["pretrained_cfg"]["mean"] == [0.25, 0.5, 0.75]
    x = torch.rand(1, 3, 64, 64)
    if Version(timm.__version__) >= Version("1.0.31"):  # before, timm reads only pickles from folders
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x), model(x))
    assert torch.equal(lk_hub.load_model(folder)(x), model(x))
    lk_hub.push(model, "you/encoder", folder=folder, dry_run=True)  # again: replaced
    (tmp_path / "folder" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"holds other files \(\['thesis\.tex'\]\)"):
        lk_hub.push(model, "you/encoder", folder=folder, dry_run=True)


def test_the_encoder_of_an_smp_model_is_published_whole(hub: LoopbackHub) -> None:
    model = randomize_norms(smp.Unet("tu-replknet_31n", encoder_weights=None, in_channels=4, **KERNELS)).eval()
    lk_hub.push(model.encoder, "you/encoder")
    x = torch.rand(1, 4, 64, 64)
    features = timm.create_model("hf-hub:you/encoder", pretrained=True, features_only=True).eval()(x)
    assert all(torch.equal(a, b) for a, b in zip(features, model.encoder(x)[1:], strict=True))
    shallow = smp.encoders.get_encoder("replknet_31n", depth=3)
    with pytest.raises(lk_hub.WeightsError, match=r"later stages were cut off .*publish the whole smp model"):
        lk_hub.push(shallow, "you/encoder")


def test_what_cannot_be_rebuilt_is_not_published(hub: LoopbackHub) -> None:
    import lk_backbones

    folded = lk_backbones.reparameterize(small("replknet_31n", **KERNELS))
    with pytest.raises(lk_hub.WeightsError, match=r"cannot be rebuilt.*Publish it before folding"):
        lk_hub.push(folded, "you/x")
    with pytest.raises(lk_hub.WeightsError, match="a Linear cannot be published"):
        lk_hub.push(torch.nn.Linear(1, 1), "you/x")
    assert hub.requests == []
