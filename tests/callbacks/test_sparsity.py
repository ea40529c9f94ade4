"""Sparse training through real trainers: the zeros are where and as many as they should be, whatever happens."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm.optim
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lk_backbones._processes import gathered, world
from lk_backbones.callbacks import DynamicSparsity
from lk_backbones.cli import main
from lk_backbones.layers import count_nonzero_parameters
from lk_backbones.layers.sparsity import apportion, pack_mask
from lk_backbones.tasks import SegmentationTask
from lk_backbones.weights.errors import WeightsError

from ..blocks import trainer

WEIGHTS = {"net.0.weight": (8, 3, 3, 3), "net.2.weight": (8, 1, 5, 5), "net.5.weight": (7, 8)}
TOTAL = 216 + 200 + 56


class Net(L.LightningModule):
    """A convolution, a norm, a depthwise convolution and a classifier, on noise."""

    def __init__(self, make_optimizer: Callable[..., Any] | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 5, groups=8),
            nn.ReLU(),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)),
            nn.Linear(8, 7),
        )
        self.make_optimizer = make_optimizer or (lambda parameters: torch.optim.AdamW(parameters, 1e-2))

    def loss(self, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            self.net(batch), batch[:, 0, 0, :1].flatten().abs().mul(3).long().clamp(max=6)
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        torch.manual_seed(self.trainer.global_step * 100 + batch_idx + self.trainer.global_rank)
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def noise(batches: int = 12, batch_size: int = 4) -> DataLoader:
    data = torch.randn(batches * batch_size, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return DataLoader(list(data), batch_size)


class Exact(L.Callback):
    """Check after every batch that exactly the masked weights are held at zero, and the optimisers' state of them."""

    def __init__(self, sparsity: DynamicSparsity, zeros: int | None = None, total: int = TOTAL) -> None:
        self.sparsity = sparsity
        self.zeros = round(total * (sparsity.sparsity or 0)) if zeros is None else zeros
        self.history: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        masks = self.sparsity.masks
        if not masks:
            assert trainer.global_step == 0
            return
        self.history.append(masks)
        parameters = {name.replace("_orig_mod.", ""): p for name, p in pl_module.named_parameters()}
        assert sum(int((~mask).sum()) for mask in masks.values()) == self.zeros
        for name, mask in masks.items():
            assert not parameters[name][~mask].any(), name
            for optimizer in trainer.optimizers:
                for key, state in optimizer.state.get(parameters[name], {}).items():
                    assert state.shape != mask.shape or not state[~mask].any(), (name, key)
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAveraging):
                average = dict(callback._average_model.module.named_parameters())
                assert all(not average[name][~mask].any() for name, mask in masks.items())

    def changes(self) -> list[int]:
        """How many batches after the first saw new masks, as their positions."""
        pairs = enumerate(pairwise(self.history))
        return [i + 2 for i, (a, b) in pairs if any(not torch.equal(a[name], b[name]) for name in a)]


def fit(folder: Path, callback: DynamicSparsity, module: L.LightningModule | None = None, **kwargs: Any) -> Exact:
    exact = kwargs.pop("exact", None) or Exact(callback)
    ckpt_path, data = kwargs.pop("ckpt_path", None), kwargs.pop("data", None) or noise()
    callbacks = [callback, *kwargs.pop("callbacks", []), exact]
    run = trainer(folder, callbacks=callbacks, limit_val_batches=0, **kwargs)
    torch.manual_seed(0)
    run.fit(module or Net(), data, ckpt_path=ckpt_path)
    return exact


# --- the zeros hold -----------------------------------------------------------------------------------------


OPTIMIZERS = {
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, 1e-2, fused=True, amsgrad=True),
    "sgd momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    # updates of a matrix as a whole reach entries without gradient
    "lamb": lambda parameters: timm.optim.Lamb(list(parameters), 1e-2),
    "muon": lambda parameters: torch.optim.Muon([p for p in parameters if p.ndim == 2], 1e-2),
}


