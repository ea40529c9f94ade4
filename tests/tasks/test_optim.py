"""Parameter groups and learning rates against values worked out by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from lk_backbones.tasks import DetectionTask, SegmentationTask
from lk_backbones.tasks.encoder import timm_model, timm_names
from lk_backbones.tasks.optim import (
    encoder_lr_scales,
    parameter_groups,
    warmup_poly,
    warmup_poly_scheduler,
    warmup_step_scheduler,
)
from lk_backbones.weights.saved import read_training_checkpoint

from ..blocks import trainer
from ..oracle import make

ENCODERS = {
    "tu-convnext_atto": {},
    "tu-resnet18": {},
    "tu-replknet_31n": {"drop_path_rate": 0.1},
    "tu-regnetx_002": {},
    "tu-efficientnet_lite0": {},
}


def get_encoder(name: str, **kwargs) -> nn.Module:
    return smp.encoders.get_encoder(name, weights=None, **kwargs)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_is_found_in_the_timm_model(name: str) -> None:
    encoder = get_encoder(name, **ENCODERS[name])
    full = timm_model(encoder, ENCODERS[name])
    names = timm_names(encoder, full)
    shapes = full.state_dict()
    assert {n: t.shape for n, t in encoder.state_dict().items()} == {n: shapes[names[n]].shape for n in names}
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("name", ENCODERS)
def test_layer_decay_is_that_of_timm(name: str) -> None:
    encoder = get_encoder(name, **ENCODERS[name])
    scales, _ = encoder_lr_scales(encoder, 0.8, ENCODERS[name])
    # timm's own groups of the whole model, by the parameters' identity
    full = timm.create_model(name.removeprefix("tu-"))
    names = {id(p): n for n, p in full.named_parameters()}
    expected = {
        names[id(p)]: g["lr_scale"] for g in param_groups_layer_decay(full, layer_decay=0.8) for p in g["params"]
    }
    assert {p for p, _ in encoder.named_parameters()} == scales.keys()
    renamed = timm_names(encoder, full)
    assert scales == pytest.approx({n: expected[renamed[n]] for n in scales})


def test_layer_decay_values_of_convnext() -> None:
    # depths 2-2-6-2: the stem, then twelve blocks (with their downsampling in front of the first), then the head
    scales, _ = encoder_lr_scales(get_encoder("tu-convnext_atto"), 0.5, {})
    assert scales["model.stem_0.weight"] == pytest.approx(0.5**13)
    assert scales["model.stages_0.blocks.0.conv_dw.weight"] == pytest.approx(0.5**12)
    assert scales["model.stages_3.blocks.1.conv_dw.weight"] == pytest.approx(0.5)


def test_stages_as_layers_and_a_factor_of_all() -> None:
    encoder = get_encoder("tu-convnext_atto")
    scales, _ = encoder_lr_scales(encoder, 0.5, {}, "stage_wise", 0.1)
    for name, scale in scales.items():  # the stem, four stages, the head
        below = 5 if "stem" in name else 4 - int(name.partition("stages_")[2][0])
        assert scale == pytest.approx(0.1 * 0.5**below), name
    alike, _ = encoder_lr_scales(encoder, 1.0, {}, lr_scale=0.1)
    assert alike == pytest.approx(dict.fromkeys(scales, 0.1))


def test_an_encoder_without_layers_is_refused() -> None:
    encoder = get_encoder("resnet18")
    with pytest.raises(ValueError, match=r"layer_decay=0\.9 needs to know the encoder's layers.*ResNetEncoder"):
        encoder_lr_scales(encoder, 0.9)
    assert encoder_lr_scales(encoder, 1.0) == ({}, set())
    alike, _ = encoder_lr_scales(encoder, 1.0, lr_scale=0.1)  # which needs no layers
    assert alike == {name: 0.1 for name, _ in encoder.named_parameters()}


def by_group(groups: list[dict], module: nn.Module) -> dict[tuple[float, float], set[str]]:
    """Names of the parameters of every group, by its learning rate and weight decay."""
    names = {id(p): n for n, p in module.named_parameters()}
    return {(g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}


def test_norms_have_no_decay_and_biases_as_they_are_told() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))
    module[2].weight.requires_grad_(False)
    norm, biases = {"1.weight", "1.bias"}, {"0.bias", "2.bias"}
    for bias_decay, expected in (
        (None, {(0.05, 0.05): {"0.weight"}, (0.1, 0.05): biases, (0.1, 0.0): norm}),
        (0.0, {(0.05, 0.05): {"0.weight"}, (0.1, 0.0): norm | biases}),
        (0.01, {(0.05, 0.05): {"0.weight"}, (0.1, 0.01): biases, (0.1, 0.0): norm}),
    ):
        groups = parameter_groups(module, 0.1, 0.05, {"0.weight": 0.5}, set(), bias_decay)
        assert by_group(groups, module) == expected
        assert len({g["name"] for g in groups}) == len(groups)
    exempt = parameter_groups(module, 0.1, 0.05, {}, {"0.weight", "0.bias", "2.bias"})
    assert [g["weight_decay"] for g in exempt] == [0.0]
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(module.requires_grad_(False), 0.1, 0.05)


def norms_of(module: nn.Module) -> set[str]:
    """Weights and biases of all normalisation layers, whosever they are, told by their types."""
    from timm.layers.grn import GlobalResponseNorm

    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d, GlobalResponseNorm)
    return {
        f"{prefix}.{name}"
        for prefix, layer in module.named_modules()
        if isinstance(layer, kinds)
        for name, _ in layer.named_parameters(recurse=False)
    }


TASKS = {
    "upernet": (SegmentationTask, {"architecture": "upernet_openmmlab", "auxiliary_weight": 0.4}),
    "convnextv2": (SegmentationTask, {"architecture": "fpn", "encoder": "tu-convnextv2_atto"}),
    "swin": (SegmentationTask, {"architecture": "fpn", "encoder": "tu-swin_tiny_patch4_window7_224"}),
    "unet": (SegmentationTask, {"architecture": "unet", "encoder": "resnet18"}),
    "cascade": (DetectionTask, {"architecture": "cascade_mask_rcnn", "num_classes": 2}),
    "fcos": (DetectionTask, {"architecture": "fcos", "num_classes": 2}),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("bias_decay", [None, 0.0])
def test_what_decays_in_a_task(name: str, bias_decay: float | None) -> None:
    task_class, arguments = TASKS[name]
    kwargs = {"img_size": 64} if name == "swin" else {}
    task = task_class(**arguments, encoder_kwargs=kwargs, lr=1e-3, weight_decay=0.05, bias_weight_decay=bias_decay)
    task.trainer = SimpleNamespace(estimated_stepping_batches=10, fast_dev_run=False)  # type: ignore[assignment]
    groups = task.configure_optimizers()["optimizer"].param_groups
    found = by_group(groups, task)
    parameters = dict(task.named_parameters())
    assert found.keys() == {(1e-3, 0.05), (1e-3, 0.0)}
    assert set().union(*found.values()) == parameters.keys()

    norms = norms_of(task)
    biases = {n for n, p in parameters.items() if n.endswith("bias") and p.ndim == 1} - norms
    # what timm's models themselves exempt, and vectors that are neither: layer scales
    tables = {n for n in parameters if "relative_position_bias_table" in n}
    others = {n for n, p in parameters.items() if p.ndim <= 1} - norms - biases
    assert norms
    assert biases
    assert bool(tables) == (name == "swin")
    assert found[1e-3, 0.0] == norms | tables | others | (set() if bias_decay is None else biases)


def test_a_step_shrinks_biases_as_the_authors_do() -> None:
    """One step without gradients: AdamW multiplies what decays by 1 - lr * weight_decay, and nothing else."""
    task = SegmentationTask("unet", "resnet18", lr=0.5, weight_decay=0.1)
    task.trainer = SimpleNamespace(estimated_stepping_batches=10, fast_dev_run=False)  # type: ignore[assignment]
    optimizer = task.configure_optimizers()["optimizer"]
    for parameter in task.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    norms = norms_of(task)
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(parameter.data, torch.full_like(parameter, 1.0 if name in norms else 0.95))


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("task", [SegmentationTask, DetectionTask])
def test_an_impossible_decay_of_biases_is_refused(task, decay: float) -> None:
    with pytest.raises(ValueError, match=r"bias_weight_decay=.* must be (at least 0|finite)"):
        task(bias_weight_decay=decay)


@pytest.mark.parametrize("task", [SegmentationTask, DetectionTask])
def test_impossible_rates_of_the_encoder_are_refused(task) -> None:
    with pytest.raises(ValueError, match=r"encoder_lr_scale=0 must be positive"):
        task(encoder_lr_scale=0)
    with pytest.raises(ValueError, match="layer_decay_type='stages' must be one of layer_wise, stage_wise"):
        task(layer_decay_type="stages")


def test_warm_up_and_decay_values() -> None:
    def factor(step: int, **kwargs) -> float:
        return warmup_poly(
            step,
            **({"total_steps": 100, "warmup_steps": 10, "warmup_ratio": 0.1, "power": 1.0, "min_factor": 0.0} | kwargs),
        )

    assert factor(0) == pytest.approx(0.1)
    assert factor(5) == pytest.approx(0.95 * 0.55)  # decay 1 - 5/100, ramp 0.1 + 0.9 / 2
    assert factor(10) == pytest.approx(0.9)
    assert factor(99) == pytest.approx(0.01)
    assert factor(100) == factor(101) == 0
    assert factor(50, power=2.0) == pytest.approx(0.25)
    assert factor(50, min_factor=0.2) == pytest.approx(0.6)
    assert factor(100, min_factor=0.2) == pytest.approx(0.2)
    assert factor(70, power=0.0) == 1
    assert factor(0, warmup_steps=0) == 1


def test_scheduler_keeps_the_groups_in_proportion() -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.01)])
    scheduler = warmup_poly_scheduler(optimizer, 10, 2, 0.5, 1.0, 0.0)
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [r[0] for r in rates[:4]] == pytest.approx([0.05, 0.9 * 0.75 * 0.1, 0.08, 0.07])
    assert [r[1] for r in rates] == pytest.approx([0.1 * r[0] for r in rates])


@pytest.mark.parametrize("warmup_ratio", [1e-3, 0.333, 0.0, 1.0])
@pytest.mark.parametrize("warmup_steps", [0, 1, 500])
def test_warm_up_and_drops_follow_the_published_formula(warmup_steps: int, warmup_ratio: float) -> None:
    lrs, milestones = (2e-4, 5e-6), (1000, 1001, 1500)
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs])
    scheduler = warmup_step_scheduler(optimizer, milestones, 0.1, warmup_steps, warmup_ratio)
    for step in range(2000):
        ramp = 1.0 if step >= warmup_steps else warmup_ratio + (1 - warmup_ratio) * step / warmup_steps
        factor = ramp * 0.1 ** sum(step >= milestone for milestone in milestones)
        expected = [lr * factor for lr in lrs]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-12, abs=1e-200)
        optimizer.step()
        scheduler.step()


def test_a_run_with_drops_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """What the schedule keeps in a checkpoint is read without unpickling, by the command line's own reader too."""

    def rates(**kwargs: Any) -> list[float]:
        seen: list[float] = []
        task = make("faster_rcnn", milestones=[2], warmup_steps=3, lr=1e-3)
        task.training_step = lambda batch, batch_idx: (  # type: ignore[method-assign]
            seen.append(task.trainer.optimizers[0].param_groups[-1]["lr"]),
            sum(parameter.sum() for parameter in task.parameters()),
        )[1]
        ckpt_path = kwargs.pop("ckpt_path", None)
        fitter = trainer(tmp_path, limit_val_batches=0, enable_checkpointing=True, **kwargs)
        fitter.fit(task, torch.utils.data.DataLoader(range(2)), ckpt_path=ckpt_path, weights_only=True)
        fitter.save_checkpoint(tmp_path / f"{fitter.global_step}.ckpt")
        return seen

    undisturbed = rates(max_epochs=4)
    ramp = [0.001 + 0.999 * step / 3 for step in range(3)]
    assert undisturbed == pytest.approx([*(1e-3 * r for r in ramp), 1e-3, *[1e-4] * 4], rel=1e-12)
    for epochs in (1, 3):
        first = rates(max_epochs=epochs)
        path = tmp_path / f"{2 * epochs}.ckpt"
        read_training_checkpoint(path)
        assert first + rates(max_epochs=4, ckpt_path=path) == undisturbed
