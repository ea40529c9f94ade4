"""Every recipe parses, builds, and trains on the number of samples that its published result was trained on."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import lk_backbones.data
import lk_backbones.tasks
from lk_backbones.callbacks import DynamicSparsity
from lk_backbones.cli import main
from lk_backbones.cli.recipes import Recipe, list_recipes
from lk_backbones.layers.sparsity import choose_weights
from lk_backbones.tasks.base import without_encoder_weights
from lk_backbones.weights.catalogue import find_published
from tests.conftest import ALL_ENCODERS, count_parameters

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "guidelines")  # of sweeps
PUBLISHED = [path for path in RECIPES if path.parent.name in ("cityscapes", "ade20k", "coco")]
# Epochs of 117266 pictures with objects.
SAMPLES_OF_COCO = {"3x": 36 * 117_266, "2x": 24 * 117_266, "1x": 12 * 117_266}
# Crops of a whole training. The other families follow ConvNeXt's recipe for ADE20K, 160k steps of 16.
CROPS = {
    "cityscapes": {"replknet": 1_280_000},
    "ade20k": {"replknet": 5_120_000, **dict.fromkeys(("unireplknet", "slak", "pelk"), 2_560_000)},
}


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def family(config: dict[str, Any]) -> str:
    return config["model"]["init_args"]["encoder"].partition("_")[0]


@functools.cache
def build(path: Path, **changes: Any) -> Any:
    """The recipe's task, without weights, on the meta device; built once."""
    model = read(path)["model"]
    task = getattr(lk_backbones.tasks, model["class_path"])
    with without_encoder_weights(), torch.device("meta"):
        return task(**(model["init_args"] | changes))


def test_there_are_recipes() -> None:
    folders = {"quickstart", "own", "camvid", "cityscapes", "ade20k", "bccd", "coco", "imagenet", "mobilenetv2"}
    assert {path.parent.name for path in RECIPES} == folders
    assert len(PUBLISHED) == 31