@pytest.mark.parametrize("init", ["snip", "snip_densities", "erk", "uniform"])
@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_the_sparsity_holds_after_every_step(tmp_path: Path, init: Any, growth: Any) -> None:
    callback = DynamicSparsity(0.4, init, growth, every_n_train_steps=2, prune_rate=0.5)
    exact = fit(tmp_path, callback, gradient_clip_val=0.1, max_epochs=1)
    assert callback.masks.keys() == WEIGHTS.keys()
    assert len(exact.history) == 12
    assert exact.changes() == [2, 4, 6, 8, 10]  # not with the last step, behind which nothing would be trained
    kept = [[int(mask.sum()) for mask in masks.values()] for masks in exact.history]
    assert kept == [kept[0]] * 12  # every layer keeps its number


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_with_every_optimizer_precision_and_accumulation(tmp_path: Path, name: str, precision: Any) -> None:
    callback = DynamicSparsity(0.5, "erk", every_n_train_steps=2, exclude="net.2" if name == "muon" else None)
    total = 56 if name == "muon" else TOTAL
    exact = fit(
        tmp_path,
        callback,
        Net(OPTIMIZERS[name]),
        exact=Exact(callback, total=total),
        precision=precision,
        accumulate_grad_batches=2,
        max_epochs=1,
    )
    assert len(exact.history) == 12
    assert exact.changes() == [4, 8]


def test_steps_that_overflow_are_waited_for(tmp_path: Path) -> None:
    """A scaler begins so high that the first gradients are infinite, and skips those steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60, growth_interval=2)
    callback = DynamicSparsity(0.4, growth="gradient", every_n_train_steps=2)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(bool(callback.masks))

    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(tmp_path, callback, callbacks=[Watch()], exact=Lenient(callback), plugins=[plugin], max_epochs=1)
    assert seen[0] is False
    assert seen[-1] is True
    assert sum(int((~mask).sum()) for mask in callback.masks.values()) == round(0.4 * TOTAL)


class Lenient(Exact):
    """As `Exact`, where steps may have been skipped before there were masks."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self.sparsity.masks:
            super().on_train_batch_end(trainer, pl_module, *args)


