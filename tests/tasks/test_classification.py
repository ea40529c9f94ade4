"""The classification task: timm's numbers, timm's losses, weights from anywhere, and a command line's whole road."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import AverageMeter, accuracy
from torch.utils.data import DataLoader

from lk_backbones import hub
from lk_backbones.callbacks import ClassificationResults, ReproducibleSteps
from lk_backbones.cli import main
from lk_backbones.data import ImageFolderDataModule
from lk_backbones.metrics import ClassificationMetrics
from lk_backbones.tasks import BaseTask, ClassificationTask, DetectionTask, SegmentationTask
from lk_backbones.tasks.base import without_encoder_weights
from lk_backbones.tasks.optim import warmup_cosine
from lk_backbones.weights.errors import WeightsError
from tests.class_folders import COLORS, draw_folders

#: Under which a process of its own finds the package and these tests.
PYTHONPATH = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
TINY = {"kernel_sizes": 3, "depths": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
SMALL: dict[str, Any] = {"num_workers": 0, "batch_size": 6, "val_batch_size": 5, "seed": 0}


def make_task(**arguments: Any) -> ClassificationTask:
    torch.manual_seed(0)
    given = {"encoder": "replknet_31n", "encoder_kwargs": TINY, "num_classes": 6, "input_size": 32} | arguments
    return ClassificationTask(**given)


def make_trainer(folder: Path, **arguments: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": 1,
        "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "default_root_dir": folder, "log_every_n_steps": 1,
    }  # fmt: skip
    return L.Trainer(**(defaults | arguments))


def numbers(trainer: L.Trainer) -> dict[str, float]:
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


def random_statistics(model: torch.nn.Module) -> None:
    """Give a new network outputs that differ from picture to picture."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=1.0, generator=generator)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, 32, 32, generator=generator))
    model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folders(tmp_path_factory.mktemp("folders"), {"train": 6, "val": 3})


# --- timm's evaluation ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many shapes in 20 classes, so that top-5 is no matter of course; of noise, so that none is easy."""
    root = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(1)
    for label in range(20):
        folder = root / "val" / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(6):
            height, width = rng.integers(30, 90, 2)
            blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
            pixels = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
            Image.fromarray(pixels).save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
    return root


