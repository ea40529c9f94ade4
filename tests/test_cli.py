"""The command line as users call it: real trainers, real files, real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from PIL import Image

from lk_backbones.cli import main
from lk_backbones.data import PictureFolderDataModule, SyntheticScenesDataModule
from lk_backbones.data.datamodule import PictureDataModule
from lk_backbones.tasks import SegmentationTask

TINY = [
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.num_sanity_val_steps", "0"),
]
SCENES = [
    *("--model", "SegmentationTask", "--model.architecture", "fpn", "--model.encoder", "replknet_31n"),
    *("--model.num_classes", "9"),
    *("--model.encoder_kwargs", '{"drop_path_rate": 0.2, "kernel_sizes": 7, "depths": [1, 1, 1, 1]}'),
    *("--data", "SyntheticScenesDataModule", "--data.image_size", "[64, 64]", "--data.batch_size", "2"),
    *("--data.train_images", "12", "--data.val_images", "3", "--data.test_images", "3", "--data.num_workers", "0"),
]


KWARGS = {"drop_path_rate": 0.2, "kernel_sizes": 7, "depths": [1, 1, 1, 1]}
WHOLE = {"kernel_sizes": 7, "depths": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training; returns its folder."""
    root = tmp_path_factory.mktemp("run")
    options = ["--trainer.max_epochs", "1", "--trainer.default_root_dir", str(root), "--seed_everything", "3"]
    main(["fit", *SCENES, *TINY, *options])
    return root


@pytest.fixture
def checkpoint(run: Path) -> str:
    (path,) = run.rglob("*.ckpt")
    return str(path)


def test_fit_leaves_pictures_logs_and_a_checkpoint(run: Path, checkpoint: str) -> None:
    pictures = list(run.rglob("overlays/val/**/*.png"))
    assert len(pictures) == 3
    for path in pictures:  # image, truth and prediction side by side, not a blank sheet
        picture = np.asarray(Image.open(path))
        assert picture.shape[1] > 3 * 64
        assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100
    assert list(run.rglob("events.out.tfevents*"))
    assert list(run.rglob("config.yaml"))


def test_a_checkpoint_alone_validates_to_the_same_numbers(
    run: Path, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert trained
    main(["validate", "--ckpt_path", checkpoint, *TINY, "--trainer.logger", "false"])
    first = capsys.readouterr().out
    main(["validate", "--ckpt_path", checkpoint, *TINY, "--trainer.logger", "false"])
    second = capsys.readouterr().out
    assert "mean IoU" in first
    assert [line for line in first.splitlines() if "│" in line] == [line for line in second.splitlines() if "│" in line]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_evaluations_write_beside_their_run_and_over_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "version_0"
    (original,) = (path.parent for path in run.rglob("config.yaml"))
    shutil.copytree(original, folder, ignore=lambda path, names: {"validate", "test", "predict"} & {*names})
    (name,) = (path.name for path in folder.glob("checkpoints/*.ckpt"))
    checkpoint = ["--ckpt_path", str(Path("runs", "version_0", "checkpoints", name))]
    of_the_run = contents(tmp_path)
    before = dict(of_the_run)

    def written(*args: str) -> set[str]:
        main([*args, *TINY, "--overlays.num_pictures", "1"])
        now = contents(tmp_path)
        assert {path: content for path, content in now.items() if path in before} == before
        new = {Path(path).as_posix() for path in now if path not in before}
        before.update(now)
        return {path.rpartition("events.out.tfevents")[0] or path for path in new}

    def all_of(command: str, number: int) -> set[str]:
        version = f"runs/version_0/{command}/version_{number}"
        return {f"{version}/{name}" for name in ("", "hparams.yaml")}

    val, test = "overlays/val/step_00000000/scene_val_00000.png", "overlays/test/scene_test_00000.png"
    assert written("validate", *checkpoint) == {*all_of("validate", 0), f"runs/version_0/validate/version_0/{val}"}
    assert f"pictures:   {folder / 'validate' / 'version_0' / 'overlays'}" in capsys.readouterr().out.splitlines()
    for number in (0, 1):
        assert written("test", *checkpoint) == {
            *all_of("test", number),
            f"runs/version_0/test/version_{number}/{test}",
        }
    # who evaluates by the run's own configuration has asked for no folder either, and keeps that of the run
    again = written("test", "--config", str(folder / "config.yaml"), *checkpoint, "--trainer.default_root_dir", "null")
    assert again - all_of("test", 2) == {f"runs/version_0/test/version_2/{name}" for name in (test, "config.yaml")}
    assert written("test", *checkpoint, "--trainer.logger", "false") == {f"runs/version_0/test/{test}"}

    # what is asked for
    assert written("test", *checkpoint, "--trainer.default_root_dir", "own", "--trainer.logger", "false") == {
        f"own/{test}"
    }
    csv = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"]
    assert f"logs/lightning_logs/version_0/{test}" in written("test", *checkpoint, *csv)
    # a checkpoint of no run: wherever it was downloaded to is not ours to fill
    shutil.copy(Path("runs", "version_0", "checkpoints", name), "alone.ckpt")
    before["alone.ckpt"] = Path("alone.ckpt").read_bytes()
    assert f"lightning_logs/version_0/{test}" in written("test", "--ckpt_path", "alone.ckpt")
    assert of_the_run.items() <= contents(tmp_path).items()


def test_a_checkpoint_of_a_bare_trainer_knows_its_data_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, enable_checkpointing=False, **quiet)
    task = SegmentationTask("fpn", "replknet_31n", num_classes=9, encoder_kwargs=KWARGS)
    images = {"train_images": 2, "val_images": 1, "test_images": 1}
    data = SyntheticScenesDataModule(image_size=(64, 64), batch_size=2, num_workers=0, **images)
    trainer.fit(task, data)
    trainer.save_checkpoint("bare.ckpt", weights_only=False)
    options = [*TINY, "--trainer.logger", "false"]
    main(["test", "--ckpt_path", "bare.ckpt", *options, "--overlays.directory", "out"])
    assert "mean IoU" in capsys.readouterr().out
    assert len(list(Path("out").rglob("*.png"))) == 1

    content = torch.load("bare.ckpt", weights_only=True)
    del content["SyntheticScenesDataModule"]  # as with a data module of the user's own
    torch.save(content, "foreign.ckpt")
    with pytest.raises(SystemExit):
        main(["test", "--ckpt_path", "foreign.ckpt", *options])
    error = " ".join(capsys.readouterr().err.split())
    assert "do not name the class of their data module: do so, with --data or --config" in error


