"""Enlarged kernels in tasks: behind the weights, in checkpoints, optimisers, repositories and on the command line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay
from torch import nn

from lk_backbones import enlarge_kernels, hub, prepack_weights, reparameterize
from lk_backbones.cli import main
from lk_backbones.layers import EnlargedConv2d
from lk_backbones.layers.enlarge import enlarged_parameters, original_name
from lk_backbones.tasks import BaseTask, ClassificationTask, DetectionTask, SegmentationTask
from lk_backbones.tasks.encoder import timm_model, timm_names
from lk_backbones.tasks.optim import encoder_lr_scales
from lk_backbones.weights import WeightMismatchError, WeightsError
from tests.blocks import loader, trainer
from tests.conftest import assert_golden
from tests.oracle import make

SEGMENTATION: dict[str, Any] = {
    "architecture": "fpn",
    "encoder": "tu-convnext_atto",
    "architecture_kwargs": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    "num_classes": 4,
}
KERNELS: dict[str, Any] = {"kernel_size": 13, "stages": [2, 3]}


def segmentation(**kwargs: Any) -> SegmentationTask:
    torch.manual_seed(0)
    return SegmentationTask(**(SEGMENTATION | kwargs))


def detection(**kwargs: Any) -> DetectionTask:
    torch.manual_seed(0)
    return make("fcos", encoder="tu-convnext_atto", encoder_kwargs=None, **kwargs)


def enlarged(model: nn.Module) -> list[EnlargedConv2d]:
    return [module for module in model.modules() if isinstance(module, EnlargedConv2d)]


def fill(task: nn.Module) -> Any:
    for conv in enlarged(task):
        nn.init.normal_(conv.large_weight, 0, 0.1)
    return task


def save(task: BaseTask, file: Path) -> Path:
    saver = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    saver.strategy.connect(task)
    saver.save_checkpoint(file)
    return file


def test_a_classifier_starts_as_it_was_and_its_checkpoint_alone_rebuilds(tmp_path: Path) -> None:
    args: dict[str, Any] = {"encoder_kwargs": {"ls_init_value": 1.0}, "num_classes": 4}
    torch.manual_seed(0)
    plain = ClassificationTask("tu-convnext_atto", **args).eval()
    torch.manual_seed(0)
    task = ClassificationTask("tu-convnext_atto", **args, enlarge_kernels=KERNELS).eval()
    assert len(enlarged(task)) == 8
    image = torch.rand(1, 3, 64, 64)
    assert_golden(task(image), plain(image))
    rebuilt = ClassificationTask.load_from_checkpoint(save(fill(task), tmp_path / "a.ckpt")).eval()
    assert not torch.allclose(task(image), plain(image))
    assert torch.equal(rebuilt(image), task(image))


@pytest.mark.parametrize("build", [segmentation, detection])
def test_pretrained_kernels_are_kept_and_a_checkpoint_alone_rebuilds(build: Any, tmp_path: Path) -> None:
    source = timm.create_model("convnext_atto")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    task = build(enlarge_kernels=KERNELS, encoder_weights=str(tmp_path / "weights.safetensors"))
    plain = build()
    assert len(enlarged(task)) == len(enlarged(task.encoder)) == 8
    own = task.encoder.state_dict()
    for name, tensor in source.state_dict().items():
        if name.startswith("stages"):
            assert torch.equal(own["model." + name.replace(".", "_", 1)], tensor)
    assert not any(conv.large_weight.any() for conv in enlarged(task))
    assert task.state_dict().keys() - plain.state_dict().keys() == enlarged_parameters(task).keys()

    fill(task).eval()
    saved = save(task, tmp_path / "task.ckpt")
    (tmp_path / "weights.safetensors").unlink()
    assert torch.load(saved, weights_only=True)["hyper_parameters"]["enlarge_kernels"] == KERNELS
    x = torch.rand(1, 3, 64, 64)
    again = type(task).load_from_checkpoint(saved).eval()
    for model in (again, hub.load_model(saved)):
        for one, other in zip(model.encoder(x), task.encoder(x), strict=True):
            assert torch.equal(one, other)
    with torch.no_grad():
        for prepared in (reparameterize(task), prepack_weights(task)):
            assert enlarged(prepared) == []
            for one, other in zip(prepared.encoder(x), task.encoder(x), strict=True):
                if other.numel():
                    assert_golden(one, other, 2e-5)


def test_training_moves_the_large_kernels(tmp_path: Path) -> None:
    """Layer-wise decay, clipping, checkpointed gradients: a real trainer, in bfloat16."""
    task = segmentation(enlarge_kernels=9, layer_decay=0.9, gradient_checkpointing=True, lr=1e-3)
    run = trainer(tmp_path, max_steps=2, precision="bf16-mixed", limit_val_batches=0)
    run.fit(task, loader([(64, 64)] * 4, 2))
    assert all(conv.large_weight.abs().max() > 0 for conv in enlarged(task))
    groups = run.optimizers[0].param_groups
    found = {id(p): (g["initial_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sorted(found) == sorted(id(parameter) for parameter in task.parameters())
    assert sum(len(group["params"]) for group in groups) == len(found)
    for conv in enlarged(task):
        assert found[id(conv.large_weight)] == found[id(conv.weight)]
        assert found[id(conv.large_weight)][1] == task.hparams["weight_decay"] > 0


def test_a_frozen_encoder_stays_frozen() -> None:
    task = segmentation(enlarge_kernels=9, freeze_encoder=True)
    assert not any(parameter.requires_grad for parameter in task.encoder.parameters())


@pytest.mark.parametrize(
    "name",
    ["convnext_atto", "inception_next_atto", "mobilenetv2_035", "mobilenetv3_small_050", "efficientnet_lite0"],
)
def test_a_large_kernel_has_the_rate_and_decay_of_the_small_one(name: str) -> None:
    """Against timm's own groups of the whole model, enlarged."""
    full = timm.create_model(name)
    encoder = smp.encoders.get_encoder(f"tu-{name}", weights=None)
    sizes = {parameter: t.shape for parameter, t in encoder.named_parameters()}
    enlarge_kernels(full, 13, inplace=True)
    enlarge_kernels(encoder, 13, inplace=True)
    names = {id(p): n for n, p in full.named_parameters()}
    expected = {
        names[id(p)]: g["lr_scale"] for g in param_groups_layer_decay(full, layer_decay=0.8) for p in g["params"]
    }
    scales, exempt = encoder_lr_scales(encoder, 0.8)
    renamed = timm_names(encoder, timm_model(encoder))
    assert scales.keys() == {parameter for parameter, _ in encoder.named_parameters()}
    assert scales.keys() - sizes.keys() == enlarged_parameters(encoder).keys() != set()
    assert scales == pytest.approx({n: expected[renamed[n]] for n in scales})
    assert len(set(scales.values())) > 3
    assert exempt == set()
    for large, small in enlarged_parameters(encoder).items():
        assert scales[large] == scales[small]
        assert original_name(large) == small