class Pair(Net):
    """Two optimisers, stepped by hand, the second every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.net[:3].parameters(), 1e-2)
        return first, torch.optim.SGD(self.net[3:].parameters(), 1e-2, momentum=0.9)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers[: 1 + batch_idx % 2]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    callback = DynamicSparsity(0.5, "snip", "gradient", every_n_train_steps=3, end_step=100)

    class EachOnItsOwn(Lenient):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            self.zeros = 208 if len(callback.masks) == 2 else 208 + 28
            super().on_train_batch_end(trainer, pl_module, *args)

    exact = fit(tmp_path, callback, Pair(), exact=EachOnItsOwn(callback), max_epochs=1)
    assert [len(masks) for masks in exact.history] == [2, *[3] * 11]  # the second's come with its first step
    late = [masks["net.5.weight"] for masks in exact.history[1:]]
    changes = [i + 3 for i, (a, b) in enumerate(pairwise(late)) if not torch.equal(a, b)]
    assert changes == [6, 12]  # its third and sixth step


def test_averaged_weights_are_as_sparse(tmp_path: Path) -> None:
    callback = DynamicSparsity(0.4, every_n_train_steps=2, prune_rate_schedule="constant")
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    module = Net()
    ema = EMAWeightAveraging(decay=0.9)
    exact = fit(tmp_path, callback, module, callbacks=[ema, keep], enable_checkpointing=True, max_epochs=2)
    assert len(exact.changes()) == 11
    assert_sparse(module, callback.masks)  # it has the average's weights now
    for step in (5, 20):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        masks = exact.history[step - 1]
        for part in ("state_dict", "current_model_state"):
            assert all(not checkpoint[part][name][~mask].any() for name, mask in masks.items()), part
    # a weight that has grown starts its average from zero too, and follows
    grown = callback.masks["net.0.weight"] & ~exact.history[0]["net.0.weight"]
    assert module.net[0].weight[grown].any()

    swa = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    other = Net()
    other.net[1] = nn.GroupNorm(2, 8)
    callback = DynamicSparsity(0.4, every_n_train_steps=5)
    fit(tmp_path, callback, other, callbacks=[swa], max_epochs=3)
    assert_sparse(other, callback.masks)


def assert_sparse(module: nn.Module, masks: dict[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    assert masks
    assert all(not parameters[name][~mask].any() for name, mask in masks.items())


# --- resumption -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize(("init", "growth"), [("snip", "gradient"), ("erk", "random")])
def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path: Path, init: Any, growth: Any, ema: bool) -> None:
    def run(ckpt_path: Path | None, *callbacks: L.Callback) -> tuple[Net, Exact]:
        callback = DynamicSparsity(0.4, init, growth, every_n_train_steps=2, seed=None)
        module = Net()
        extra = [*callbacks, *([EMAWeightAveraging(decay=0.9)] if ema else [])]
        kwargs: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2, "enable_checkpointing": True}
        # the same pictures in every batch: the order of the data is not this callback's concern
        kwargs["data"] = DataLoader(list(noise().dataset)[:4] * 12, 4)
        return module, fit(tmp_path, callback, module, callbacks=extra, ckpt_path=ckpt_path, **kwargs)

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    whole, exact = run(None, keep)
    resumed, rest = run(tmp_path / "step=5.ckpt", ModelCheckpoint(tmp_path / "other"))
    assert len(rest.history) == 14
    for mine, theirs in zip(rest.history, exact.history[-14:], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    callback = DynamicSparsity(0.4, every_n_train_steps=2)
    run = trainer(folder, callbacks=[callback], max_steps=3, limit_val_batches=0)
    run.fit(Net(), noise())
    run.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt"


def test_a_checkpoint_needs_no_callback_to_be_used(tmp_path: Path, saved: Path) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    assert checkpoint["state_dict"].keys() == Net().state_dict().keys()
    assert checkpoint["callbacks"]["DynamicSparsity"]["masks"]["net.0.weight"]["pruned"].numel() == 27  # bits
    module = Net()
    module.load_state_dict(checkpoint["state_dict"])
    whole = sum(parameter.numel() for parameter in module.parameters())
    # what has grown in the step before the last may still be at zero
    assert 0 <= whole - round(0.4 * TOTAL) - count_nonzero_parameters(module) <= 20
    callback = DynamicSparsity(0.4)
    run = trainer(tmp_path, callbacks=[callback])
    for validate, ckpt_path in ((run.validate, saved), (run.test, None)):
        if validate == run.test:
            module.test_step = module.validation_step
        validate(module, noise(), ckpt_path=ckpt_path, verbose=False)
    assert callback.masks == {}


def altered(saved: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(saved, weights_only=True)
    change(checkpoint["callbacks"]["DynamicSparsity"])
    path = saved.with_name("altered.ckpt")
    torch.save(checkpoint, path)
    return path


def of_first(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state["masks"]["net.0.weight"].update({key: value})


TAMPERED = {
    "is of sparsity=0.9, this run's is 0.4": lambda state: state.update(sparsity=0.9),
    r"sparsity=\[\], this run's": lambda state: state.update(sparsity=[]),
    "not one that it has saved": lambda state: state.pop("masks"),
    "seed=-1 must be": lambda state: state.update(seed=-1),
    "seed='0' must be": lambda state: state.update(seed="0"),
    r"steps=\[-3\] must be": lambda state: state.update(steps=[-3]),
    "steps=tensor.* must be": lambda state: state.update(steps=torch.ones(1)),
    "is of 2 optimisers, this run has 1": lambda state: state.update(steps=[1, 2]),
    r"masks=\[\] must be": lambda state: state.update(masks=[]),
    "there is none for 'net.0.weight'": lambda state: state["masks"].pop("net.0.weight"),
    "no layer 'net.9.weight'; did you mean": lambda state: state["masks"].update({"net.9.weight": None}),
    "no layer 7": lambda state: state["masks"].update({7: None}),
    "the mask of net.2.weight is None, not": lambda state: state["masks"].update({"net.2.weight": None}),
    r"is of shape \[8, 3, 9\], its weight of \[8, 3, 3, 3\]": of_first("shape", [8, 3, 9]),
    r"not of \(27,\) uint8": of_first("pruned", torch.zeros(26, dtype=torch.uint8)),
    r"\(27,\) float32, not of \(27,\) uint8": of_first("pruned", torch.zeros(27)),
    "holds 82 zeros instead of 189|holds .* zeros instead of 189": of_first(
        "pruned", torch.zeros(27, dtype=torch.uint8)
    ),
    "or a layer without weights": lambda state: state["masks"].update(
        {"net.0.weight": pack_mask(torch.ones(8, 3, 3, 3).bool())}
    ),
}


@pytest.mark.parametrize("message", TAMPERED)
def test_a_checkpoint_that_was_altered_is_refused(tmp_path: Path, saved: Path, message: str) -> None:
    path = altered(saved, TAMPERED[message])
    module = Net()
    with pytest.raises(WeightsError, match=message):
        fit(tmp_path, DynamicSparsity(0.4), module, ckpt_path=path, max_steps=5)
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


def test_other_settings_on_resumption(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(WeightsError, match=r"sparsity=0\.4, this run's is 0\.5: resume with the former"):
        fit(tmp_path, DynamicSparsity(0.5), ckpt_path=saved, max_steps=5)
    with pytest.raises(WeightsError, match=r"3 masks for the 2 layers .* no layer 'net\.5\.weight'.*same layers"):
        fit(tmp_path, DynamicSparsity(0.4, exclude="net.5"), ckpt_path=saved, max_steps=5)
    callback = DynamicSparsity(0.4, "erk", "random", 1, 0.2, "constant", end_step=6, seed=9)
    exact = fit(tmp_path, callback, ckpt_path=saved, max_steps=6, max_epochs=2)
    assert exact.changes() == [2]  # steps 4 and 5 of 6, of which the first has nothing before it to compare with


def test_fitting_again_goes_on_and_another_network_starts_anew(tmp_path: Path) -> None:
    callback = DynamicSparsity(0.4, every_n_train_steps=2, end_step=3)
    module = Net()
    first = fit(tmp_path, callback, module, max_steps=3).history[-1]
    again = fit(tmp_path, callback, module, max_steps=1).history[0]
    assert all(torch.equal(first[name], again[name]) for name in WEIGHTS)
    anew = fit(tmp_path, callback, Net(), max_steps=1).history[0]
    assert any(not torch.equal(first[name], anew[name]) for name in WEIGHTS)
    assert copy.deepcopy(callback).masks.keys() == WEIGHTS.keys()


def test_a_sparse_network_is_fine_tuned_with_its_own_zeros(tmp_path: Path, saved: Path) -> None:
    module = Net()
    weights = torch.load(saved, weights_only=True)["state_dict"]
    module.load_state_dict(weights)
    zeros = sum(int((weights[name] == 0).sum()) for name in WEIGHTS)
    callback = DynamicSparsity(None, "weights", every_n_train_steps=None)
    exact = fit(tmp_path, callback, module, exact=Exact(callback, zeros), max_steps=3)
    assert exact.changes() == []
    assert torch.equal(callback.masks["net.2.weight"], weights["net.2.weight"] != 0)


# --- which weights --------------------------------------------------------------------------------------------


def test_snip_keeps_what_matters_most_to_the_first_loss(tmp_path: Path) -> None:
    """The masks are those that a direct computation of SNIP gives, over several batches that make one step."""
    torch.manual_seed(3)
    module = Net(lambda parameters: torch.optim.SGD(parameters, 0.0), dropout=0.0)
    reference = copy.deepcopy(module).double()
    batches = list(noise())[:2]
    (sum(reference.loss(batch.double()) for batch in batches) / 2).backward()
    weights = {name: p for name, p in reference.named_parameters() if name in WEIGHTS}
    scores = {name: (p * p.grad).abs().detach() for name, p in weights.items()}
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort().values[round(0.4 * TOTAL) - 1]

    callback = DynamicSparsity(0.4, every_n_train_steps=None)
    fit(tmp_path, callback, copy.deepcopy(module), accumulate_grad_batches=2, max_steps=1)
    for name, mask in callback.masks.items():
        assert torch.equal(mask, scores[name] > threshold), name

    at_random = DynamicSparsity(0.4, "snip_densities", every_n_train_steps=None)
    fit(tmp_path, at_random, module, accumulate_grad_batches=2, max_steps=1)
    for name, mask in at_random.masks.items():
        assert mask.sum() == callback.masks[name].sum()
        assert not torch.equal(mask, callback.masks[name])


def test_densities_of_erdos_renyi_kernels(tmp_path: Path) -> None:
    """Density in proportion to sum(shape) / prod(shape); what would be more than whole is, and others get the rest."""
    callback = DynamicSparsity(0.4, "erk")
    fit(tmp_path, callback, max_steps=1)
    kept = {name: int(mask.sum()) for name, mask in callback.masks.items()}
    sums = {"net.0.weight": 17, "net.2.weight": 19, "net.5.weight": 15}
    rest = TOTAL - round(0.4 * TOTAL) - 56  # of 283 the linear layer would get 83, and has but 56
    assert kept["net.5.weight"] == 56
    for name in ("net.0.weight", "net.2.weight"):
        assert abs(kept[name] - rest * sums[name] / 36) < 1
    callback = DynamicSparsity(0.4, "uniform")
    fit(tmp_path, callback, max_steps=1)
    assert all(abs(mask.sum() - 0.6 * mask.numel()) < 1 for mask in callback.masks.values())


def test_apportioning_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        capacities = torch.randint(1, 50, (6,), generator=generator).tolist()
        shares = torch.randint(1, 20, (6,), generator=generator).tolist()
        for total in (0, 1, sum(capacities) // 2, sum(capacities) - 1, sum(capacities)):
            given = apportion(total, shares, capacities)
            assert sum(given) == total
            ratios = [g / s for g, s, c in zip(given, shares, capacities, strict=True) if g < c]
            assert all(0 <= g <= c for g, c in zip(given, capacities, strict=True))
            assert all(abs(a - b) <= 2 for a in ratios for b in ratios)


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_the_smallest_are_pruned_and_the_steepest_grow(tmp_path: Path, growth: Any) -> None:
    """One exchange, computed directly: what is left of every layer are its largest weights."""
    callback = DynamicSparsity(0.5, "uniform", growth, 2, 0.3, "constant")
    weight: list[Tensor] = []
    gradient: list[Tensor] = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            gradient.append(pl_module.net[0].weight.grad.clone())
            weight.append(pl_module.net[0].weight.detach().clone())

    module = Net(lambda parameters: torch.optim.SGD(parameters, 0.01))
    watch = Watch()
    # the callback before it has zeroed the gradients of pruned weights, so it watches first
    run = trainer(tmp_path, callbacks=[watch, callback, exact := Exact(callback)], limit_val_batches=0, max_steps=3)
    run.fit(module, noise())
    before, after = (exact.history[i]["net.0.weight"] for i in (0, 1))
    updated = weight[1] - 0.01 * gradient[1] * before
    number = math.ceil(0.3 * 108)
    smallest = updated.abs().masked_fill(~before, math.inf).flatten().argsort()[:number]
    survivors = before.clone()
    survivors.view(-1)[smallest] = False
    assert (after & survivors).sum() == survivors.sum()
    assert after.sum() == 108
    assert not weight[2][after & ~before].any()  # from zero
    again = after & before & ~survivors
    assert torch.allclose(weight[2][again], updated[again])  # chosen again at once
    if growth == "gradient":
        steepest = gradient[1].abs().masked_fill(survivors, -1).flatten().argsort(descending=True)[:number]
        assert (after & ~survivors).view(-1)[steepest].all()


class Shared(Net):
    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(8, 7)
        self.tied.weight = self.net[5].weight
        self.frozen = nn.Linear(8, 7).requires_grad_(False)
        self.unused = nn.Embedding(5, 4)
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch) + self.frozen(self.unused.weight.sum() + batch[:, 0, 0, :8]).mean()


@pytest.mark.parametrize(
    ("kwargs", "chosen"),
    [
        ({}, ["net.0.weight", "net.2.weight", "net.5.weight"]),
        ({"layers": "net.[02]"}, ["net.0.weight", "net.2.weight"]),
        ({"layers": ["tied", "*.0.weight"]}, ["net.0.weight", "net.5.weight"]),
        ({"layers": ["*"], "exclude": ["net.?", "scale"]}, ["unused.weight"]),
    ],
)
def test_layers_by_pattern(tmp_path: Path, kwargs: dict[str, Any], chosen: list[str]) -> None:
    callback = DynamicSparsity(0.3, every_n_train_steps=1, **kwargs)
    module = Shared()
    frozen = module.frozen.weight.clone()
    total = sum(p.numel() for name, p in module.named_parameters() if name in chosen)
    fit(tmp_path, callback, module, exact=Exact(callback, total=total), max_steps=3)
    assert sorted(callback.masks) == chosen
    assert torch.equal(module.frozen.weight, frozen)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": "*large_kernle*"}, "matches '\\*large_kernle\\*'; did you mean 'large_kernel'"),
        ({"layers": "*", "exclude": "zzz"}, "matches 'zzz'; patterns are shell-style"),
        ({"layers": "*bias"}, "of two or more dimensions matches"),
        ({"layers": "frozen"}, "no weights are left .* are frozen"),
        ({"layers": "net.0", "exclude": "net.*"}, "no weights are left"),
        ({"sparsity": 0.999, "init": "uniform"}, "no weight is left in 3 of 4 layers, such as .* init='erk'"),
        ({"layers": ["large_kernel", "net.0"]}, "no gradient reaches 1 of 2 layers .* such as large_kernel.weight"),
    ],
)
def test_layers_that_cannot_be_sparse(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    module = Net()
    module.large_kernel = nn.Conv2d(8, 8, 7)  # without a part in the loss
    module.frozen = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, DynamicSparsity(**({"sparsity": 0.4} | kwargs)), module, max_steps=1)


def test_what_no_optimizer_trains_stays_dense(tmp_path: Path) -> None:
    module = Net(lambda _: torch.optim.SGD(module.net[0].parameters(), 0.1))
    callback = DynamicSparsity(0.4)
    fit(tmp_path, callback, module, exact=Exact(callback, total=216), max_steps=2)
    assert list(callback.masks) == ["net.0.weight"]
    with pytest.raises(ValueError, match="no optimiser trains any of the 1 layers"):
        fit(tmp_path, DynamicSparsity(0.4, layers="net.2"), module, max_steps=2)


def test_compiled_parts_have_the_names_of_others(tmp_path: Path, saved: Path) -> None:
    module = Net()
    module.net[0] = torch.compile(module.net[0], backend="eager")
    callback = DynamicSparsity(0.4)
    fit(tmp_path, callback, module, callbacks=[], max_steps=2)
    assert callback.masks.keys() == WEIGHTS.keys()


# --- what does not go -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1\.0 must be in \[0, 1\)"),
        ({"sparsity": -0.1}, r"must be in \[0, 1\)"),
        ({"sparsity": math.nan}, r"must be in \[0, 1\)"),
        ({"sparsity": None}, "give a sparsity"),
        ({"init": "weights"}, "set sparsity=None"),
        ({"init": "smip"}, "init='smip' must be one of .*did you mean 'snip'"),
        ({"growth": "grad"}, "growth='grad' must be one of random, gradient"),
        ({"prune_rate_schedule": "linear"}, "must be one of cosine, constant"),
        ({"every_n_train_steps": 0}, "every_n_train_steps=0 must be at least 1"),
        ({"every_n_train_steps": -5}, "every_n_train_steps=-5"),
        ({"prune_rate": 0.0}, r"prune_rate=0\.0 must be in \(0, 1\]"),
        ({"prune_rate": 1.1}, r"prune_rate=1\.1"),
        ({"min_prune_rate": 0.6}, r"min_prune_rate=0\.6 in \[0, prune_rate\]"),
        ({"end_step": 0}, "end_step=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_arguments_out_of_range(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicSparsity(**({"sparsity": 0.4} | kwargs))


def test_optimizers_that_cannot_be_followed(tmp_path: Path) -> None:
    wrapped = Net(lambda p: timm.optim.Lookahead(torch.optim.SGD(p, 0.1)))
    with pytest.raises(RuntimeError, match="Lookahead has taken a step without calling torch's hooks"):
        fit(tmp_path, DynamicSparsity(0.4), wrapped, exact=Lenient(DynamicSparsity(0.4)), max_steps=2)

    class PastLightning(Pair):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            self.trainer.optimizers[0].step()

    with pytest.raises(RuntimeError, match=r"Adam\.step\(\) was called past Lightning"):
        fit(tmp_path, DynamicSparsity(0.4), PastLightning(), max_steps=2)


def test_a_cosine_needs_an_end_and_snip_finite_gradients(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set end_step, the trainer's max_epochs"):
        fit(tmp_path, DynamicSparsity(0.4), max_epochs=-1)
    module = Net()
    with torch.no_grad():
        module.net[5].bias[0] = math.nan
    with pytest.raises(ValueError, match=r"the first step's gradient of net\.0\.weight is not finite"):
        fit(tmp_path, DynamicSparsity(0.4), module, max_steps=2)


def test_it_tells_what_it_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = DynamicSparsity(0.4, every_n_train_steps=4, prune_rate=0.5, min_prune_rate=0.1)
    with caplog.at_level("INFO"):
        fit(tmp_path, callback, logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=50, max_epochs=1)
    assert (
        "DynamicSparsity: 189 of the 472 weights of 3 layers (40.0%) are held at zero, by init='snip' in the first "
        "step; some change places every 4 steps until step 12."
    ) in [record.getMessage() for record in caplog.records]
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    rows = [row for row in rows if row["sparsity/overall"]]
    assert [int(row["step"]) for row in rows] == [1, 4, 8]
    assert [float(row["sparsity/overall"]) for row in rows] == [189 / 472] * 3
    # a cosine from 0.5 to 0.1 over 12 steps: after a third and two thirds of them
    assert [float(row["sparsity/prune_rate"]) for row in rows[1:]] == pytest.approx([0.4, 0.2])
    assert all(0 < int(row["sparsity/pruned"]) == int(row["sparsity/regrown"]) for row in rows[1:])


# --- real ones ------------------------------------------------------------------------------------------------


def test_our_task_by_a_configuration_on_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    callback = {
        "class_path": "DynamicSparsity",
        "init_args": {"sparsity": 0.4, "every_n_train_steps": 1, "layers": ["model.encoder.*stages*"]},
    }
    config = {
        "trainer": {"callbacks": [callback], "max_steps": 2, "limit_val_batches": 0, "default_root_dir": str(tmp_path)},
    }
    (tmp_path / "sparse.yaml").write_text(json.dumps(config))
    short = ["--data.image_size", "[64,64]", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    with caplog.at_level("INFO"):
        main(
            [
                "fit",
                "--config",
                "quickstart/unet_replknet_31n_scenes",
                "--config",
                str(tmp_path / "sparse.yaml"),
                *short,
            ]
        )
    assert any("DynamicSparsity: " in record.getMessage() for record in caplog.records)
    (path,) = tmp_path.rglob("*.ckpt")
    masks = torch.load(path, weights_only=True)["callbacks"]["DynamicSparsity"]["masks"]
    task = SegmentationTask.load_from_checkpoint(path)
    weights = {name: p for name, p in task.named_parameters() if name in masks}
    assert weights.keys() == masks.keys()
    assert all("stages" in name for name in masks)
    total = sum(p.numel() for p in weights.values())
    assert sum(int((p == 0).sum()) for p in weights.values()) >= round(0.4 * total)
    capfd.readouterr()


def test_two_processes_have_the_same_masks(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.callbacks.test_sparsity", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"snip gradient": [12, 5], "erk random": [12, 5]}
    # one process that sees both's pictures has the same masks of SNIP
    ours = torch.load(tmp_path / "snip gradient.pt", weights_only=True)
    module = SharedData()
    callback = DynamicSparsity(0.4, every_n_train_steps=None)
    fit(tmp_path, callback, module, accumulate_grad_batches=2, data=noise(24), max_steps=1)
    same = sum(int((callback.masks[name] == mask).sum()) for name, mask in ours.items())
    assert same >= TOTAL - 4  # sums in another order may turn around what is next to each other


class SharedData(Net):
    """Without what differs from process to process: statistics of a batch, dropout."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(dropout=0.0)
        self.net[1] = nn.GroupNorm(2, 8)

    def train_dataloader(self) -> DataLoader:
        pictures, (processes, rank) = list(noise(24).dataset), world()
        return DataLoader(pictures[rank::processes], 4)


def run_as_two_processes(folder: Path) -> None:
    found = {}
    for init, growth in (("snip", "gradient"), ("erk", "random")):
        callback = DynamicSparsity(0.4, init, growth, every_n_train_steps=2)  # type: ignore[arg-type]
        exact = Exact(callback)
        kwargs: dict[str, Any] = {"limit_val_batches": 0, "max_epochs": 1, "use_distributed_sampler": False}
        run = trainer(folder, callbacks=[callback, exact], strategy="ddp", devices=2, **kwargs)
        module = SharedData()
        run.fit(module)
        both = gathered((exact.history, module.state_dict()))
        for mine, theirs in zip(*(masks for masks, _ in both), strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in WEIGHTS)
        assert all(torch.equal(both[0][1][name], tensor) for name, tensor in both[1][1].items())
        found[f"{init} {growth}"] = [len(exact.history), len(exact.changes())]
        torch.save(exact.history[0], folder / f"{init} {growth}.pt")
    if run.is_global_zero:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_as_two_processes(Path(sys.argv[1]))