@pytest.mark.parametrize("logger", ["false", "CSVLogger"])
def test_a_configuration_that_the_user_wrote_is_not_written_over(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may lie where a run without a logger, or one with a logger that has no folder per run, puts its own."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("trainer: {max_epochs: 0} # mine\n")
    given = ["--trainer.logger", logger, "--trainer.default_root_dir", "."]
    given += ["--trainer.logger.save_dir", ".", "--trainer.logger.name", "", "--trainer.logger.version", ""]
    main(["fit", "--config", "config.yaml", *SCENES, *TINY, *(given if logger != "false" else given[:2])])
    assert Path("config.yaml").read_text() == "trainer: {max_epochs: 0} # mine\n"


def test_flags_win_over_the_checkpoint(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model.tta_flip", "true", "--data.val_images", "1"]
    main(["validate", "--ckpt_path", checkpoint, *flags, *TINY, "--overlays.directory", str(tmp_path / "o")])
    assert len(list((tmp_path / "o").rglob("*.png"))) == 1


def test_predict_writes_a_label_map_and_an_overlay_of_every_picture(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    sizes = {"a": (70, 45), "b": (64, 64)}
    for name, (width, height) in sizes.items():
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(pictures / f"{name}.png")
    out = tmp_path / "out"
    options = ["--overlays.directory", str(out), "--trainer.logger", "false", "--data.num_workers", "0"]
    main(["predict", "--ckpt_path", checkpoint, "--pictures", str(pictures), *TINY, *options])
    assert str(out) in capsys.readouterr().out
    for name, size in sizes.items():
        labels = Image.open(out / "label_maps" / f"{name}.png")
        assert labels.size == size
        assert np.asarray(labels).max() < 9
        assert (out / "overlays" / f"{name}.png").is_file()


def test_two_processes_write_about_every_picture_whatever_its_name(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = {"day/a.png": (64, 70), "night/a.png": (64, 75), "night/a.bmp": (64, 80), "night/A.png": (64, 85)}
    pictures["b.png"] = (64, 90)  # an odd number: the processes do not have equally many
    for path, size in pictures.items():
        (tmp_path / "pictures" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (90, 120, 200)).save(tmp_path / "pictures" / path)

    def command(folder: str) -> list[str]:
        options = ["--overlays.directory", folder, "--trainer.logger", "false", "--data.num_workers", "0"]
        return ["predict", "--ckpt_path", checkpoint, "--pictures", "pictures", *TINY, *options]

    def written(folder: str) -> dict[str, tuple[int, int]]:
        maps = {path.name: Image.open(path).size for path in Path(folder, "label_maps").iterdir()}
        assert sorted(path.name for path in Path(folder, "overlays").iterdir()) == sorted(maps)
        return maps

    main(command("alone"))
    assert sorted(written("alone").values()) == sorted(pictures.values())
    two = [*command("together"), "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "lk_backbones.cli", *two], check=True, env=env, capture_output=True)
    assert written("together") == written("alone")


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A training whose evaluation resizes pictures of many kinds; its checkpoint, and the folder of those pictures."""
    root = tmp_path_factory.mktemp("resized")
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (6, 9, 3), np.uint8))
    sizes = {"jpg": (75, 50), "png": (50, 77), "grey": (61, 61), "palette": (90, 31), "turned": (80, 50)}
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True)
        for kind, size in sizes.items():
            picture, options = smooth.resize(size, Image.Resampling.BICUBIC), {}
            labels = np.asarray(picture.convert("L")) // 64
            if kind == "turned":
                exif = Image.Exif()
                exif[0x0112] = 6
                options, labels = {"exif": exif}, np.rot90(labels, -1)
            picture = {"grey": picture.convert("L"), "palette": picture.quantize(50)}.get(kind, picture)
            suffix = "jpg" if kind in ("jpg", "turned") else "png"
            picture.save(root / "images" / split / f"{kind}.{suffix}", **options)
            Image.fromarray(labels).save(root / "masks" / split / f"{kind}.png")
    (root / "classes.json").write_text('{"names": ["a", "b", "c", "d"]}')
    task = ["--model", "SegmentationTask", "--model.architecture", "fpn", "--model.encoder", "resnet18"]
    task += ["--model.num_classes", "4", "--model.lr", "0.003"]
    data = ["--data", "SegmentationFolderDataModule", "--data.root", str(root), "--data.num_workers", "0"]
    data += ["--data.test_size", "[120, 64]", "--data.crop_size", "64", "--data.batch_size", "1"]
    options = ["--trainer.max_epochs", "8", "--trainer.default_root_dir", str(root), "--seed_everything", "3"]
    main(["fit", *task, *data, *TINY, *options, "--trainer.logger", "false", "--trainer.limit_val_batches", "0"])
    (path,) = root.rglob("*.ckpt")
    return str(path), root / "images" / "val"


def evaluated(command: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, np.ndarray]:
    """Label map of every picture, by its name, as the metrics of a command get them."""
    found = {}
    step = "validation_step" if command == "validate" else "test_step"
    original = getattr(SegmentationTask, step)

    def watched(self: SegmentationTask, batch: dict, batch_idx: int) -> dict:
        outputs = original(self, batch, batch_idx)
        found.update({Path(p).stem: m.numpy() for p, m in zip(batch["path"], outputs["label_map"], strict=True)})
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, step, watched)
        main(
            [
                command,
                "--ckpt_path",
                checkpoint,
                *TINY,
                "--trainer.logger",
                "false",
                "--overlays.num_pictures",
                "0",
                *flags,
            ]
        )
    return found


def predicted(checkpoint: str, pictures: Path, out: Path, *flags: str) -> dict[str, np.ndarray]:
    """Label map of every picture, by its name, as ``predict --pictures`` writes them."""
    options = ["--overlays.directory", str(out), "--trainer.logger", "false", "--data.num_workers", "0"]
    main(["predict", "--ckpt_path", checkpoint, "--pictures", str(pictures), *TINY, *options, *flags])
    return {path.stem: np.asarray(Image.open(path)) for path in (out / "label_maps").iterdir()}


MULTI_SCALE = ["--model.tta_scales", "[0.5, 1.25]", "--model.tta_flip", "true"]
SLIDE = ["--model.inference", "slide", "--model.slide_crop", "[48, 48]", "--model.slide_stride", "[32, 32]"]


@pytest.mark.parametrize(
    "flags",
    [[], ["--model.tta_scales", "[0.5, 1.25]", "--model.tta_flip", "true"], SLIDE],
    ids=["plain", "ms", "slide"],
)
def test_predictions_of_pictures_are_those_that_were_evaluated(
    resized: tuple[str, Path], flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, pictures = resized
    maps = predicted(checkpoint, pictures, tmp_path / "out", *flags)
    sizes = {"jpg": (50, 75), "png": (77, 50), "grey": (61, 61), "palette": (31, 90), "turned": (80, 50)}
    assert {name: labels.shape for name, labels in maps.items()} == sizes
    assert all(len(np.unique(labels)) > 1 for labels in maps.values()), maps
    for command in ("validate", "test"):
        expected = evaluated(command, checkpoint, monkeypatch, *flags)
        assert expected.keys() == maps.keys()
        for name, labels in expected.items():
            assert np.array_equal(maps[name], labels), name


def test_sizes_that_are_asked_for_win(
    resized: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint, pictures = resized
    default = predicted(checkpoint, pictures, tmp_path / "default")
    for i, size in enumerate(("null", "[60, 40]")):
        maps = predicted(checkpoint, pictures, tmp_path / f"out_{i}", "--data.test_size", size)
        expected = evaluated("validate", checkpoint, monkeypatch, "--data.test_size", size)
        assert all(np.array_equal(maps[name], expected[name]) for name in expected)
        assert not any(np.array_equal(maps[name], default[name]) for name in maps)


@pytest.mark.parametrize("last", ["--pictures", "--config"])
def test_pictures_replace_the_data_of_a_configuration(
    resized: tuple[str, Path], last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two comes last; nothing of the other data module's arguments is left, such as its batches."""
    monkeypatch.chdir(tmp_path)
    checkpoint, pictures = resized
    model = {"architecture": "fpn", "encoder": "resnet18", "num_classes": 4}
    data = {"root": "elsewhere", "batch_size": 4, "num_workers": 0, "test_size": [60, 40]}
    config = {
        "model": {"class_path": "SegmentationTask", "init_args": model},
        "data": {"class_path": "SegmentationFolderDataModule", "init_args": data},
    }
    Path("config.yaml").write_text(json.dumps(config))
    given = ["--pictures", str(pictures), "--config", "config.yaml"]
    given = given if last == "--config" else given[2:] + given[:2]
    options = [*TINY, "--trainer.logger", "false", "--overlays.directory", "out"]
    main(["predict", "--ckpt_path", checkpoint, *given, *options])
    maps = {path.stem: np.asarray(Image.open(path)) for path in Path("out", "label_maps").iterdir()}
    expected = evaluated("validate", checkpoint, monkeypatch)
    assert maps.keys() == expected.keys()
    assert all(np.array_equal(maps[name], expected[name]) for name in expected)


def test_pictures_from_python_are_those_that_were_evaluated(resized: tuple[str, Path], tmp_path: Path) -> None:
    checkpoint, pictures = resized
    expected = predicted(checkpoint, pictures, tmp_path / "out")
    task = SegmentationTask.load_from_checkpoint(checkpoint)
    data = PictureFolderDataModule.load_from_checkpoint(checkpoint, folder=str(pictures), num_workers=0)
    assert data.test_size == (120, 64)
    assert data.batch_size == 1
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet)
    for batch in trainer.predict(task, data):
        for path, labels in zip(batch["path"], batch["label_map"], strict=True):
            assert np.array_equal(labels.numpy(), expected[Path(path).stem])
    assert PictureFolderDataModule.load_from_checkpoint(checkpoint, folder="f", test_size=None).test_size is None


def test_detection_runs_like_segmentation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"fpn_channels": 16, "box_head_fc_channels": 32, "mask_head_channels": 16, "rpn_post_nms_top_n_train": 50}
    task = ["--model", "DetectionTask", "--model.architecture", "mask_rcnn", "--model.encoder", "replknet_31n"]
    task += ["--model.num_classes", "5", "--model.min_size", "64", "--model.max_size", "96"]
    task += ["--model.encoder_kwargs", '{"kernel_sizes": 3}', "--model.architecture_kwargs", json.dumps(small)]
    data = ["--data", "SyntheticScenesDetectionDataModule", "--data.image_size", "[64, 64]", "--data.train_images", "4"]
    data += ["--data.val_images", "2", "--data.test_images", "2", "--data.num_workers", "0"]
    main(["fit", *task, *data, *TINY, "--trainer.max_epochs", "1", "--seed_everything", "3"])
    out = capsys.readouterr().out
    assert "AP, IoU 50 to 95 %" in out
    assert len(list(tmp_path.rglob("overlays/val/**/*.png"))) == 2
    (path,) = tmp_path.rglob("*.ckpt")

    options = [*TINY, "--trainer.logger", "false", "--overlays.directory", "out"]
    for command, stage in (("validate", "val"), ("test", "test")):
        main([command, "--ckpt_path", str(path), *options])
        assert isinstance(json.loads(Path("out", stage, "predictions.json").read_text()), list)
        assert Path("out", stage, "predictions_masks.json").is_file()

    Path("pictures").mkdir()
    for name, size in {"a": (70, 45), "b": (64, 64)}.items():
        Image.new("RGB", size, (90, 120, 200)).save(f"pictures/{name}.png")
    scores = ["--model.architecture_kwargs", json.dumps(small | {"box_score_thresh": 0.0})]
    pictures = ["--pictures", "pictures", "--data.num_workers", "0"]
    main(["predict", "--ckpt_path", str(path), *pictures, *scores, *options])
    assert "predictions.json" in capsys.readouterr().out
    assert all(Path("out", "overlays", f"{name}.png").is_file() for name in "ab")
    results = json.loads(Path("out", "predictions.json").read_text())
    assert {(result["image_id"], Path(result["file_name"]).name) for result in results} == {(1, "a.png"), (2, "b.png")}
    assert {result["category_id"] for result in results} <= {1, 2, 3, 4, 5}
    assert all(result["segmentation"]["size"] in ([45, 70], [64, 64]) for result in results)


def test_models_lists_parameters_kernels_and_weights(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "replknet_xl"])
    out = capsys.readouterr().out
    assert "333.4 M" in out
    assert "27-27-27-13" in out
    assert "meg73m_ft_in1k_320" in out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    out = capsys.readouterr().out
    assert all(command in out for command in ("fit", "validate", "test", "predict", "models"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["models", "nothing*"], "no encoder matches"),
        (["test", "--ckpt_path", "missing.ckpt"], "there is no checkpoint missing.ckpt"),
        (["fit", *SCENES, "--model.encoder", "replknet_31m"], "replknet_31"),
        (["fit", *SCENES, "--model.architecture", "upernett"], "upernet"),
        (["fit", *SCENES, *TINY, "--trainer.max_epochs", "1", "--model.num_classes", "5"], "num_classes=9"),
        (["predict", "--pictures", "missing", *SCENES[:8], *TINY], "missing"),
    ],
)
def test_mistakes_get_one_clear_error(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(args)
    error = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.encoder", "replknet_31m"], "error: unknown encoder 'replknet_31m'; did you mean 'replknet_31t', "),
        (
            ["--model", "SegmentationTsk"],
            "error: model: there is no class 'SegmentationTsk'; did you mean 'Segment",
        ),
        (["--data", "CocoDataModul"], "error: data: there is no class 'CocoDataModul'; did you mean 'CocoDataModule'"),
        (["--model.num_clases", "5"], "no argument 'num_clases'; did you mean 'num_classes'"),
        (["--model.learning_rate", "5"], "no argument 'learning_rate'; --model.help SegmentationTask lists them"),
        (["--data.rot", "5"], "SyntheticScenesDataModule: there is no argument 'rot'"),
        (["--model.lr", "fast"], "error: model.lr: SegmentationTask: must be float, got fast"),
        (["--model.lr", "-1"], "error: lr=-1.0 must be positive"),
        (["--model.optimizer", "adam"], "model.optimizer: SegmentationTask: must be Literal['adamw', 'sgd'], got adam"),
        (["--data.batch_size", "0"], "error: batch_size must be at least 1, got 0."),
        (["--trainer.limit_val_batches", "many"], "error: trainer.limit_val_batches: must be int or float, got many"),
        (["--trainer.maxi_epochs", "3"], "error: there is no flag --trainer.maxi_epochs; did you mean 'trainer.max_ep"),
        (["--trainer.callbacks", "ModelChekpoint"], "no class 'ModelChekpoint'; did you mean 'ModelCheckpoint'"),
        (["--config", "nothing.yaml"], "nothing.yaml"),
        (["--config", "key.yaml"], "error: there is no option 'modell'; did you mean 'model'"),
        (["--config", "argument.yaml"], "there is no argument 'encoderr'; did you mean 'encoder'"),
        (["--config", "value.yaml"], "error: model.lr: SegmentationTask: must be float, got fast"),
        (["--config", "constructor.yaml"], "error: lr=-1.0 must be positive"),
    ],
)
def test_the_mistake_comes_first_and_nothing_else(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("key.yaml").write_text("modell:\n  class_path: SegmentationTask\n")
    for name, arguments in {"argument": "encoderr: x", "value": "lr: fast", "constructor": "lr: -1.0"}.items():
        text = f"model:\n  class_path: SegmentationTask\n  init_args:\n    {arguments}\n"
        Path(f"{name}.yaml").write_text(text + "data:\n  class_path: SyntheticScenesDataModule\n")
    scenes = [] if args[0] == "--config" else SCENES
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *scenes, *TINY, *args])
    assert stopped.value.code not in (0, None)
    error = capsys.readouterr().err
    error = error[error.index("error:") :]
    assert message in " ".join(error.split())
    assert len(error) < 300
    assert not any(noise in error for noise in ("usage", "Union", "Namespace", "NestedArg", "<class", "Given value"))