def test_the_list_has_every_recipe() -> None:
    assert {recipe.name: recipe.path for recipe in list_recipes()} == {name(path): path for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_command_line_accepts_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code in (0, None)
    assert read(path)["seed_everything"] == yaml.safe_load(capsys.readouterr().out)["seed_everything"]


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_model_and_data_agree(path: Path) -> None:
    config = read(path)
    task = build(path)
    data = getattr(lk_backbones.data, config["data"]["class_path"])(**config["data"]["init_args"])
    if path.parent.name not in ("camvid", "bccd", "coco", "own"):  # whose classes are read from their folders
        assert data.num_classes == task.hparams["num_classes"]
    if isinstance(task, lk_backbones.tasks.ClassificationTask):
        return  # which tells the data how to see pictures
    if isinstance(task, lk_backbones.tasks.DetectionTask):
        assert getattr(data, "masks", True) or not task.has_masks
        return
    for mean, fill in zip(task.hparams["mean"], data.image_fill, strict=True):
        assert mean == pytest.approx(fill, abs=1e-3), "the padding must become 0 when normalised"


@pytest.mark.parametrize("path", PUBLISHED, ids=name)
def test_published_recipes_see_the_published_number_of_samples(path: Path) -> None:
    config = read(path)
    trainer = config["trainer"]
    (expected,) = [c["init_args"] for c in trainer["callbacks"] if c["class_path"].endswith("SamplesSeen")]
    batch_size = trainer["devices"] * config["data"]["init_args"]["batch_size"] * trainer["accumulate_grad_batches"]
    assert batch_size == expected["expected_batch_size"]
    if path.parent.name != "coco":  # whose length is given in epochs
        assert batch_size * trainer["max_steps"] == expected["expected_samples"]
        assert expected["expected_samples"] == CROPS[path.parent.name][family(config)]
        return
    assert trainer["max_epochs"] * 117_266 == expected["expected_samples"] == SAMPLES_OF_COCO[path.stem.split("_")[-1]]
    milestones = config["model"]["init_args"]["milestones"]
    assert milestones == {36: [27, 33], 24: [16, 22], 12: [8, 11]}[trainer["max_epochs"]]


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name == "imagenet" and p.stem != "evaluate"], ids=name)
def test_imagenet_recipes_see_the_published_number_of_samples(path: Path) -> None:
    config, pictures = read(path), 1_281_167
    trainer = config["trainer"]
    (expected,) = [c["init_args"] for c in trainer["callbacks"] if c["class_path"].endswith("SamplesSeen")]
    per_device = config["data"]["init_args"]["batch_size"]
    batch_size = trainer["devices"] * per_device * trainer["accumulate_grad_batches"]
    assert batch_size == expected["expected_batch_size"] == (2048 if family(config) == "replknet" else 4096)
    epochs = 30 if path.stem.endswith("384") else 300
    assert trainer["max_epochs"] == epochs
    assert expected["expected_samples"] == epochs * pictures
    assert f"{epochs * pictures / 1e6:.1f} M samples" in path.read_text()
    steps = math.ceil(pictures // (trainer["devices"] * per_device) / trainer["accumulate_grad_batches"])
    warmup = {"replknet_31b_224": 10, "replknet_31b_384": 1}.get(path.stem, 20)
    assert config["model"]["init_args"]["warmup_steps"] == warmup * steps
    weights = find_published(f"{config['model']['init_args']['encoder']}.in1k{'_384' if epochs == 30 else ''}")
    top1 = weights.metrics["top1"] if weights else 82.6  # PeLK's authors published none
    assert path.read_text().splitlines()[2] == f"# Published: top-1 {top1}"


@pytest.mark.parametrize("path", [p for p in PUBLISHED if p.parent.name != "coco"], ids=name)
def test_published_recipes_and_defaults_have_the_published_scales(path: Path) -> None:
    """Of RepLKNet's configurations: all of ADE20K, at crops of 640 too, and Cityscapes at crops of 769."""
    config = read(path)["data"]
    module = getattr(lk_backbones.data, config["class_path"])
    published = {"ade20k": (2048, 512), "cityscapes": (2049, 1025)}[path.parent.name]
    wide = family(read(path)) == "unireplknet" and config["init_args"]["crop_size"] == 640  # their own choice
    for data, size in ((module(**config["init_args"]), (2560, 640) if wide else published), (module(), published)):
        assert tuple(data.base_size) == tuple(data.test_size) == size
        assert tuple(data.scale_range) == (0.5, 2.0)
        assert data.cat_max_ratio == 0.75


@pytest.mark.parametrize("path", PUBLISHED, ids=name)
def test_published_recipes_have_the_published_size(path: Path) -> None:
    text = path.read_text()
    if "Nobody published a number" in text:
        pytest.skip("there is no published size")
    words = ("box AP", "val2017") if path.parent.name == "coco" else ("mIoU", "single-scale")
    assert all(word in text for word in words)
    if "gives no size" in text:
        pytest.skip("there is no published size")
    published = float(re.search(r"(\d+) M parameters", text).group(1))
    # SLaK's authors counted the zeros of each network; at exactly 40 % there are a few more of them.
    tolerance = 0.045 if "upernet_slak" in path.stem else 0.025
    assert count_millions(build(path)) == pytest.approx(published, rel=tolerance)
    if ours := re.search(r"([\d.]+) M here", text):
        assert count_millions(build(path)) == pytest.approx(float(ours[1]), abs=0.05)


def count_millions(task: Any) -> float:
    """Parameters as the tables count them: of the inference model, without the auxiliary head and SLaK's zeros."""
    sparse = task.hparams["encoder"].startswith(("slak", "pelk"))
    zeros = 0.4 * sum(p.numel() for p in task.encoder.parameters() if p.ndim > 1) if sparse else 0
    return (sum(p.numel() for p in task.model.parameters()) - zeros) / 1e6


@pytest.mark.parametrize(
    ("recipe", "encoder", "title", "millions"),
    [
        ("ade20k/upernet_unireplknet_l_640", "unireplknet_xl", "UniRepLKNet-XL", 425),
        ("coco/cascade_mask_rcnn_unireplknet_l_22k_3x", "unireplknet_xl", "UniRepLKNet-XL", 443),
        ("ade20k/upernet_pelk_b_512", "pelk_base_101", "PeLK-B-101", 126),
        ("coco/cascade_mask_rcnn_pelk_b_3x", "pelk_base_101", "PeLK-B-101", 147),
    ],
)
def test_one_argument_makes_another_one(recipe: str, encoder: str, title: str, millions: int) -> None:
    path = ROOT / "recipes" / f"{recipe}.yaml"
    assert f"{title} ({millions} M parameters" in path.read_text()
    assert f"{recipe} --model.encoder {encoder}\n" in path.read_text()
    assert count_millions(build(path, encoder=encoder)) == pytest.approx(millions, rel=0.025)


@pytest.mark.parametrize("path", [p for p in PUBLISHED if "slak" in p.stem or "pelk" in p.stem], ids=name)
def test_zeros_of_the_encoder_stay(path: Path) -> None:
    callbacks = read(path)["trainer"]["callbacks"]
    (sparsity,) = [c["init_args"] for c in callbacks if c["class_path"].endswith("DynamicSparsity")]
    assert DynamicSparsity(**sparsity).init == "weights"
    assert sparsity["every_n_train_steps"] is None
    task = build(path)
    encoder = {id(p) for p in task.encoder.parameters() if p.ndim > 1}
    assert {id(p) for p in choose_weights(task, [sparsity["layers"]], []).values()} == encoder


# The decay in the authors' configurations: its kind, its rate, and how many layers it counts.
DECAYS = {
    "ade20k/upernet_slak_t_512": ("stage_wise", 0.9, 6),
    "ade20k/upernet_slak_s_512": ("stage_wise", 0.9, 12),
    "ade20k/upernet_slak_b_512": ("stage_wise", 0.9, 12),
    "coco/cascade_mask_rcnn_slak_t_3x": ("layer_wise", 0.7, 6),
    "coco/cascade_mask_rcnn_pelk_b_3x": ("layer_wise", 0.8, 12),  # of ConvNeXt-B
}


@pytest.mark.parametrize("recipe", DECAYS)
def test_every_layer_learns_at_the_published_rate(recipe: str) -> None:
    kind, decay, num_layers = DECAYS[recipe]
    task = build(ROOT / "recipes" / f"{recipe}.yaml")
    task.trainer = SimpleNamespace(
        estimated_stepping_batches=160_000, num_training_batches=9, accumulate_grad_batches=1
    )
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    groups = task.configure_optimizers()["optimizer"].param_groups
    rates = {names[id(p)]: group["initial_lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(names)
    for name, rate in rates.items():
        stage, block = re.search(r"stages[._](\d)", name), re.search(r"blocks\.(\d+)", name)
        if ".encoder." not in name or "feature_norms" in name:
            layer = num_layers + 1
        elif "stem" in name or ("downsample" in name and kind == "stage_wise"):
            layer = 0
        elif kind == "stage_wise":
            layer = int(stage[1]) + 1
        else:
            layer = {"0": 1, "1": 2, "2": 3 + int(block[1] if block else 0) // 3, "3": num_layers}[stage[1]]
        assert rate == pytest.approx(task.hparams["lr"] * decay ** (num_layers + 1 - layer)), name


# The smallest encoder of every family, so that a new one is tested by being registered.
SMALLEST = {}
for _name in sorted(ALL_ENCODERS, key=count_parameters, reverse=True):
    SMALLEST[_name.partition("_")[0]] = _name
FEW_STEPS = [
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"),
    *("--trainer.limit_val_batches", "1", "--trainer.num_sanity_val_steps", "0", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false", "--data.image_size", "[64, 96]", "--data.batch_size", "2"),
    *("--data.train_images", "4", "--data.val_images", "1", "--data.num_workers", "0", "--model.warmup_steps", "1"),
]
UPERNET = [  # as in the recipes of ADE20K
    *("--model.architecture", "upernet_openmmlab", "--model.architecture_kwargs", '{"decoder_channels": 16}'),
    *("--model.auxiliary_weight", "0.4", "--model.layer_decay", "0.9", "--model.bias_weight_decay", "0"),
    *("--model.encoder_kwargs", '{"drop_path_rate": 0.1, "norm_features": true}'),
]


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("unet_replknet_31n_scenes", []),
        ("unet_replknet_31n_scenes", UPERNET),
        ("cascade_mask_rcnn_replknet_31n_scenes", ["--model.min_size", "64", "--model.max_size", "96"]),
    ],
    ids=["unet", "upernet", "cascade_mask_rcnn"],
)
@pytest.mark.parametrize("encoder", SMALLEST.values())
def test_every_family_trains_by_the_recipes(encoder: str, recipe: str, flags: list[str], tmp_path: Path) -> None:
    folder = ["--trainer.default_root_dir", str(tmp_path)]
    main(["fit", "--config", f"quickstart/{recipe}", "--model.encoder", encoder, *FEW_STEPS, *flags, *folder])
    (path,) = tmp_path.rglob("last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["hyper_parameters"]["encoder"] == encoder
    moments = [state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()]
    assert all(torch.isfinite(moment).all() for moment in moments)
    # no parameter was out of reach of the loss; with random boxes a head may see no example
    assert sum(bool(moment.any()) for moment in moments) > 0.9 * len(moments)


RESULT = r"top-1 \d\d\.\d|mIoU \d\d\.\d single-scale(, \d\d\.\d multi-scale)?|box AP \d\d\.\d(, mask AP \d\d\.\d)?"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_head_comment_says_what_it_is_and_gives_number_and_command(path: Path) -> None:
    text = path.read_text()
    title, published = Recipe(name(path), path).head()
    assert re.fullmatch(r"[A-Z].{20,117}\.", title)
    assert text.count("# Published: ") == 1
    assert published == "none" or re.fullmatch(RESULT, published)
    assert (published == "none") == ("Nobody published a number" in text)
    assert f"lk-backbones fit --config {name(path)}" in text


def test_the_readme_has_the_same_numbers() -> None:
    rows = re.findall(r"^\| `([\w/]+)`.* \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    told = {recipe: numbers.replace(" ", "").split("/") for recipe, numbers in rows if "/" in recipe}
    assert told.keys() == {name(path) for path in PUBLISHED}
    for recipe in list_recipes():
        published = re.findall(r"\d\d\.\d", recipe.head()[1])
        if recipe.name in told:
            assert re.findall(r"\d\d\.\d", " ".join(told[recipe.name])) == published
        elif not recipe.name.startswith("imagenet/"):
            assert not published


def test_the_list_is_printed_with_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    out = capsys.readouterr().out
    assert all(name(path) in out for path in RECIPES)
    main(["recipes", "replknet_xl"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "replknet" in line]
    assert [row[0] for row in rows] == ["ade20k/upernet_replknet_xl_640", "coco/cascade_mask_rcnn_replknet_xl_3x"]
    assert "mIoU 55.2 single-scale, 56.0 multi-scale" in out
    assert "box AP 55.5, mask AP 48.0" in out
    main(["recipes", "coco*replknet_31l"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "replknet" in line] == [
        "coco/cascade_mask_rcnn_replknet_31l_22k_3x"
    ]


def test_a_copy_is_the_recipe_and_replaces_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = ROOT / "recipes/own/unet_replknet_31n_256.yaml"
    Path("folder").mkdir()
    targets = {
        (): "unet_replknet_31n_256.yaml",
        ("mine.yaml",): "mine.yaml",
        ("folder",): "folder/unet_replknet_31n_256.yaml",
        ("a/b.yaml",): "a/b.yaml",
        ("new/",): "new/unet_replknet_31n_256.yaml",
    }
    for to, expected in targets.items():
        main(["recipes", "copy", "own/unet_replknet_31n_256", *to])
        assert Path(expected).read_bytes() == source.read_bytes()
        assert f"lk-backbones fit --config {Path(expected)}" in capsys.readouterr().out
    Path("mine.yaml").write_text("edited")
    before = sorted(tmp_path.rglob("*"))
    for to, there in {**targets, ("mine.yaml/x.yaml",): "mine.yaml"}.items():
        with pytest.raises(SystemExit):
            main(["recipes", "copy", "own/unet_replknet_31n_256", *to])
        error = " ".join(capsys.readouterr().err.split())
        assert error.startswith(f"error: {Path(there)} is there already")
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("mine.yaml").read_text() == "edited"
    with pytest.raises(SystemExit) as stopped:  # what was copied is what the flag takes
        main(["fit", "--config", "a/b.yaml", "--print_config"])
    assert not stopped.value.code
