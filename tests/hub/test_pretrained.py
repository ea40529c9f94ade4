"""``pretrained=True`` and ``encoder_weights=``: timm and smp get our weights through our reader, or one clear error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from huggingface_hub import constants
from torch import nn

from lk_backbones import hub as lk_hub
from lk_backbones.cli import main
from lk_backbones.weights import DownloadError, WeightsError
from lk_backbones.weights.catalogue import _catalogue, find_published
from tests.conftest import assert_golden, load_golden, load_manifest, randomize_norms
from tests.hub.server import LoopbackHub, Repository

SMALL: dict[str, Any] = {"kernel_sizes": 3, "depths": (1, 1, 1, 1)}
NAME = "replknet_31n.untrained"  # in these tests, somebody has trained it

# Every way to ask for them.
WAYS: dict[str, Callable[..., nn.Module]] = {
    "timm": lambda **kwargs: timm.create_model("replknet_31n", pretrained=True, **kwargs),
    "timm by tag": lambda **kwargs: timm.create_model(NAME, pretrained=True, **kwargs),
    "timm features": lambda **kwargs: timm.create_model("replknet_31n", pretrained=True, features_only=True, **kwargs),
    "smp": lambda **kwargs: smp.Unet("tu-replknet_31n", encoder_weights=True, **kwargs),
}


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(0)
    return randomize_norms(timm.create_model("replknet_31n", **SMALL)).eval()


@pytest.fixture
def mirror(hub: LoopbackHub, trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Publish weights on a mirror, as a classifier of OpenMMLab's; returns the address."""
    state = {k if k.startswith("head.") else f"backbone.{k}": v for k, v in trained.state_dict().items()}
    torch.save({"state_dict": state, "meta": {"epoch": 300}}, tmp_path / "y.pth")
    content = (tmp_path / "y.pth").read_bytes()
    hub.repositories["mirror"] = Repository()
    hub.repositories["mirror"].commit({"y.pth": content})
    url = f"{hub.endpoint}/mirror/y.pth"
    like = find_published("replknet_31b.in1k")
    assert like is not None
    entry = replace(like, name=NAME, url=url, sha256=hashlib.sha256(content).hexdigest()[:8])
    monkeypatch.setitem(_catalogue(), NAME, entry)
    return url


@pytest.mark.parametrize("way", WAYS)
def test_the_published_weights(way: str, mirror: str, trained: nn.Module) -> None:
    model = WAYS[way](**SMALL)
    network: Any = model.encoder.model if way == "smp" else model
    x = torch.rand(1, 3, 64, 64)
    expected = trained.forward_intermediates(x, intermediates_only=True)
    if way.startswith("timm") and "features" not in way:
        assert torch.equal(model.eval()(x), trained(x))
    else:
        assert all(torch.equal(a, b) for a, b in zip(network.eval()(x), expected, strict=True))
    for module in network.modules():  # the weights are not kept in the configuration, which is saved and copied
        assert "state_dict" not in (getattr(module, "pretrained_cfg", None) or {})


def test_timm_adapts_them_as_always(mirror: str, trained: nn.Module) -> None:
    model = timm.create_model("replknet_31n", pretrained=True, in_chans=1, num_classes=3, **SMALL)
    summed = trained.stem[0].conv.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.stem[0].conv.weight, summed, rtol=0, atol=1e-6)
    assert torch.equal(model.stages[3].blocks[1].pw2.conv.weight, trained.stages[3].blocks[1].pw2.conv.weight)
    assert model.head.fc.out_features == 3


def test_a_configuration_with_a_tag_of_ones_own(mirror: str, trained: nn.Module, hub: LoopbackHub) -> None:
    config = {"url": mirror, "tag": "mine", "first_conv": "stem.0.conv", "classifier": "head.fc"}
    model = timm.create_model("replknet_31n", pretrained=True, pretrained_cfg=config, **SMALL)
    assert torch.equal(model.head.fc.weight, trained.head.fc.weight)
    lk_hub.push(trained, "you/encoder")
    repository = hub.repositories["you/encoder"]
    found = repository.files("main")
    assert found is not None
    settings = json.loads(found[1]["config.json"])
    settings["pretrained_cfg"]["tag"] = "mine"
    repository.commit({"config.json": json.dumps(settings).encode()})
    model = timm.create_model("hf-hub:you/encoder", pretrained=True)
    assert torch.equal(model.head.fc.weight, trained.head.fc.weight)
    with pytest.raises(WeightsError, match="of no place where they lie"):
        timm.create_model("replknet_31n", pretrained=True, pretrained_cfg=config | {"url": ""}, **SMALL)


def test_values_are_looked_at(hub: LoopbackHub, trained: nn.Module) -> None:
    nn.init.constant_(trained.head.fc.bias, float("nan"))
    lk_hub.push(trained, "you/encoder")
    with pytest.raises(WeightsError, match=r"you/encoder@\w+' holds no usable weights: head\.fc\.bias holds NaN"):
        timm.create_model("hf-hub:you/encoder", pretrained=True)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another file": ({"change": lambda content: content[:-1] + b"?"}, "arrived damaged"),
    "cut off": ({"cut_after": 100}, "arrived damaged"),
    "gone": ({"status": 404}, "HTTP Error 404"),
    "forbidden": ({"status": 403}, "HTTP Error 403"),
    "broken": ({"status": 503}, "HTTP Error 503"),
}