def test_a_traceback_that_is_asked_for_holds_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of a data module or task must be findable, however the parser wraps it."""
    monkeypatch.setenv("LK_BACKBONES_TRACEBACK", "1")
    more = ["--model.encoder_kwargs", '{"nonsense": 1}', *TINY]
    with pytest.raises(ValueError, match="nonsense") as raised:
        main(["fit", *SCENES, *more])
    assert isinstance(raised.value.__cause__, TypeError)


def test_nothing_to_train_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit"])
    assert "error: --data and --model must be given, or a --config that names them" in capsys.readouterr().err


NUMBERS = """
import contextlib, io, itertools, json, sys, yaml
flags = ["limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
         "overfit_batches", "val_check_interval", "gradient_clip_val"]
values = ["1", "1.0", "0.5", "2", "0", "0.0"]
if sys.argv[1] == "stock":
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
    def parse(args):
        LightningCLI(BoringModel, BoringDataModule, args=args)
else:
    from lk_backbones.cli import main
    def parse(args):
        main([*args, "--model", "SegmentationTask", "--data", "SyntheticScenesDataModule"])
found = {}
for value, from_file in itertools.product(values, [False, True]):
    args = [part for flag in flags for part in (f"--trainer.{flag}", value)]
    if from_file:
        with open("numbers.yaml", "w") as file:
            file.write("trainer:\\n" + "".join(f"  {flag}: {value}\\n" for flag in flags))
        args = ["--config", "numbers.yaml"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        parse(["fit", *args, "--print_config"])
    trainer = yaml.safe_load(out.getvalue())["trainer"]
    found[f"{value} {from_file}"] = {flag: repr(trainer[flag]) for flag in flags}
print(json.dumps(found))
"""


def test_numbers_of_batches_keep_their_type_as_in_a_stock_cli(tmp_path: Path) -> None:
    """1 is one batch and 1.0 are all; which of them arrives must not depend on what was imported before."""
    results = {}
    for which in ("stock", "ours"):
        command = [sys.executable, "-W", "ignore", "-c", NUMBERS, which]
        ran = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
        results[which] = json.loads(ran.stdout.splitlines()[-1])
    assert results["ours"] == results["stock"]
    assert set(results["ours"]["1 False"].values()) == set(results["ours"]["1 True"].values()) == {"1"}
    assert set(results["ours"]["1.0 False"].values()) == {"1.0"}


def test_other_modules_and_runs_without_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    short = [*TINY, "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--seed_everything", "false"]
    boring = "lightning.pytorch.demos.boring_classes"
    other = ["--model", f"{boring}.BoringModel", "--data", f"{boring}.BoringDataModule"]
    main(["fit", *other, *short])
    main(["fit", *SCENES, *short])
    assert "PL_GLOBAL_SEED" not in os.environ
    first, second = sorted(tmp_path.rglob("*.ckpt"))
    assert torch.load(first, weights_only=True)["global_step"] == torch.load(second, weights_only=True)["global_step"]
    main(["validate", *other, "--ckpt_path", str(first), *short[:-2]])
    main(["predict", *other, "--ckpt_path", str(first), *short[:-2]])


class ModelOfTwoClasses(BoringModel):
    """Somebody's module with a number of classes."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.num_classes = num_classes


class DataKnownLate(BoringDataModule):
    """Somebody's data module that reads its classes in `setup`."""

    classes: list[str] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)  # type: ignore[arg-type]