def timm_validate(model: torch.nn.Module, root: Path, **given: Any) -> tuple[float, float, int]:
    """What timm's validate.py does, with its own parts."""
    config = resolve_data_config(given, model=model, use_test_size=True)
    loader = create_loader(
        create_dataset("", str(root)), batch_size=7, use_prefetcher=False, num_workers=0, persistent_workers=False,
        **{k: config[k] for k in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )  # fmt: skip
    top1, top5 = AverageMeter(), AverageMeter()
    model.eval()
    with torch.no_grad():
        for images, target in loader:
            output = model(images)
            acc1, acc5 = accuracy(output, target, topk=(1, 5))
            top1.update(acc1.item(), images.size(0))
            top5.update(acc5.item(), images.size(0))
    return top1.avg, top5.avg, top1.count


SETTINGS: dict[str, dict[str, Any]] = {
    "center": {"input_size": (32, 32), "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"},
    "squash": {"input_size": (40, 40), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
    "border": {"input_size": (32, 32), "crop_pct": 0.9, "crop_mode": "border", "interpolation": "bicubic"},
    "oblong": {"input_size": (32, 48), "crop_pct": 0.95, "crop_mode": "center", "interpolation": "bilinear"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_top1_and_top5_are_those_of_timm(name: str, many_classes: Path, tmp_path: Path) -> None:
    settings = SETTINGS[name]
    task = make_task(num_classes=20, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4], **settings)
    random_statistics(task.model)
    trainer = make_trainer(tmp_path)
    data = ImageFolderDataModule(str(many_classes), **SMALL)
    trainer.test(task, data, verbose=False)
    found = numbers(trainer)
    given = settings | {"input_size": (3, *settings["input_size"])}
    top1, top5, count = timm_validate(task.model, many_classes / "val", **given)
    assert count == 120
    assert 100 * found["test/top1"] == pytest.approx(top1, abs=1e-5)
    assert 100 * found["test/top5"] == pytest.approx(top5, abs=1e-5)
    assert 0 < found["test/top1"] < found["test/top5"] < 1
    # without any argument of ours: the network has taken them over
    assert timm_validate(task.model, many_classes / "val") == (top1, top5, count)


def test_settings_come_from_the_weights_and_arguments_win() -> None:
    with without_encoder_weights():
        task = ClassificationTask("unireplknet_s.in22k_ft_in1k_384")
        config = timm.get_pretrained_cfg("unireplknet_s.in22k_ft_in1k_384")
        assert task.hparams["input_size"] == tuple(config.input_size[1:]) == (384, 384)
        assert task.hparams["crop_pct"] == config.crop_pct
        changed = ClassificationTask(
            "unireplknet_s.in22k_ft_in1k_384", input_size=256, crop_pct=1.0, crop_mode="border"
        )
    assert (changed.hparams["input_size"], changed.hparams["train_size"]) == ((256, 256), (256, 256))
    assert (changed.hparams["crop_pct"], changed.hparams["crop_mode"]) == (1.0, "border")
    # of a model that is tested at another size than it was trained at
    tested = ClassificationTask("convnext_atto.d2_in1k", num_classes=10)
    assert (tested.hparams["train_size"], tested.hparams["input_size"]) == ((224, 224), (288, 288))
    assert tested.hparams["encoder"] == "tu-convnext_atto.d2_in1k"


def test_metrics_count_every_picture_once() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 8, generator=generator)
    label = torch.randint(7, (50,), generator=generator)  # nothing is of the last class
    metrics = ClassificationMetrics(8)
    for place in range(0, 50, 7):
        metrics.update(logits[place : place + 7].topk(5).indices, label[place : place + 7])
    found = metrics.compute()
    top1, top5 = accuracy(logits, label, topk=(1, 5))
    assert 100 * found["top1"].item() == pytest.approx(top1.item())
    assert 100 * found["top5"].item() == pytest.approx(top5.item())
    expected = torch.zeros(8, 8, dtype=torch.long)
    for truth, predicted in zip(label.tolist(), logits.argmax(1).tolist(), strict=True):
        expected[truth, predicted] += 1
    assert torch.equal(found["confusion"], expected)
    assert torch.allclose(found["per_class"][:7], (expected.diagonal() / expected.sum(1))[:7].double())
    assert found["per_class"][7].isnan()
    assert not len(ClassificationMetrics(1001).compute()["confusion"])


# --- training -------------------------------------------------------------------------------------------------------


def test_the_losses_are_those_of_timms_training_script() -> None:
    kinds = {
        (): torch.nn.CrossEntropyLoss,
        (("label_smoothing", 0.1),): LabelSmoothingCrossEntropy,
        (("mixup_alpha", 0.2),): SoftTargetCrossEntropy,
        (("loss", "bce"), ("label_smoothing", 0.1)): BinaryCrossEntropy,
        (("loss", "bce"), ("cutmix_alpha", 1.0)): BinaryCrossEntropy,
    }
    for arguments, kind in kinds.items():
        assert type(make_task(**dict(arguments)).loss) is kind
    assert make_task(loss="bce").loss.smoothing == 0


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_and_erasing_follow_the_seed_and_leave_the_generators_alone(
    mode: str, folders: Path, tmp_path: Path
) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        mixed: dict[str, Any] = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mixup_mode": mode, "random_erasing": 0.5}
        task = make_task(label_smoothing=0.1, **mixed)
        data = ImageFolderDataModule(str(folders), **SMALL)
        np.random.seed(int(time.time()))  # of which nothing depends
        state = np.random.get_state()[1].copy()
        make_trainer(tmp_path, max_steps=3, limit_val_batches=0, callbacks=[ReproducibleSteps(seed)]).fit(task, data)
        assert (np.random.get_state()[1] == state).all()
        return {key: value.clone() for key, value in task.state_dict().items()}

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize("arguments", [{"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}])
def test_an_odd_batch_is_refused_before_anything_runs(
    arguments: dict[str, float], folders: Path, tmp_path: Path
) -> None:
    task = make_task(**arguments)
    data = ImageFolderDataModule(str(folders), **(SMALL | {"batch_size": 5}))
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="batch_size=5 is odd"):
        trainer.fit(task, data)
    assert trainer.global_step == 0
    with pytest.raises(ValueError, match="batch_size=3 is odd"):  # of a loader, in its first step
        make_trainer(tmp_path).fit(task, DataLoader([{"image": torch.rand(3, 32, 32), "label": 1}] * 3, 3))
    make_trainer(tmp_path).test(make_task(**arguments), data, verbose=False)


def test_it_learns_with_layer_decay_and_averaged_weights(folders: Path, tmp_path: Path) -> None:
    # layer norms: with batches of 12, batch norms of maps of one pixel measure too little
    network = {"encoder": "convnext_atto", "encoder_kwargs": {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]}}
    task = make_task(**network, lr=1e-2, layer_decay=0.9, per_class_accuracy=True, warmup_steps=3)
    trainer = make_trainer(tmp_path, max_epochs=10, callbacks=[EMAWeightAveraging(decay=0.6)])
    data = ImageFolderDataModule(str(folders), scale=(0.5, 1.0), color_jitter=0.0, **(SMALL | {"batch_size": 12}))
    trainer.fit(task, data)
    found = numbers(trainer)
    assert found["val/top1"] > 0.8
    assert {f"val/accuracy/{name}" for name in COLORS} <= found.keys()
    assert found["val/top1"] == pytest.approx(np.mean([found[f"val/accuracy/{name}"] for name in COLORS]))
    assert task.measured["confusion"].sum() == 18
    groups = task.configure_optimizers()["optimizer"].param_groups
    assert max(group["lr"] for group in groups) == pytest.approx(1e-2 * task_ramp(task))
    assert min(group["initial_lr"] for group in groups) < 1e-2 * 0.9**3


def task_ramp(task: ClassificationTask) -> float:
    return warmup_cosine(0, 100, task.hparams["warmup_steps"], task.hparams["warmup_ratio"], 0.0)


def test_the_cosine_schedule() -> None:
    factors = [warmup_cosine(step, 110, 10, 0.1, 0.01) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.505)
    assert factors[110] == pytest.approx(0.01)
    assert warmup_cosine(5, 3, 0, 0.1, 0.0) == pytest.approx(0, abs=1e-12)


def test_only_the_classifier_of_a_frozen_encoder_is_trained(folders: Path, tmp_path: Path) -> None:
    task = make_task(freeze_encoder=True, lr=0.1)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    make_trainer(tmp_path, max_steps=2).fit(task, ImageFolderDataModule(str(folders), **SMALL))
    changed = {key for key, value in task.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"model.head.fc.weight", "model.head.fc.bias"}


def test_gradient_checkpointing_changes_nothing() -> None:
    image = torch.rand(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        task = make_task(gradient_checkpointing=checkpointing).eval()
        task(image).logsumexp(1).sum().backward()
        gradients.append(next(task.model.parameters()).grad)
    assert torch.allclose(*gradients, atol=1e-6)


# --- weights --------------------------------------------------------------------------------------------------------


def write_weights(folder: Path, num_classes: int, **config: Any) -> Path:
    """Weights in timm's layout, of the tiny network."""
    torch.manual_seed(5)
    model = timm.create_model("replknet_31n", num_classes=num_classes, **TINY)
    model.pretrained_cfg = model.pretrained_cfg | config
    timm.models.save_for_hf(model, str(folder), model_args=TINY, safe_serialization=True)
    return folder


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_fine_tuning_with_other_classes(
    kind: str, folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"input_size": (3, 48, 48), "crop_pct": 0.95, "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5)}
    folder = write_weights(tmp_path / "published", 11, **given)
    source = str(folder if kind == "folder" else folder / "model.safetensors")
    task = make_task(encoder_weights=source, input_size=None)
    assert "a classifier of 11 classes; the model keeps its own, of 6" in caplog.text
    published = timm.models.load_state_dict(str(folder / "model.safetensors"))
    for key, value in task.model.state_dict().items():
        if not key.startswith("head.fc"):
            assert torch.equal(value, published[key]), key
    if kind == "folder":
        assert (task.hparams["input_size"], task.hparams["crop_pct"]) == ((48, 48), 0.95)
        assert (task.hparams["interpolation"], task.hparams["mean"]) == ("bilinear", [0.5, 0.5, 0.5])
    data = ImageFolderDataModule(str(folders), **SMALL)
    trainer = make_trainer(tmp_path)
    for run in (trainer.test, trainer.validate):
        with pytest.raises(ValueError, match=r"the classifier is new and was never trained.*num_classes=6"):
            run(task, data, verbose=False)
    with pytest.raises(ValueError, match="never trained"):
        trainer.predict(task, data)
    make_trainer(tmp_path, max_steps=1).fit(task, data)  # with a validation in it
    trainer.test(task, data, verbose=False)
    same = make_task(encoder_weights=source, num_classes=11)
    assert torch.equal(same.model.head.fc.weight, published["head.fc.weight"])


def test_published_weights_know_the_names_of_their_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_weights(tmp_path / "published", 1000)
    monkeypatch.setattr("lk_backbones.tasks.encoder.pull", lambda source: hub.pull(folder))
    task = make_task(encoder="replknet_31b.in1k", encoder_weights=True, num_classes=1000)
    assert task.class_names[0].startswith("tench")
    assert task.hparams["class_names"] is None, "the data's are still wanted"
    assert make_task(encoder="replknet_31b.in1k", encoder_weights=True).class_names[0] == "class_0"
    own = make_task(encoder_weights=str(folder), num_classes=1000)
    assert own.class_names[0] == "class_0", "nobody knows what these are"


@pytest.mark.parametrize(
    ("key", "value"),
    [("crop_pct", 7), ("crop_pct", "x"), ("input_size", [3, 0, 9]), ("interpolation", "evil"), ("crop_mode", ["a"])],
)
def test_settings_of_a_file_are_checked(key: str, value: Any, tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "published", 6)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=rf"config\.json.*{key}"):
        make_task(encoder_weights=str(folder))


@pytest.fixture(scope="module")
def trained(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a bare trainer, after a step."""
    folder = tmp_path_factory.mktemp("trained")
    task = make_task(mean=[0.4, 0.5, 0.6], std=[0.3, 0.2, 0.1], crop_pct=0.7)
    trainer = make_trainer(folder, max_steps=1)
    trainer.fit(task, ImageFolderDataModule(str(folders), **SMALL))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_a_checkpoint_alone_rebuilds_task_and_data(trained: Path) -> None:
    task = BaseTask.load_from_checkpoint(trained)
    assert type(task) is ClassificationTask
    assert task.class_names == sorted(COLORS)
    assert (task.hparams["input_size"], task.hparams["crop_pct"]) == ((32, 32), 0.7)
    data = ImageFolderDataModule.load_from_checkpoint(trained)
    assert data.batch_size == 6


def test_a_checkpoint_is_an_encoder_of_the_other_tasks(trained: Path) -> None:
    task = ClassificationTask.load_from_checkpoint(trained)
    source: dict[str, Any] = {"encoder": "replknet_31n", "encoder_kwargs": TINY, "encoder_weights": str(trained)}
    decoder = {"decoder_channels": [8, 8, 8, 8, 8]}
    others = [
        SegmentationTask("unet", **source, architecture_kwargs=decoder, num_classes=3),
        DetectionTask("fcos", **source, num_classes=3, architecture_kwargs={"fpn_channels": 16}),
        ClassificationTask(**source, num_classes=3),
    ]
    expected = task.model.state_dict()
    for other in others:
        state = {key.replace("stages_", "stages."): value for key, value in other.encoder.state_dict().items()}
        kernel = next(key for key in expected if key.endswith("conv.weight") and "stages.3" in key)
        (mine,) = [value for key, value in state.items() if key.removeprefix("model.") == kernel]
        assert torch.equal(mine, expected[kernel])
        assert other.hparams["mean"] == [0.4, 0.5, 0.6], "the encoder has seen such pictures"
    assert others[2].hparams["crop_pct"] == 0.7


def test_published_and_loaded_again_by_timm_and_as_a_task(trained: Path, tmp_path: Path) -> None:
    task = ClassificationTask.load_from_checkpoint(trained).eval()
    folder = hub.push(task, "you/mine", folder=tmp_path / "mine", dry_run=True)
    again = hub.load_model(folder)
    assert type(again) is ClassificationTask
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(task(image), again(image))
    assert (again.class_names, again.hparams["crop_pct"]) == (task.class_names, 0.7)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(model(task.normalize(image)), task(image))
    config = resolve_data_config({}, model=model, use_test_size=True)
    assert (config["crop_pct"], tuple(config["input_size"])) == (0.7, (3, 32, 32))
    assert tuple(config["mean"]) == (0.4, 0.5, 0.6)
    loaded = hub.load_model(trained)
    assert torch.equal(loaded(image), task(image))
    assert "image-classification" in Path(folder, "README.md").read_text()


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "resnet500"}, "unknown encoder 'resnet500'"),
        ({"encoder": "mit_b0", "encoder_kwargs": None}, "'mit_b0' is an encoder of smp's own"),
        ({"encoder_kwargs": {"colour": 1}}, "refuses its arguments"),
        ({"num_classes": 1}, "num_classes=1"),
        ({"input_size": 0}, "input_size=0"),
        ({"train_size": (1, 2, 3)}, "train_size"),
        ({"crop_pct": 1.5}, "crop_pct=1.5"),
        ({"crop_mode": "left"}, "crop_mode='left'"),
        ({"interpolation": "cubic"}, "interpolation='cubic'"),
        ({"loss": "mse"}, "loss='mse'"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"mixup_alpha": -1.0}, "mixup_alpha"),
        ({"mixup_mode": "all"}, "mixup_mode"),
        ({"random_erasing": 1.1}, "random_erasing"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"lr": float("nan")}, "lr"),
        ({"class_names": ["a"]}, "class_names has 1 entries"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(**arguments)


def test_data_of_other_classes(folders: Path, tmp_path: Path) -> None:
    data = ImageFolderDataModule(str(folders), **SMALL)
    with pytest.raises(ValueError, match="num_classes=6, but the task was built with num_classes=7"):
        make_trainer(tmp_path).test(make_task(num_classes=7), data)
    names = sorted(COLORS)
    with pytest.raises(ValueError, match="another order: class 0 is 'yellow' in the task, but 'blue'"):
        make_trainer(tmp_path).test(make_task(class_names=names[::-1]), data)
    with pytest.warns(UserWarning, match="class 5 is 'gold' in the task, but 'yellow'"):
        make_trainer(tmp_path).test(make_task(class_names=[*names[:5], "gold"]), data, verbose=False)
    batch = {"image": torch.rand(2, 3, 32, 32), "label": torch.tensor([0, 9]), "path": ["a.jpg", "b.jpg"]}
    with pytest.raises(ValueError, match=r"label of 'b\.jpg' is 9, but the classes are 0 to 5"):
        make_task().training_step(batch, 0)


# --- the command line -----------------------------------------------------------------------------------------------

QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.num_sanity_val_steps", "0", "--data.num_workers", "0"),
]


def test_fit_test_and_predict(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--model.encoder_kwargs", json.dumps(TINY), "--model.input_size", "32", "--data.batch_size", "6"]
    recipe = ["--config", "own/classify_replknet_31n_224", "--data.root", str(folders), *small]
    main(["fit", *recipe, *QUIET, "--trainer.max_epochs", "2"])
    out = capsys.readouterr().out
    assert "top-1" in out
    assert "top-5" in out
    assert "confusion_matrix.png" in out
    (path,) = tmp_path.rglob("last.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"]["num_classes"] == 6
    assert len(list(tmp_path.rglob("overlays/val/step_*/*.png"))) == 2 * 4

    options = [*QUIET, "--trainer.logger", "false", "--overlays.directory", "out"]
    main(["test", "--ckpt_path", str(path), *options])
    alone = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    main(["test", *recipe, "--ckpt_path", str(path), *options])
    assert alone
    assert [line for line in capsys.readouterr().out.splitlines() if "│" in line] == alone
    with Path("out/test/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    hits = sum(row["truth"] == row["class_1"] for row in rows)
    assert any(f"{100 * hits / 18:.2f}" in line for line in alone if "top-1" in line)
    assert Path("out/test/confusion_matrix.png").is_file()

    pictures = ["--pictures", str(folders / "val"), "--classes.pictures_per_sheet", "10"]
    main(["predict", "--ckpt_path", str(path), *pictures, *options])
    out = capsys.readouterr().out
    assert "predictions.csv" in out
    assert "contact_sheet_001.png" in out
    with Path("out/predictions.csv").open() as file:
        predicted = list(csv.DictReader(file))
    assert list(predicted[0])[:3] == ["file", "class_1", "probability_1"]
    assert {row["file"]: row["class_1"] for row in predicted} == {row["file"]: row["class_1"] for row in rows}
    for row in predicted:
        probabilities = [float(row[f"probability_{place}"]) for place in range(1, 6)]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) <= 1 + 1e-5
    assert len(list(Path("out").glob("contact_sheet_*.png"))) == 2
    assert not list(Path("out").rglob("*part*"))


def test_weights_of_other_classes_are_no_evaluation(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_weights(tmp_path / "published", 11)
    args = ["--config", "imagenet/evaluate", "--model.encoder", "replknet_31n", "--model.encoder_weights", str(source)]
    args += ["--model.encoder_kwargs", json.dumps(TINY)]
    data = ["--data", "ImageFolderDataModule", "--data.root", str(folders)]
    with pytest.raises(SystemExit):
        main(["test", *args, *data, *QUIET])
    assert "the classifier is new and was never trained" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["test", *args, *data, *QUIET, "--model.num_classes", "11"])
    assert "num_classes=6" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["test", *args, "--data.root", str(folders), *QUIET])
    assert "ImageFolderDataModule" in capsys.readouterr().err


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a process that is started with OMP_NUM_THREADS=1: sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_killed_run_resumes_to_the_same_weights(folders: Path, tmp_path: Path, one_thread: None) -> None:
    def arguments(folder: Path, *more: str) -> list[str]:
        options = ["--config", "own/classify_replknet_31n_224", "--data.root", str(folders), *QUIET]
        options += ["--model.encoder_kwargs", json.dumps(TINY | {"drop_path_rate": 0.3}), "--model.input_size", "32"]
        options += ["--data.batch_size", "6", "--model.random_erasing", "0.5", "--trainer.max_epochs", "2"]
        options += ["--trainer.limit_val_batches", "0", "--trainer.logger", "false", "--trainer.deterministic", "true"]
        options += ["--trainer.callbacks", "lightning.pytorch.callbacks.ModelCheckpoint"]
        options += ["--trainer.callbacks.every_n_train_steps", "2", "--trainer.callbacks.dirpath", str(folder)]
        options += ["--trainer.callbacks.save_top_k", "-1", "--trainer.callbacks.filename", "{step}"]
        options += ["--trainer.callbacks.auto_insert_metric_name", "false"]
        return ["fit", *options, *more]

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "lk_backbones.cli", *arguments(killed)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}, cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    waited_for = killed / "4.ckpt"  # in the middle of the first epoch of 6 steps
    deadline = time.monotonic() + 300
    while not waited_for.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert waited_for.exists()
    for path in killed.glob("*.ckpt"):
        if path != waited_for:
            path.unlink()

    main(arguments(undisturbed))
    main(arguments(killed, "--ckpt_path", str(waited_for)))
    first, second = (torch.load(d / "12.ckpt", weights_only=True)["state_dict"] for d in (undisturbed, killed))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


# --- two processes --------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from tests.tasks.test_classification import fit_and_test

fit_and_test(Path(sys.argv[1]), sys.argv[2], 2)
"""


def fit_and_test(folder: Path, root: str, devices: int) -> None:
    """Train for an epoch, measure, and write what was measured."""
    torch.manual_seed(0)
    # without batch norms, which see less in each of two processes
    kwargs = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    task = ClassificationTask("tu-convnext_atto", None, kwargs, 6, input_size=32, optimizer="sgd", lr=0.05)
    data = ImageFolderDataModule(root, num_workers=0, batch_size=6 // devices, val_batch_size=2, seed=0)
    trainer = make_trainer(
        folder, devices=devices, strategy="ddp" if devices > 1 else "auto", use_distributed_sampler=False,
        callbacks=[ClassificationResults(str(folder))],
    )  # fmt: skip
    trainer.fit(task, data)
    found = numbers(trainer)
    trainer.test(task, data, verbose=False)
    found |= numbers(trainer)
    if trainer.is_global_zero:
        found["pictures"] = int(task.measured["confusion"].sum())
        (folder / "metrics.json").write_text(json.dumps(found))


def test_two_processes_train_and_measure_as_one(tmp_path: Path, one_thread: None) -> None:
    root = draw_folders(tmp_path / "data", {"train": 6, "val": 3})
    (root / "val" / "red" / "red_2.jpg").unlink()  # 17 pictures: one process has one more
    fit_and_test(tmp_path / "1", str(root), 1)
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "2"), str(root)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = (json.loads((tmp_path / devices / "metrics.json").read_text()) for devices in "12")
    assert one["pictures"] == two["pictures"] == 17
    for key in ("val/top1", "test/top1", "test/top5"):
        assert one[key] == two[key], key
    for key in ("val/loss", "test/loss"):
        assert one[key] == pytest.approx(two[key], rel=1e-4), key
    tables = [list(csv.DictReader((tmp_path / d / "test" / "predictions.csv").open())) for d in "12"]
    assert [row["file"] for row in tables[0]] == [row["file"] for row in tables[1]]
    assert len(tables[0]) == 17
    assert [row["class_1"] for row in tables[0]] == [row["class_1"] for row in tables[1]]


# --- checkpoints that lie -------------------------------------------------------------------------------------------

OPENS = {"class_path": "logging.FileHandler", "init_args": {"filename": "executed"}}


@pytest.mark.parametrize(
    ("place", "values", "name"),
    [
        ("hyper_parameters", {"encoder_kwargs": OPENS}, "class_path"),
        ("hyper_parameters", {"encoder_kwargs": {"act_layer": OPENS}}, ""),
        ("hyper_parameters", {"encoder": "hf-hub:you/evil"}, "may not say where"),
        ("hyper_parameters", {"encoder": "tu-hf-hub:you/evil"}, "encoder"),
        ("hyper_parameters", {"input_size": [10**6, 10**6]}, "input_size"),
        ("hyper_parameters", {"train_size": OPENS}, "train_size"),
        ("hyper_parameters", {"crop_pct": 1e-9, "input_size": [True, 5]}, "input_size"),
        ("hyper_parameters", {"interpolation": "evil"}, "interpolation"),
        ("hyper_parameters", {"loss": OPENS}, "loss"),
        ("hyper_parameters", {"_class_path": "evil.ClassificationTask"}, "evil"),
        ("datamodule_hyper_parameters", {"auto_augment": OPENS}, "auto_augment"),
        ("datamodule_hyper_parameters", {"auto_augment": "evil"}, "auto_augment"),
        ("datamodule_hyper_parameters", {"root": OPENS}, "root"),
        ("datamodule_hyper_parameters", {"transform": OPENS}, "transform"),
    ],
)
def test_a_tampered_checkpoint_is_refused(
    place: str,
    values: dict[str, Any],
    name: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    content = torch.load(trained, weights_only=True)
    content[place] = {**content[place], **values}
    torch.save(content, "evil.ckpt")
    with pytest.raises(SystemExit) as stopped:
        main(["test", "--ckpt_path", "evil.ckpt", *QUIET, "--trainer.logger", "false"])
    assert stopped.value.code == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "evil.ckpt" in error
    assert name in error
    assert not Path("executed").exists()