# ---- weights ----


def test_weights_that_were_published_for_small_kernels_load(tmp_path: Path) -> None:
    source = timm.create_model("convnext_atto", num_classes=5)
    file = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), file)
    for model in (
        enlarge_kernels(timm.create_model("convnext_atto", num_classes=5), 13),
        fill(segmentation(enlarge_kernels=13)),
        enlarge_kernels(smp.Unet("tu-convnext_atto", encoder_weights=None), 13),
    ):
        before = [conv.large_weight.clone() for conv in enlarged(model)]
        report = hub.load_weights(model, file)
        assert report.missing == []
        assert "12 enlarged kernels keep their values: the weights are those of the small ones" in str(report)
        for conv, kernel in zip(enlarged(model), before, strict=True):
            assert torch.equal(conv.large_weight, kernel)
        small = [conv.weight for conv in enlarged(model)]
        assert torch.equal(small[0], source.stages[0].blocks[0].conv_dw.weight)


def test_weights_of_an_enlarged_task_go_into_every_kind_of_model(tmp_path: Path) -> None:
    task = fill(segmentation(enlarge_kernels=13))
    file = save(task, tmp_path / "task.ckpt")
    kernels = [conv.large_weight for conv in enlarged(task)]
    other = detection(enlarge_kernels=13)
    hub.load_weights(other.encoder, file)
    whole = enlarge_kernels(timm.create_model("convnext_atto", num_classes=0), 13)
    hub.load_weights(whole, file, strict=False)  # without the last norm
    for model in (other, whole):
        for conv, kernel in zip(enlarged(model), kernels, strict=True):
            assert torch.equal(conv.large_weight, kernel)
    with pytest.raises(WeightMismatchError, match=r"12 unexpected, first .*large_weight"):
        hub.load_weights(segmentation().encoder, file)
    with pytest.raises(WeightMismatchError, match=r"large_weight \(40, 1, 13, 13\) instead of \(40, 1, 9, 9\)"):
        hub.load_weights(segmentation(enlarge_kernels=9).encoder, file)