def test_data_that_know_their_classes_late_leave_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = ["--model", f"{__name__}.ModelOfTwoClasses", "--data", f"{__name__}.DataKnownLate"]
    main(["fit", *other, *TINY, "--trainer.fast_dev_run", "true"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.tta_scales", "null"], {"tta_scales": None}),
        (["--model.tta_flip", "false", "--model.tta_scales+", "0.5"], {"tta_flip": False, "tta_scales": [1.0, 0.5]}),
        (["--model.encoder_kwargs.drop_path_rate", "0.0"], {"encoder_kwargs": KWARGS | {"drop_path_rate": 0.0}}),
        (["--model.encoder_kwargs.drop_path_rate", "0.1"], {"encoder_kwargs": KWARGS | {"drop_path_rate": 0.1}}),
        (["--model.encoder_kwargs", json.dumps(WHOLE)], {"encoder_kwargs": WHOLE}),  # instead of all of them
        (["--data.test_images", "2"], {}),
    ],
)
def test_every_form_of_a_flag_wins_over_the_checkpoint(
    flags: list[str], expected: dict[str, object], checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] |= {"tta_flip": True, "tta_scales": [1.0]}
    torch.save(content, "other.ckpt")
    main(["validate", "--ckpt_path", "other.ckpt", *flags, *TINY, "--trainer.limit_val_batches", "1"])
    (file,) = tmp_path.rglob("hparams.yaml")
    logged = load_hparams_from_yaml(file)
    assert {"tta_flip": True, "tta_scales": [1.0], "num_classes": 9} | expected == {
        key: logged[key] for key in {"tta_flip", "tta_scales", "num_classes", *expected}
    }


