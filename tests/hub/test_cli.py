"""``lk-backbones hub`` against the loopback Hub, as users call it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from huggingface_hub import ModelCard

from lk_backbones import hub as lk_hub
from lk_backbones.cli import main
from lk_backbones.tasks import SegmentationTask
from tests.hub.server import LoopbackHub


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    kwargs = {"kernel_sizes": 3, "depths": [1, 1, 1, 1]}
    task = SegmentationTask("fpn", "replknet_31n", encoder_kwargs=kwargs, num_classes=3, class_names=["a", "b", "c"])
    watcher = L.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="val/mean_iou", mode="max")
    watcher.best_model_score = torch.tensor(0.4321)
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[watcher])
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    return tmp_path / "best.ckpt"


def test_publish_and_pull(hub: LoopbackHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["hub", "publish", str(checkpoint), "--repo", "you/streets", "--license", "mit", "--private"])
    commit = hub.repositories["you/streets"].refs["main"]
    assert f"published: hf-hub:you/streets@{commit}" in capsys.readouterr().out
    main(["hub", "pull", "hf-hub:you/streets"])
    out = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert out["source"] == f"hf-hub:you/streets@{commit}"
    weights = hub.repositories["you/streets"].files("main")[1]["model.safetensors"]
    assert out["sha256"] == hashlib.sha256(weights).hexdigest()
    assert Path(out["file"]).read_bytes() == weights


def test_the_dry_run_writes_a_card_that_says_it_all(
    hub: LoopbackHub,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "lk-backbones test --ckpt_path best.ckpt"
    options = [
        "--license",
        "cc-by-4.0",
        "--data",
        "Street scenes",
        "--metric",
        "test/mean_iou=0.4",
        "--measured-with",
        command,
    ]
    main(
        ["hub", "publish", "best.ckpt", "--repo", "you/streets", "--dry-run", *options, "--description", "For a test."]
    )
    assert hub.requests == []
    assert "best.ckpt: " in (out := capsys.readouterr().out)
    assert "streets/README.md, streets/config.json, streets/model.safetensors" in out
    card = ModelCard.load(tmp_path / "streets" / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "image-segmentation"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "val/mean_iou": 0.4321,
        "test/mean_iou": 0.4,
    }
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for text in (
        "For a test.",
        "3 classes",
        "Classes, in order: a, b, c.",
        'smp.from_pretrained("you/streets")',
        'hub.load_model("hf-hub:you/streets")',
        "mean (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225)",
        "Street scenes.",
        f"Measured with `{command}`",
        "| test/mean_iou | 0.4000 |",
        f"`best.ckpt`, SHA-256 `{digest}`",
        "The weights: cc-by-4.0. The code that loads them, lk_backbones: MIT.",
    ):
        assert text in card.content, text
    assert str(tmp_path) not in card.content + (tmp_path / "streets" / "config.json").read_text()


def test_a_checkpoint_cannot_choose_what_is_imported(hub: LoopbackHub, checkpoint: Path, tmp_path: Path) -> None:
    folder = lk_hub.push(checkpoint, "you/streets", folder=tmp_path / "streets", dry_run=True)
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text())
    for name in ("os.system", "openmmlab_state_dict", "Popen"):
        config["_lk_backbones"]["class"] = name
        file.write_text(json.dumps(config))
        with pytest.raises(lk_hub.WeightsError, match=rf"'{name}', but a file may only name a class"):
            lk_hub.load_model(folder)


def test_the_list_knows_the_cache(hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save

    hub.add("team/slak_tiny.in1k", {"model.safetensors": save({"a": torch.ones(1)})})
    main(["hub", "pull", "slak_tiny.in1k", "--namespace", "team"])
    capsys.readouterr()
    main(["hub", "list", "slak_tiny.*", "--namespace", "team"])
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[-1] for line in out.splitlines() if "slak_tiny" in line}
    assert rows == {name: "yes" if name == "slak_tiny.in1k" else "drive*" for name in rows}
    assert "team on the Hub comes first" in out


def test_weights_of_an_encoder_that_is_not_built_in(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save

    # whichever families are built in by now
    monkeypatch.setattr("lk_backbones.cli.hub.list_encoders", lambda: ["replknet_31b"])
    for name in ("slak_tiny.in1k", "replknet_31b.in1k"):
        hub.add(f"team/{name}", {"model.safetensors": save({"a": torch.ones(1)})})
        main(["hub", "pull", name, "--namespace", "team"])
        out = capsys.readouterr().out
        assert f"source: hf-hub:team/{name}@" in out
        assert ("not yet: lk_backbones has no encoder for 'slak_tiny.in1k'" in out) is (name == "slak_tiny.in1k")


def test_errors_are_one_sentence(hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["hub", "pull", "hf-hub:you/none"])
    error = capsys.readouterr().err
    assert "there is no model repository 'you/none'" in error
    assert "Traceback" not in error
