"""Parameter groups and learning rates against values worked out by hand."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from lk_backbones.tasks.encoder import timm_model, timm_names
from lk_backbones.tasks.optim import encoder_lr_scales, parameter_groups, warmup_poly, warmup_poly_scheduler

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


def test_an_encoder_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer_decay=0\.9 needs to know the encoder's layers.*ResNetEncoder"):
        encoder_lr_scales(get_encoder("resnet18"), 0.9)
    assert encoder_lr_scales(get_encoder("resnet18"), 1.0) == ({}, set())


def test_groups_have_no_decay_on_norms_and_biases() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))
    module[2].weight.requires_grad_(False)
    groups = parameter_groups(module, 0.1, 0.05, {"0.weight": 0.5}, set())
    found = {
        (g["lr"], g["weight_decay"]): {n for n, p in module.named_parameters() if any(p is q for q in g["params"])}
        for g in groups
    }
    assert found == {(0.05, 0.05): {"0.weight"}, (0.1, 0.0): {"0.bias", "1.weight", "1.bias", "2.bias"}}
    assert len({g["name"] for g in groups}) == len(groups)
    exempt = parameter_groups(module, 0.1, 0.05, {}, {"0.weight"})
    assert [g["weight_decay"] for g in exempt] == [0.0]
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(module.requires_grad_(False), 0.1, 0.05)


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