def test_not_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.ckpt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit):
        main(["test", "--ckpt_path", str(path)])
    assert "broken.ckpt is not a checkpoint" in capsys.readouterr().err


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def command(folder: str, *more: str) -> list[str]:
        options = [*SCENES, *TINY, "--trainer.max_epochs", "2", "--trainer.limit_val_batches", "0"]
        options += ["--seed_everything", "7", "--trainer.deterministic", "true", "--trainer.logger", "false"]
        options += ["--trainer.callbacks", "lightning.pytorch.callbacks.ModelCheckpoint"]
        options += ["--trainer.callbacks.every_n_train_steps", "2", "--trainer.callbacks.dirpath", folder]
        options += ["--trainer.callbacks.save_top_k", "-1", "--trainer.callbacks.filename", "{step}"]
        options += ["--trainer.callbacks.auto_insert_metric_name", "false"]
        return [sys.executable, "-m", "lk_backbones.cli", "fit", *options, *more]

    env = os.environ | {"OMP_NUM_THREADS": "1"}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    subprocess.run(command(str(undisturbed)), check=True, env=env, cwd=tmp_path, capture_output=True)

    process = subprocess.Popen(
        command(str(killed)), env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
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

    resume = command(str(killed), "--ckpt_path", str(waited_for))
    subprocess.run(resume, check=True, env=env, cwd=tmp_path, capture_output=True)
    first, second = (torch.load(d / "12.ckpt", weights_only=True)["state_dict"] for d in (undisturbed, killed))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


# --- recipes by name ---


def printed_config(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """What a command line would run, as ``--print_config`` says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*args, "--print_config"])
    assert not stopped.value.code, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


def test_every_spelling_of_a_recipe_and_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no clone
    name = "camvid/unet_replknet_31n_360"
    spellings = [["--config", name], [f"--config={name}"], ["-c", name], [f"-c{name}"]]
    spellings += [["--config", f"{before}{name}{after}"] for before in ("", "recipes/") for after in ("", ".yaml")]
    for args in spellings:
        assert printed_config(["fit", *args], capsys)["trainer"]["default_root_dir"] == "runs/camvid"
    for command in ("validate", "test", "predict"):
        assert printed_config([command, "--config", name], capsys)["trainer"]["default_root_dir"] == "runs/camvid"
    pictures = printed_config(["predict", f"-c{name}", "--pictures", "folder"], capsys)
    assert pictures["data"]["init_args"]["folder"] == "folder"
    assert pictures["model"]["init_args"]["num_classes"] == 11


def test_several_configurations_and_a_file_that_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("more.yaml").write_text("trainer: {max_epochs: 7}\n")
    name = "camvid/unet_replknet_31n_360"
    trainer = printed_config(["fit", "--config", name, "--config", "more.yaml"], capsys)["trainer"]
    assert (trainer["max_epochs"], trainer["default_root_dir"]) == (7, "runs/camvid")
    trainer = printed_config(["fit", "--config", name, "--config", "trainer: {max_epochs: 8}"], capsys)["trainer"]
    assert trainer["max_epochs"] == 8
    trainer = printed_config(["fit", "--config", "more.yaml", "--config", name], capsys)["trainer"]
    assert trainer["max_epochs"] == 40

    Path("camvid").mkdir()
    Path("camvid/unet_replknet_31n_360").write_text("trainer: {max_epochs: 9, default_root_dir: mine}\n")
    given = ["--model", "SegmentationTask", "--data", "SyntheticScenesDataModule"]
    trainer = printed_config(["fit", "--config", name, *given], capsys)["trainer"]
    assert (trainer["max_epochs"], trainer["default_root_dir"]) == (9, "mine")
    trainer = printed_config(["fit", "--config", f"{name}.yaml"], capsys)["trainer"]
    assert trainer["default_root_dir"] == "runs/camvid"


# --- one's own data ---


def own_pictures(root: Path) -> None:
    """A folder with pictures, label maps and four classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            image, mask = (
                generator.integers(0, most, (64, 80, *rest), np.uint8) for most, rest in ((256, (3,)), (4, ()))
            )
            Image.fromarray(image).save(root / "images" / split / f"{i}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    (root / "classes.txt").write_text("a\nb\nc\nd\n")


def own_objects(root: Path) -> None:
    """A folder with pictures, boxes in COCO format and two categories."""
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    for split, ids in (("train", (1, 2)), ("val", (3,))):
        for i in ids:
            Image.new("RGB", (80, 64), (40 * i, 90, 200)).save(root / "images" / f"{i}.png")
        content = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 64} for i in ids],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 5, "bbox": [10, 10, 30, 20], "area": 600, "iscrowd": 0}
                for i in ids
            ],
            "categories": [{"id": 5, "name": "cat"}, {"id": 9, "name": "dog"}],
        }
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