def check_error(error: BaseException, *texts: str) -> None:
    """Check that an error stands alone, names the weights and says what to do."""
    assert isinstance(error, WeightsError)
    assert error.__cause__ is None
    assert error.__suppress_context__
    for text in (*texts, "random weights"):
        assert text in str(error), str(error)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("fault", "said"), FAULTS.values(), ids=FAULTS)
def test_a_failed_download_is_one_error(
    way: str, fault: dict[str, Any], said: str, mirror: str, hub: LoopbackHub, tmp_path: Path
) -> None:
    with hub.fault(path="/mirror/", **fault), pytest.raises(DownloadError) as raised:
        WAYS[way](**SMALL)
    check_error(raised.value, f"'{NAME}'", mirror, said, "later")
    assert list((tmp_path / "torch").rglob("*.pth*")) == []


@pytest.mark.parametrize("way", WAYS)
def test_so_are_a_refused_connection_and_the_offline_mode(
    way: str, mirror: str, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError) as raised:
        WAYS[way](**SMALL)
    check_error(raised.value, f"'{NAME}'", mirror, "HF_HUB_OFFLINE", "while online")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.close()
    with pytest.raises(DownloadError) as raised:
        WAYS[way](**SMALL)
    check_error(raised.value, f"'{NAME}'", mirror, "cannot be fetched", "check the connection")


@pytest.mark.parametrize("way", WAYS)
def test_a_name_without_weights(way: str) -> None:
    with pytest.raises(WeightsError) as raised:
        WAYS[way](**SMALL)
    check_error(raised.value, f"'{NAME}'", "Nobody published any", "'file'", "hf-hub:owner/name")


def test_weights_on_a_file_sharing_drive() -> None:
    for name in ("replknet_13b", "replknet_13b.in1k_120ep"):
        with pytest.raises(DownloadError) as raised:
            timm.create_model(name, pretrained=True)
        published = find_published("replknet_13b.in1k_120ep")
        assert published is not None
        check_error(raised.value, "'replknet_13b.in1k_120ep'", "file-sharing drive", str(published.link))


def test_in_a_process_of_its_own_it_is_a_short_traceback(process: Callable) -> None:
    script = "import lk_backbones, timm; timm.create_model('replknet_31b.in1k', pretrained=True)"
    started = process(script, env={"HF_HUB_OFFLINE": "1"})
    _, err = started.communicate(timeout=300)
    assert started.returncode == 1
    assert err.count("Traceback") == 1
    assert "during handling" not in err.lower()
    assert "direct cause" not in err
    message = err[err.index("DownloadError: ") :]
    assert message.startswith("DownloadError: the weights of 'replknet_31b.in1k' (pretrained=True) could not be loaded")


def test_weights_come_from_the_namespace_first(
    hub: LoopbackHub, trained: nn.Module, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lk_hub.push(trained, f"team/{NAME}")
    monkeypatch.setenv("LK_BACKBONES_NAMESPACE", "team")
    hub.requests.clear()
    model = timm.create_model("replknet_31n", pretrained=True, **SMALL)
    assert torch.equal(model.head.fc.weight, trained.head.fc.weight)
    assert not [path for _, path in hub.requests if "/mirror/" in path]
    with pytest.raises(DownloadError) as raised:
        smp.Unet("replknet_31b", encoder_weights="imagenet")
    check_error(raised.value, "encoder_weights='imagenet'", "no model repository 'team/replknet_31b.in1k'", "HF_TOKEN")


# --- the authors' own repository -------------------------------------------------------------------------------------

AUTHORS = "DingXiaoH/UniRepLKNet"
FINE_TUNED = "unireplknet_s.in22k_ft_in1k_384"
NARROW: dict[str, Any] = {"depths": (2, 2, 4, 2), "channels": (8, 16, 32, 64), "kernel_sizes": (3, 13, (13, 3), 13)}
WAYS_TO_THE_AUTHORS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm.create_model(FINE_TUNED, pretrained=True, **NARROW),
    "timm features": lambda: timm.create_model(FINE_TUNED, pretrained=True, features_only=True, **NARROW),
    "smp": lambda: smp.Unet(f"tu-{FINE_TUNED}", encoder_weights=True, **NARROW),
}


