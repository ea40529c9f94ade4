"""``lk-backbones erf`` and ``lk-backbones shape-bias`` as users call them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lk_backbones import hub
from lk_backbones.analysis import effective_receptive_field
from lk_backbones.analysis.models import load_named_model
from lk_backbones.analysis.pictures import noise_pictures, scene_pictures
from lk_backbones.cli import main
from lk_backbones.data import SyntheticScenesDataModule
from lk_backbones.tasks import SegmentationTask
from tests.analysis.test_shape_bias import SHAPES, draw_stimulus

SMALL = ["--size", "64", "--num", "2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*args])
    assert exit_.value.code
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    task = SegmentationTask("fpn", "replknet_31n", encoder_kwargs={"kernel_sizes": 3}, num_classes=9)
    options = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, default_root_dir=root, **options)
    trainer.fit(task, SyntheticScenesDataModule((64, 64), 2, 1, 1, batch_size=2, num_workers=0))
    trainer.save_checkpoint(root / "best.ckpt")
    return root / "best.ckpt"


def test_models_of_every_kind_side_by_side(folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.push(timm.create_model("replknet_31n", kernel_sizes=3), "you/small", folder="pushed", dry_run=True)
    models = [
        "replknet_31n,kernel_sizes=3,num_classes=0",
        str(checkpoint),
        "pushed",
        "torchvision:resnet18",
        "smp:mit_b0",
    ]
    main(["erf", *models, *SMALL, "--to", "out"])
    printed = capsys.readouterr().out
    assert "2 drawn scenes, 64 x 64" in printed
    results = json.loads((folder / "out" / "erf.json").read_text())
    assert [result["model"] for result in results] == models
    assert [result["weights"] for result in results] == ["random", f"of {checkpoint}", "of pushed", "random", "random"]
    assert results[0]["pictures"] == "2 drawn scenes"
    for result in results:
        assert result["map_size"] == [2, 2]
        assert f"{100 * result['ratios']['0.5']:.1f}" in printed
    matrices = {path.stem for path in (folder / "out").glob("*.npy")}
    assert matrices == {models[0], "best", "pushed", "torchvision_resnet18", "smp_mit_b0"}
    picture = Image.open(folder / "out" / "erf.png")
    assert picture.width > 4 * 280  # four in a row
    # the numbers are those of the function
    images = scene_pictures((64, 64), 2).make(3)
    of_task = effective_receptive_field(SegmentationTask.load_from_checkpoint(checkpoint), images)
    np.testing.assert_allclose(np.load(folder / "out" / "best.npy"), of_task.contribution, rtol=1e-5, atol=1e-9)


def test_noise_levels_and_magnitudes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "replknet_31n,kernel_sizes=3,in_chans=5"
    options = ["--noise", "--num", "1", "--size", "64x96", "--level", "stages.1", "--no-relu", "--seed", "3"]
    main(["erf", name, *options, "--gradient-checkpointing"])
    assert "1 picture of noise, 64 x 96, magnitudes (no ReLU)" in " ".join(capsys.readouterr().out.split())
    (result,) = json.loads((folder / "erf" / "erf.json").read_text())
    assert (result["relu"], result["map_size"], result["level"]) == (False, [8, 12], "stages.1")
    named = load_named_model(name, seed=3)
    images = (named.normalize(image) for image in noise_pictures((64, 96), 1, 3).make(5))
    expected = effective_receptive_field(named.model, images, "stages.1", relu=False)
    (matrix,) = (folder / "erf").glob("*.npy")
    np.testing.assert_allclose(np.load(matrix), expected.contribution, rtol=1e-4, atol=1e-9)


def test_pictures_of_a_folder_and_nothing_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)).save(folder / "a.png")
    main(["erf", "resnet10t", *SMALL, "--pictures", "."])
    assert "1 picture of ., 64 x 64" in capsys.readouterr().out
    before = (folder / "erf" / "erf.json").read_bytes()
    error = refused(capsys, "erf", "resnet10t", *SMALL, "--noise")
    assert "erf/erf.png and 2 more exists: choose another folder with --to, or add --overwrite" in error
    assert (folder / "erf" / "erf.json").read_bytes() == before
    main(["erf", "resnet10t", *SMALL, "--noise", "--overwrite", "--power", "0.5"])
    assert "noise" in (folder / "erf" / "erf.json").read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["resnet5"], "there is no file, folder or model 'resnet5'; did you mean 'resnet50'"),
        (["torchvision:resnet5"], "torchvision has no model 'resnet5'; did you mean"),
        (["timm:resnet5"], "timm has no model 'resnet5'; did you mean"),
        (["smp:unit/resnet18"], "smp has no architecture 'unit'; did you mean 'unet'"),
        (["smp:unet/resnet17"], "smp has no encoder 'resnet17'; did you mean 'resnet18'"),
        (["no/such.ckpt"], "no/such.ckpt"),
        (["resnet10t,depth"], "arguments are written as NAME,argument=value"),
        (["resnet10t,layer=[1"], "arguments are written as NAME,argument=value"),
        (["resnet10t,checkpoint_path=a.pth"], "checkpoint_path would read weights unchecked"),
        (["resnet10t,no_such=1"], "'resnet10t' could not be built: "),
        (["resnet10t", "resnet10t"], "a model is named twice"),
        (["resnet10t", "--level", "8"], "resnet10t: level 8: ResNet has the levels 0 (32 × 32)"),
        (["resnet10t", "--level", "layer9"], "resnet10t: level 'layer9': ResNet has no module of this path"),
        (["resnet10t", "--pictures", "empty"], "empty holds no pictures"),
        (["resnet10t", "--pictures", "nowhere"], "There is no folder nowhere"),
        (["resnet10t", "--size", "32"], "scenes are drawn at 64 × 64 pixels and more"),
        (["resnet10t", "--size", "1000000"], "GiB are free: images of"),
        (["resnet10t", "--size", "big"], "--size: 'big' must be a height and width such as 512x1024"),
        (["resnet10t", "--num", "0"], "0 must be positive"),
        (["resnet10t", "--power", "2"], "2 must be above 0 and at most 1"),
        (["resnet10t", "--device", "abacus"], "--device abacus"),
        (["[red]\x1b[31mx"], r"'[red]\x1b[31mx'"),
    ],
)
def test_what_the_command_refuses(
    args: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    small = [*(["--num", "2"] if "--num" not in args else []), *(["--size", "64"] if "--size" not in args else [])]
    assert words in refused(capsys, "erf", *small, *args)
    assert [path.name for path in folder.iterdir()] == ["empty"]


def test_a_file_that_would_run_code_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path("ran"),))  # type: ignore[return-value]

    torch.save({"state_dict": {"a": torch.zeros(1)}, "evil": Evil()}, "evil.pth")
    assert "evil.pth" in refused(capsys, "erf", "evil.pth", *SMALL)
    assert not Path("ran").exists()


# ---- shape bias ----


@pytest.fixture
def stimuli(folder: Path) -> Path:
    (folder / "stimuli").mkdir()
    for shape in SHAPES:
        for texture in SHAPES:
            draw_stimulus(shape, texture).save(folder / "stimuli" / f"{shape}1-{texture}2.png")
    return folder / "stimuli"


def test_shape_bias_of_several_models(stimuli: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["shape-bias", "resnet10t", "torchvision:shufflenet_v2_x0_5", "--pictures", "stimuli"])
    printed = capsys.readouterr().out
    assert "6 pictures of stimuli" in printed
    assert sorted(path.suffix for path in (folder / "shape_bias").iterdir()) == [".csv", ".csv", ".png"]
    with open(folder / "shape_bias" / "resnet10t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["imagename"] for row in rows] == sorted(path.name for path in stimuli.iterdir())
    assert {row["category"] for row in rows} == set(SHAPES)
    assert rows[0].keys() >= {"subj", "object_response", "category"}  # model-vs-human's plots read them
    assert "shape_bias.png and 2 more exists" in refused(
        capsys, "shape-bias", "resnet10t", "torchvision:shufflenet_v2_x0_5", "--pictures", "stimuli"
    )


def test_shape_bias_with_own_classes(stimuli: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "classes.txt").write_text("bottle\nclock\nknife\n\n")
    for i, classes in enumerate(("bottle,clock,knife", "classes.txt")):
        model = ["resnet10t,num_classes=3", "--classes", classes, "--to", str(i)]
        main(["shape-bias", *model, "--pictures", "stimuli"])
    first, second = (next((folder / str(i)).glob("*.csv")).read_text() for i in range(2))
    assert first == second
    assert {row["object_response"] for row in csv.DictReader(first.splitlines())} <= set(SHAPES)
    assert "3 classes: without names of its classes" in refused(
        capsys, "shape-bias", "resnet10t,num_classes=3", "--pictures", "stimuli", "--to", "3"
    )


def test_what_shape_bias_refuses(stimuli: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*args: str) -> str:
        return refused(capsys, "shape-bias", "resnet10t", *args)

    assert "at least two" in error("--pictures", "stimuli", "--classes", "one")
    (folder / "empty").mkdir()
    assert "rgeirhos/texture-vs-shape" in error("--pictures", "empty")
    assert "required: --pictures" in error()
    (stimuli / "photo.png").touch()
    assert "photo.png: the name does not say what the picture shows" in error("--pictures", "stimuli")
    (stimuli / "photo.png").rename(stimuli / "clock2-knife1.png")
    assert "clock2-knife1.png cannot be read as a picture: it is empty" in error("--pictures", "stimuli")
    assert not (folder / "shape_bias").exists()


def test_a_training_is_watched_by_a_flag(folder: Path) -> None:
    main(
        [
            *("fit", "--model", "SegmentationTask", "--model.architecture", "fpn", "--model.encoder", "replknet_31n"),
            *("--model.encoder_kwargs", '{"kernel_sizes": 3}', "--model.num_classes", "9", "--trainer.max_steps", "1"),
            *("--data", "SyntheticScenesDataModule", "--data.image_size", "[64, 64]", "--data.batch_size", "2"),
            *(
                "--data.train_images",
                "2",
                "--data.val_images",
                "1",
                "--data.test_images",
                "1",
                "--data.num_workers",
                "0",
            ),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--overlays.num_pictures", "0"),
            *("--erf.every", "1", "--erf.size", "64", "--erf.num_images", "1", "--erf.level", "-2"),
        ]
    )
    assert len(list(folder.rglob("erf/step_*.png"))) == 2
    assert len(list(folder.rglob("erf/growth.png"))) == 1