OWN = {
    "own/unet_replknet_31n_256": (own_pictures, 4, ["--data.crop_size", "64", "--data.batch_size", "2"]),
    "own/faster_rcnn_replknet_31n_512": (
        own_objects,
        2,
        ["--data.sizes", "[64]", "--model.min_size", "64", "--model.max_size", "96", "--data.batch_size", "2"],
    ),
}
ONE_STEP = [*TINY, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1", "--data.num_workers", "0"]


@pytest.mark.parametrize("recipe", OWN)
def test_the_number_of_classes_is_that_of_the_data(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, number, small = OWN[recipe]
    make(Path("mine"))
    built = []
    original = PictureDataModule.__init__
    monkeypatch.setattr(PictureDataModule, "__init__", lambda self: (built.append(self), original(self))[1])
    main(["fit", "--config", recipe, "--data.root", "mine", *small, *ONE_STEP])
    assert len(built) == 1, "the data module that told the number is not the one that was used"
    (saved,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["num_classes"] == number
    (logged,) = tmp_path.rglob("hparams.yaml")
    assert load_hparams_from_yaml(logged)["num_classes"] == number
    path = next(iter(tmp_path.rglob("best*.ckpt")))
    content = torch.load(path, weights_only=True)
    assert content["hyper_parameters"]["num_classes"] == number
    assert content["datamodule_hyper_parameters"]["_class_path"].startswith("lk_backbones.data.")

    capsys.readouterr()
    quiet = [*TINY, "--trainer.logger", "false", "--overlays.directory", "out", "--data.num_workers", "0"]
    main(["validate", "--ckpt_path", str(path), *quiet])
    alone = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    main(["validate", "--config", recipe, "--ckpt_path", str(path), "--data.root", "mine", *small, *quiet])
    assert alone
    assert [line for line in capsys.readouterr().out.splitlines() if "│" in line] == alone
    # pictures without labels tell no number, the checkpoint does
    main(["predict", "--config", recipe, "--ckpt_path", str(path), "--pictures", "mine/images", *quiet])
    assert len(list(Path("out/overlays").iterdir())) == 3
    # the saved configuration says all that there is to say
    main(["fit", "--config", str(saved), *ONE_STEP])


@pytest.mark.parametrize("wrong", ["9", "3"])
@pytest.mark.parametrize("from_file", [True, False])
def test_another_number_of_classes_stays_an_error(
    from_file: bool, wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own_pictures(Path("mine"))
    Path("more.yaml").write_text(f"model: {{init_args: {{num_classes: {wrong}}}}}\n")
    given = ["--config", "more.yaml"] if from_file else ["--model.num_classes", wrong]
    small = OWN["own/unet_replknet_31n_256"][2]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "own/unet_replknet_31n_256", *given, "--data.root", "mine", *small, *ONE_STEP])
    message = " ".join(capsys.readouterr().err.split())
    assert f"has num_classes=4, but the task was built with num_classes={wrong}: make them equal" in message


def test_data_that_are_not_there_are_the_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for recipe in OWN:
        with pytest.raises(SystemExit):
            main(["fit", "--config", recipe, "--data.root", "nowhere"])
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "nowhere" in error
    assert not list(tmp_path.iterdir())


# --- what is no news ---


QUICK_START = """
import warnings
import lightning.pytorch.trainer.trainer as trainer
from lightning.pytorch.utilities import rank_zero_info
from lk_backbones.cli import main
from lk_backbones.tasks import SegmentationTask

def on_train_start(self):
    warnings.warn("mind the gap\\nerror: forged \\x1b[31m")
    rank_zero_info("Tip of the iceberg")

SegmentationTask.on_train_start = on_train_start
few = ["--data.train_images", "16", "--data.val_images", "2", "--data.num_workers", "0", "--trainer.max_epochs", "1"]
main(["fit", "--config", "quickstart/unet_replknet_31n_scenes", *few, "--trainer.enable_progress_bar", "false"])
main(["validate", "--ckpt_path", "runs/quickstart/lightning_logs/version_0/checkpoints/last.ckpt", *few[:6]])
warnings.warn("later")
"""


def test_the_terminal_says_what_is_news_and_nothing_else(tmp_path: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    for key in ("PL_GLOBAL_SEED", "LK_BACKBONES_TRACEBACK"):
        env.pop(key, None)
    command = [sys.executable, "-c", QUICK_START]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, encoding="utf-8")
    assert ran.returncode == 0, ran.stderr
    everything = ran.stdout + ran.stderr
    noise = ("💡", "litlogger", "litmodels", "LeafSpec", "FLOPs", "TPU", "No seed", "Seed set", "to estimate number of")
    assert not [word for word in noise if word in everything], everything
    assert "callbacks used to create the checkpoint" not in everything
    assert "GPU available: " in ran.stderr  # where it runs is news
    assert "423 K" in ran.stdout
    assert "mean IoU" in ran.stdout
    lines = ran.stderr.splitlines()
    assert "warning: mind the gap" in lines
    assert "  error: forged \\x1b[31m" in lines
    assert "Tip of the iceberg" in lines
    assert any(line.startswith("warning: warmup_steps=20 is not shorter") for line in lines)
    assert not any(line.startswith("warning: later") for line in lines)  # printed as Python does, after the command
    assert any(line.endswith("UserWarning: later") for line in lines)


def test_a_summary_that_is_asked_for_and_one_that_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = [*TINY[:6], *TINY[8:], "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    frozen = ["--model.freeze_encoder", "true", "--trainer.logger", "false"]
    main(["fit", *SCENES, *short, *frozen])
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines() if "FPN" in line] == [["model", "FPN"]]
    assert "of these are trained" in out
    main(["fit", *SCENES, *short, *frozen, "--trainer.enable_model_summary", "false"])
    assert "FPN" not in capsys.readouterr().out
    asked = ["--trainer.callbacks", '[{"class_path": "RichModelSummary", "init_args": {"max_depth": 2}}]']
    main(["fit", *SCENES, *short, *frozen, *asked])
    out = capsys.readouterr().out
    assert "model.encoder" in out  # somebody's own
    assert "of these are trained" not in out