@pytest.mark.parametrize("build", [segmentation, detection])
def test_a_pushed_task_comes_back(build: Any, tmp_path: Path) -> None:
    task = fill(build(enlarge_kernels=13 if build is detection else {"kernel_size": 31, "peripheral": True})).eval()
    folder = hub.push(task, "you/task", dry_run=True, folder=tmp_path / "pushed")
    again = hub.load_model(folder)
    assert type(again) is type(task)
    assert again.hparams["enlarge_kernels"] == task.hparams["enlarge_kernels"]
    state = task.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_what_cannot_be_rebuilt_is_not_pushed(tmp_path: Path) -> None:
    task = segmentation(enlarge_kernels=13)
    whole = enlarge_kernels(timm.create_model("convnext_atto"), 13)
    for model, message in (
        (task.encoder, "12 enlarged kernels, which a timm model does not have.*publish the task"),
        (task.model, "cannot be rebuilt from the arguments"),
        (whole, "cannot be rebuilt from the arguments"),
    ):
        with pytest.raises(WeightsError, match=message):
            hub.push(model, "you/model", dry_run=True, folder=tmp_path / "pushed")
        assert not (tmp_path / "pushed").exists()


# ---- mistakes ----


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (12, r"enlarge_kernels=12: kernel_size must be an odd number of at least 3, got 12"),
        (True, "kernel_size=True must be"),
        ("13", "kernel_size='13' must be"),
        ({}, "needs a kernel_size"),
        ({"stages": [1]}, "needs a kernel_size, such as 13"),
        ({"kernel_sise": 13}, "has no argument 'kernel_sise', only kernel_size, stages, .*did you mean 'kernel_size'"),
        ({"kernel_size": 13, "inplace": False}, "has no argument 'inplace'"),
        ({"kernel_size": 13, "peripheral": 2}, "enlarge_kernels: peripheral=2 must be"),
        ({"kernel_size": 13, "stages": "all"}, "enlarge_kernels: stages='all' must be"),
    ],
)
def test_a_wrong_argument_is_found_before_anything_is_built(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmentation(enlarge_kernels=value, encoder="not built")
    with pytest.raises(ValueError, match=message):
        detection(enlarge_kernels=value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"enlarge_kernels": 7}, r"enlarge_kernels=7: nothing in this TimmUniversalEncoder .*a kernel of 7x7 already"),
        ({"enlarge_kernels": 13, "encoder": "resnet18"}, "no convolutions with groups"),
        ({"enlarge_kernels": 33, "encoder": "replknet_31n"}, "in a ConvNorm, which folds itself"),
        ({"enlarge_kernels": {"kernel_size": 13, "pattern": "*conv_wd"}}, "'.*conv_wd' matches no .*conv_dw'"),
        ({"enlarge_kernels": {"kernel_size": 13, "stages": [4]}}, "there is no stage 4, there are 0 to 3"),
    ],
)
def test_an_encoder_that_cannot_be_enlarged(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmentation(**kwargs)


@pytest.mark.parametrize(
    "value", [[13], "os.system", {"kernel_size": {"class_path": "os.system"}}, {"kernel_size": 13, "x": 1}, 12, 1.5]
)
def test_a_tampered_checkpoint_is_one_error(value: Any, tmp_path: Path) -> None:
    file = save(segmentation(enlarge_kernels=9), tmp_path / "task.ckpt")
    content = torch.load(file, weights_only=True)
    content = copy.copy(content) | {"hyper_parameters": dict(content["hyper_parameters"]) | {"enlarge_kernels": value}}
    torch.save(content, file)
    with pytest.raises(WeightsError, match=r"(?s)task\.ckpt.*enlarge_kernels"):
        SegmentationTask.load_from_checkpoint(file)


@pytest.mark.parametrize("value", ["9", '{"kernel_size": 9, "stages": [3], "peripheral": true}'])
def test_command_line(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
        *(
            "--trainer.enable_model_summary",
            "false",
            "--trainer.num_sanity_val_steps",
            "0",
            "--trainer.logger",
            "false",
        ),
        *("--data", "SyntheticScenesDataModule", "--data.image_size", "[64, 64]", "--data.batch_size", "2"),
        *("--data.train_images", "2", "--data.val_images", "1", "--data.num_workers", "0"),
        *("--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"),
        *("--trainer.default_root_dir", str(tmp_path), "--model", "SegmentationTask", "--model.architecture", "fpn"),
        *("--model.encoder", "tu-convnext_atto", "--model.num_classes", "9", "--model.enlarge_kernels", value),
    ]
    main(["fit", *options])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    task = SegmentationTask.load_from_checkpoint(checkpoint)
    assert len(enlarged(task)) == (12 if value == "9" else 2)
    assert all(conv.large_weight.any() for conv in enlarged(task))