@pytest.mark.parametrize("way", WAYS_TO_THE_AUTHORS)
def test_the_authors_file_is_fetched_by_its_name(way: str, hub: LoopbackHub, tmp_path: Path) -> None:
    golden = load_golden("unireplknet_tiny")
    head = {"head.weight": torch.randn(1000, 64), "head.bias": torch.randn(1000)}
    torch.save({"model": golden["state"] | head}, tmp_path / "x.pth")
    file = "unireplknet_s_in22k_to_in1k_384_acc86.44.pth"
    hub.add(AUTHORS, {file: (tmp_path / "x.pth").read_bytes(), "README.md": b"x"})
    model: Any = WAYS_TO_THE_AUTHORS[way]().eval()
    assert ("HEAD", f"/{AUTHORS}/resolve/main/{file}") in hub.requests
    x = golden["input"][""]
    if way == "timm":
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(model.head.fc.weight, head["head.weight"])
        assert model.pretrained_cfg["input_size"] == (3, 384, 384)
    else:
        maps = model(x) if way == "timm features" else model.encoder(x)[1:]
    for level, feature in enumerate(maps[1:]):
        assert_golden(feature, golden["output"][f"stage_features.{level}"])


def test_a_file_of_full_size_is_pulled_and_built(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = load_manifest("unireplknet_a")["state_dict"]
    state = {key: torch.rand(shape) if shape else torch.tensor(7) for key, shape in shapes.items()}
    torch.save(state, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    commit = hub.add(AUTHORS, {"unireplknet_a_in1k_224_acc77.03.pth": content})
    main(["hub", "pull", "unireplknet_a.in1k"])
    out = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert out["source"] == f"hf-hub:{AUTHORS}/unireplknet_a_in1k_224_acc77.03.pth@{commit}"
    assert out["sha256"] == hashlib.sha256(content).hexdigest()
    model = timm.create_model("unireplknet_a", pretrained=True)
    assert torch.equal(model.head.fc.bias, state["head.bias"])
    branch = model.stages[3].blocks[1].dwconv.branches[2]
    assert torch.equal(branch.conv.weight, state["stages.3.1.dwconv.dil_conv_k7_2.weight"])
    with pytest.raises(WeightsError, match=r"The shapes are those of 'unireplknet_a'"):
        lk_hub.load_weights(timm.create_model("replknet_31n"), "unireplknet_a.in1k")


# --- what timm is told to read, it reads -----------------------------------------------------------------------------


def test_a_file_and_a_state_dict(tmp_path: Path, trained: nn.Module) -> None:
    torch.save({"model": trained.state_dict()}, tmp_path / "mine.pth")
    for overlay in ({"file": str(tmp_path / "mine.pth")}, {"state_dict": {"state_dict": trained.state_dict()}}):
        model = timm.create_model("replknet_31n", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
        assert torch.equal(model.head.fc.weight, trained.head.fc.weight)


def test_an_address_of_ones_own(hub: LoopbackHub, mirror: str, trained: nn.Module, tmp_path: Path) -> None:
    overlay = {"url": mirror.replace("/y.pth", "/z.pth")}
    hub.repositories["mirror"].commit({"z.pth": hub.repositories["mirror"].commits[-1][1]["y.pth"]})
    arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay, "cache_dir": tmp_path / "mine", **SMALL}
    model = timm.create_model("replknet_31n", **arguments)
    assert torch.equal(model.head.fc.weight, trained.head.fc.weight)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["z.pth"]
    overlay["url"] = mirror.replace("/y.pth", "/gone.pth")
    with hub.fault(path="/mirror/", status=404), pytest.raises(DownloadError) as raised:
        timm.create_model("replknet_31n", **arguments)
    check_error(raised.value, overlay["url"], "HTTP Error 404")


def test_published_weights_in_a_folder_of_ones_own(mirror: str, tmp_path: Path, trained: nn.Module) -> None:
    model = timm.create_model("replknet_31n", pretrained=True, cache_dir=tmp_path / "mine", **SMALL)
    assert torch.equal(model.head.fc.weight, trained.head.fc.weight)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["y.pth"]
    assert not (tmp_path / "torch").exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_repository_of_the_hub(hub: LoopbackHub, trained: nn.Module, tmp_path: Path, wrapped: bool) -> None:
    folder = Path(lk_hub.push(trained, "you/encoder", folder=tmp_path / "encoder", dry_run=True))
    if wrapped:  # as a training script leaves it
        (folder / "model.safetensors").unlink()
        torch.save({"model": trained.state_dict()}, folder / "pytorch_model.bin")
    hub.add("you/encoder", {file.name: file.read_bytes() for file in folder.iterdir()})
    for folder_of_ones_own in (None, tmp_path / "mine"):
        model = timm.create_model("hf-hub:you/encoder", pretrained=True, cache_dir=folder_of_ones_own)
        assert torch.equal(model.head.fc.weight, trained.head.fc.weight)
        assert model.pretrained_cfg["source"] == "hf-hub"


def test_a_repository_that_refuses_its_weights(hub: LoopbackHub, trained: nn.Module) -> None:
    lk_hub.push(trained, "you/encoder")
    with hub.fault(path="model.safetensors", method="", status=403, times=99), pytest.raises(DownloadError) as raised:
        timm.create_model("hf-hub:you/encoder", pretrained=True)
    check_error(raised.value, "'you/encoder'", "HTTP 403", "HF_TOKEN")
