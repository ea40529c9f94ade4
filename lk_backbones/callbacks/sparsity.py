"""Networks that are sparse from the first step on: weights held at zero, which change places while it trains."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lk_backbones._printing import printable
from lk_backbones._private.lightning import averaged_models
from lk_backbones._processes import broadcast_from_first
from lk_backbones.layers.sparsity import (
    apportion,
    choose_weights,
    exchange,
    lowest,
    pack_mask,
    plain_name,
    unpack_mask,
)
from lk_backbones.weights.errors import WeightsError, nearest, shorten

__all__ = ["DynamicSparsity"]

_NAME = "DynamicSparsity"


@dataclass(frozen=True, eq=False)
class _Layer:
    """A weight that is sparse: its name, the optimisers that train it, and where its averages are."""

    name: str
    parameter: nn.Parameter
    optimizers: tuple[int, ...]
    averages: tuple[nn.Parameter, ...]

    @property
    def group(self) -> int:
        """The optimiser whose steps count."""
        return self.optimizers[0]


class DynamicSparsity(L.Callback):
    """Train any LightningModule with a share of its weights at zero, pruned and grown again every so many steps.

    A share of the weights of all chosen layers together is zero from the first optimiser step on, after every step, and
    so in every checkpoint. Every ``every_n_train_steps`` steps each layer prunes some of its smallest weights and lets
    as many of its zeros grow, from zero, so that layers keep their numbers. This is sparse training as of SET, RigL and
    SLaK. Dense hardware multiplies by the zeros like by any number: the network becomes better for its parameters, not
    faster.

    The published settings of SLaK: sparsity 0.4, ``init="snip_densities"``, random growth, cosine; a prune rate of 0.5
    every 2000 steps (tiny) or 0.3 every 100 (small, base).

    Masks are in the checkpoint, and a resumed run goes on as an undisturbed one; it must have the same ``sparsity`` and
    layers, all else may differ. All processes have the same masks. Gradients of pruned weights are zeroed before they
    are clipped, and the optimiser's state of what was pruned or has grown is zero; so are Lightning's averages
    (`EMAWeightAveraging` and its like) of pruned weights, which makes the averaged network as sparse as the trained
    one. Names in the state dict stay as they are, so that using such a checkpoint needs no callback; torch's and
    Lightning's pruning change them, prune only, and keep no optimiser in step.

    What is frozen, or what no optimiser trains when training starts, stays dense. With several optimisers each one's
    layers are a network of their own: they have the sparsity for themselves, and that optimiser's steps count.
    ``trainer.fit`` called again with weights that have the callback's zeros goes on with its masks, else it starts
    anew.

    Args:
        sparsity: Share of zeros in the chosen layers' weights together, in [0, 1); ``None`` with ``init="weights"``.
        init: Which weights are zero first. ``"snip"`` (Lee et al., 2019): in the first step, those with the smallest
            ``|weight x gradient|`` of all; that step's batch is the one that the gradient is of, in all processes.
            ``"snip_densities"``: as many in each layer as SNIP would, at random, as SLaK's code does it. ``"erk"``:
            at random, layers' densities as of Erdős–Rényi kernels, in proportion to ``sum(shape) / prod(shape)``.
            ``"uniform"``: at random, the same in every layer. ``"weights"``: those that are zero already, to
            fine-tune a sparse network.
        growth: Which weights grow: ``"random"``, or those with the largest ``"gradient"`` of the dense weight (RigL).
        every_n_train_steps: Optimiser steps from one exchange to the next; ``None`` for masks that stay.
        prune_rate: Share of a layer's remaining weights that is pruned at first, in (0, 1]. A weight may grow again at
            once, so that fewer change.
        prune_rate_schedule: ``"cosine"``, down to ``min_prune_rate`` at ``end_step``, or ``"constant"``.
        min_prune_rate: End of the cosine, in [0, ``prune_rate``].
        end_step: Step from which on masks stay; ``None`` for the training's last.
        layers: Shell-style pattern or patterns of layers' or parameters' names, such as ``"*.large_kernel*"``; ``None``
            for all convolutions and linear layers, see `choose_weights`.
        exclude: Pattern or patterns of layers to leave dense.
        seed: Of what is random; ``None`` takes that of ``seed_everything``, or 0.

    Raises:
        ValueError: If an argument is out of its range; at the start of a training if a pattern matches no layer, if a
            layer has no weight left, or if the checkpoint's masks are not of these layers and this sparsity.
        RuntimeError: If the strategy shards parameters, or an optimiser cannot be followed.
    """

    def __init__(
        self,
        sparsity: float | None,
        init: Literal["snip", "snip_densities", "erk", "uniform", "weights"] = "snip",
        growth: Literal["random", "gradient"] = "random",
        every_n_train_steps: int | None = 2000,
        prune_rate: float = 0.5,
        prune_rate_schedule: Literal["cosine", "constant"] = "cosine",
        min_prune_rate: float = 0.005,
        end_step: int | None = None,
        layers: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        seed: int | None = None,
    ) -> None:
        _check_choice("init", init, ("snip", "snip_densities", "erk", "uniform", "weights"))
        _check_choice("growth", growth, ("random", "gradient"))
        _check_choice("prune_rate_schedule", prune_rate_schedule, ("cosine", "constant"))
        if (sparsity is None) != (init == "weights"):
            raise ValueError(
                f"sparsity={sparsity} with init='{init}': "
                + ("give a sparsity in [0, 1)" if sparsity is None else "the weights tell it, set sparsity=None")
            )
        if sparsity is not None and not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity} must be in [0, 1), 0.4 for 40 % zeros")
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps={every_n_train_steps} must be at least 1, or None for fixed masks")
        if not 0 < prune_rate <= 1 or not 0 <= min_prune_rate <= prune_rate:
            raise ValueError(
                f"prune_rate={prune_rate} must be in (0, 1] and min_prune_rate={min_prune_rate} in [0, prune_rate]"
            )
        if (end_step is not None and end_step < 1) or (seed is not None and seed < 0):
            raise ValueError(f"end_step={end_step} must be at least 1 and seed={seed} at least 0, if given")
        self.sparsity = sparsity
        self.init = init
        self.growth = growth
        self.every_n_train_steps = every_n_train_steps
        self.prune_rate = prune_rate
        self.prune_rate_schedule = prune_rate_schedule
        self.min_prune_rate = min_prune_rate
        self.end_step = end_step
        self.layers = [layers] if isinstance(layers, str) else layers
        self.exclude = [exclude] if isinstance(exclude, str) else (exclude or [])
        self.seed = seed
        # What a checkpoint keeps: masks by name, steps of each optimiser, the seed that the run began with.
        self._pruned: dict[str, Tensor] = {}
        self._steps: list[int] = []
        self._seed = 0
        # What lasts for one run of `fit`.
        self._layers: list[_Layer] = []
        self._factors: dict[str, Tensor] = {}
        self._optimizers: list[Optimizer] = []
        self._end = math.inf
        self._hooks: list[Any] = []
        self._prepared: set[int] = set()
        self._gradients: dict[str, Tensor] = {}
        self._news: dict[str, float] = {}
        self._saved: dict[str, Any] | None = None

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks by parameter name, bool, true where a weight is kept; empty until training has begun."""
        return {name: ~pruned for name, pruned in self._pruned.items()}

    # --- a run begins and ends ------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what an earlier run has read from its checkpoint."""
        self._saved = None
        self._release()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the layers and set their masks; those of SNIP have to wait for gradients."""
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise RuntimeError(
                f"{_NAME} needs whole parameters, and {type(trainer.strategy).__name__} shards them: use strategy='ddp'"
            )
        self._optimizers = trainer.optimizers
        self._layers = self._find_layers(trainer, pl_module)
        self._end = self._last_step(trainer)
        self._prepared, self._gradients, self._news = set(), {}, {}
        first = f"by init='{self.init}'" + (" in the first step" if self.init.startswith("snip") else "")
        if self._saved is not None:
            origin = "as in the checkpoint"
            self._restore(self._saved)
            origin = origin if self._pruned else first
        elif self._is_of_these_weights():
            origin = "as before"
            self._steps = [0] * len(self._optimizers) if trainer.global_step == 0 else self._steps
            self._set_all(self._pruned)
        else:
            origin = first
            self._pruned, self._steps = {}, [0] * len(self._optimizers)
            self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
            if not self.init.startswith("snip"):
                for group in range(len(self._optimizers)):
                    self._start(group, {})
        self._saved = None
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in self._optimizers]
        self._tell(origin)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log how sparse the network is."""
        self._log(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the optimisers; the masks stay, as a checkpoint may still be saved."""
        self._release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of optimisers and parameters."""
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._layers, self._optimizers, self._gradients, self._factors = [], [], [], {}, {}
        self._pruned = {name: pruned.cpu() for name, pruned in self._pruned.items()}

    def _find_layers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[_Layer]:
        chosen = choose_weights(pl_module, self.layers, self.exclude)
        trained: dict[nn.Parameter, list[int]] = {}
        for index, optimizer in enumerate(self._optimizers):
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                trained.setdefault(parameter, []).append(index)
        averaged = [dict(model.named_parameters()) for model in averaged_models(trainer.callbacks)]  # type: ignore[attr-defined]
        averaged = [{plain_name(name): p for name, p in parameters.items()} for parameters in averaged]
        layers = [
            _Layer(name, parameter, tuple(trained[parameter]), tuple(average[name] for average in averaged))
            for name, parameter in chosen.items()
            if parameter in trained
        ]
        if not layers:
            raise ValueError(f"no optimiser trains any of the {len(chosen)} layers that {_NAME} is to make sparse")
        return layers

    def _last_step(self, trainer: L.Trainer) -> float:
        if self.end_step is not None or self.every_n_train_steps is None:
            return self.end_step or math.inf
        end = trainer.estimated_stepping_batches
        if math.isinf(end) and self.prune_rate_schedule == "cosine":
            raise ValueError(
                "the prune rate's cosine needs an end and this training has none: set end_step, the trainer's "
                "max_epochs or max_steps, or prune_rate_schedule='constant'"
            )
        return end

    def _tell(self, origin: str) -> None:
        total = sum(layer.parameter.numel() for layer in self._layers)
        if self._pruned:
            zeros = sum(int(pruned.sum()) for pruned in self._pruned.values())
            self._news = {"sparsity/overall": zeros / total}
        else:
            zeros = sum(self._zeros_of(group) for group in range(len(self._optimizers)))
        last = "" if math.isinf(self._end) else f" until step {self._end:g}"
        every = self.every_n_train_steps
        change = "they stay the same" if every is None else f"some change places every {every} steps{last}"
        rank_zero_info(
            f"{_NAME}: {zeros:,} of the {total:,} weights of {len(self._layers)} layers ({zeros / total:.1%}) are held "
            f"at zero, {origin}; {change}."
        )

    # --- masks ----------------------------------------------------------------------------------------------------

    def _of_group(self, group: int) -> list[_Layer]:
        return [layer for layer in self._layers if layer.group == group]

    def _zeros_of(self, group: int) -> int:
        """How many weights of an optimiser's layers shall be zero."""
        return round((self.sparsity or 0) * sum(layer.parameter.numel() for layer in self._of_group(group)))

    def _random(self, layer: _Layer, step: int) -> Tensor:
        """Random numbers of a layer's shape, which depend on nothing but the run's seed, the layer and the step."""
        entropy = (self._seed, step, *layer.name.encode())
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
        device = layer.parameter.device
        return torch.rand(layer.parameter.shape, generator=torch.Generator(device).manual_seed(seed), device=device)

    @torch.no_grad()
    def _start(self, group: int, saliency: Mapping[str, Tensor]) -> None:
        """Choose the first zeros of an optimiser's layers."""
        layers, zeros = self._of_group(group), self._zeros_of(group)
        sizes = [layer.parameter.numel() for layer in layers]
        if self.init == "weights":
            masks = [(layer.parameter == 0).contiguous() for layer in layers]
        elif self.init.startswith("snip"):
            every = lowest(torch.cat([saliency[layer.name].flatten() for layer in layers]), zeros).split(sizes)
            masks = [mask.view(layer.parameter.shape) for mask, layer in zip(every, layers, strict=True)]
        else:
            shares = sizes if self.init == "uniform" else [sum(layer.parameter.shape) for layer in layers]
            kept = apportion(sum(sizes) - zeros, shares, sizes)
            masks = [
                lowest(self._random(layer, 0), size - number)
                for layer, size, number in zip(layers, sizes, kept, strict=True)
            ]
        if self.init == "snip_densities":
            masks = [lowest(self._random(layer, 0), int(m.sum())) for layer, m in zip(layers, masks, strict=True)]
        empty = [layer.name for layer, mask in zip(layers, masks, strict=True) if mask.all()]
        if empty:
            others = "" if self.init in ("erk", "weights") else ", init='erk', which spares small layers"
            raise ValueError(
                f"with sparsity={self.sparsity} and init='{self.init}' no weight is left in {len(empty)} of "
                f"{len(layers)} layers, such as {printable(empty[0])}: a lower sparsity{others}, or exclude=… them"
            )
        for layer, mask in zip(layers, masks, strict=True):
            self._set(layer, mask)

    def _saliency(self, trainer: L.Trainer, group: int) -> dict[str, Tensor]:
        """SNIP's scores of an optimiser's layers; none if a gradient has overflown and the step will be skipped."""
        layers = self._of_group(group)
        without = [layer.name for layer in layers if layer.parameter.grad is None]
        if without:
            raise ValueError(
                f"no gradient reaches {len(without)} of {len(layers)} layers in the first step, such as "
                f"{printable(without[0])}, and SNIP needs one: exclude=… them, or init='erk'"
            )
        scores = {
            layer.name: (layer.parameter * layer.parameter.grad).abs().float()  # type: ignore[operator]
            for layer in layers
        }
        infinite = next((name for name, score in scores.items() if not score.isfinite().all()), None)
        if infinite is None:
            return scores
        if _scaler(trainer) is None:
            raise ValueError(f"the first step's gradient of {printable(infinite)} is not finite, and SNIP needs it")
        return {}

    def _has_started(self, group: int) -> bool:
        return all(layer.name in self._pruned for layer in self._of_group(group))

    @torch.no_grad()
    def _set(self, layer: _Layer, pruned: Tensor) -> int:
        """Give a layer a mask, the same in all processes, and start what has changed from zero; return how many."""
        broadcast_from_first(pruned)
        before = self._pruned.get(layer.name)
        changed = pruned if before is None else pruned ^ before
        self._pruned[layer.name] = pruned
        self._factors[layer.name] = (~pruned).view(torch.uint8)  # multiplying is the fastest way to apply a mask
        layer.parameter.masked_fill_(pruned, 0)
        for average in layer.averages:
            average.masked_fill_(pruned.to(average.device), 0)
        for index in layer.optimizers:
            for state in self._optimizers[index].state.get(layer.parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == pruned.shape:
                    state.masked_fill_(changed.to(state.device), 0)
        return int(changed.sum())

    def _set_all(self, masks: Mapping[str, Tensor]) -> None:
        self._pruned = {}
        for layer in self._layers:
            if layer.name in masks:
                self._set(layer, masks[layer.name].to(layer.parameter.device))

    def _is_of_these_weights(self) -> bool:
        """Return whether the masks of an earlier run are of these layers, and their weights have its zeros."""
        if self._pruned.keys() != {layer.name for layer in self._layers} or len(self._steps) != len(self._optimizers):
            return False
        pairs = [(layer.parameter, self._pruned[layer.name].to(layer.parameter.device)) for layer in self._layers]
        return all(p.shape == pruned.shape and not p.detach()[pruned].any() for p, pruned in pairs)

    # --- steps ----------------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradients of pruned weights; before the first step, let SNIP choose them."""
        group = next((i for i, own in enumerate(self._optimizers) if own is optimizer), None)
        if group is None:
            return
        self._prepared.add(group)
        if not self._has_started(group):
            scores = self._saliency(trainer, group)
            if not scores:
                return
            self._start(group, scores)
            self._news = {"sparsity/overall": self._overall()}
        layers = [(layer, layer.parameter.grad) for layer in self._layers if group in layer.optimizers]
        grows = self.growth == "gradient" and self._is_due(group, self._steps[group] + 1)
        for layer, gradient in layers:
            if gradient is None or layer.name not in self._pruned:
                continue
            if grows and layer.group == group:
                self._gradients[layer.name] = gradient.detach().abs().float().nan_to_num(nan=0, posinf=0)
            gradient.detach().mul_(self._factors[layer.name])

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Zero the pruned weights, whatever the optimiser did to them, and exchange some when it is time."""
        group = next(i for i, own in enumerate(self._optimizers) if own is optimizer)
        if group not in self._prepared:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was called past Lightning, so {_NAME} did not see its gradients: "
                f"take optimisers from self.optimizers()"
            )
        self._prepared.discard(group)
        if not self._has_started(group):
            return  # an optimiser that skips steps by itself was told to
        for layer in self._layers:
            if group in layer.optimizers and layer.name in self._pruned:
                layer.parameter.mul_(self._factors[layer.name])
        self._steps[group] += 1
        if self._is_due(group, self._steps[group]):
            self._exchange(group)

    def _is_due(self, group: int, step: int) -> bool:
        every = self.every_n_train_steps
        return every is not None and step % every == 0 and step < self._end and bool(self._of_group(group))

    def _rate(self, step: int) -> float:
        if self.prune_rate_schedule == "constant":
            return self.prune_rate
        falling = (1 + math.cos(math.pi * step / self._end)) / 2
        return self.min_prune_rate + (self.prune_rate - self.min_prune_rate) * falling

    def _exchange(self, group: int) -> None:
        step, changed = self._steps[group], 0
        rate = self._rate(step)
        for layer in self._of_group(group):
            weight, pruned = layer.parameter, self._pruned[layer.name]
            scores = self._gradients.pop(layer.name, None)
            if not weight.requires_grad or weight.grad is None or (scores is None and self.growth == "gradient"):
                continue  # frozen meanwhile, or without a part in this step
            number = math.ceil(rate * (weight.numel() - int(pruned.sum())))
            scores = self._random(layer, step) if scores is None else scores
            changed += self._set(layer, exchange(weight, pruned, number, scores))
        self._news = {
            "sparsity/overall": self._overall(),
            "sparsity/pruned": changed // 2,
            "sparsity/regrown": changed // 2,
            "sparsity/prune_rate": rate,
        }

    def _overall(self) -> float:
        masks = self._pruned.values()
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what has changed."""
        if self._prepared and _scaler(trainer) is None:
            optimizer = type(self._optimizers[min(self._prepared)]).__name__
            raise RuntimeError(
                f"{optimizer} has taken a step without calling torch's hooks for it (Optimizer.register_step_post_hook)"
                f", so {_NAME} cannot keep weights at zero: use the optimiser that it wraps"
            )
        self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        if self._news:
            for logger in trainer.loggers:
                logger.log_metrics(self._news, step=trainer.global_step)
            self._news = {}

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return masks as packed bits, with the steps and the seed; nothing before a training has begun."""
        if not self._steps:
            return {}
        masks = {name: pack_mask(pruned) for name, pruned in self._pruned.items()}
        return {"sparsity": self.sparsity, "seed": self._seed, "steps": list(self._steps), "masks": masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint, to be checked when training starts."""
        self._saved = state_dict
        if self._layers:  # a tuner that puts everything back within a run
            self._restore(state_dict)
            self._saved = None

    def _restore(self, state: object) -> None:
        """Check a checkpoint's state and take it over; or nothing of it."""
        where = f"the checkpoint's state of {_NAME}"
        if not isinstance(state, dict) or not {"sparsity", "seed", "steps", "masks"} <= state.keys():
            raise WeightsError(f"{where} is {shorten(state)}, not one that it has saved")
        sparsity, seed, steps, saved = (state[key] for key in ("sparsity", "seed", "steps", "masks"))
        if sparsity != self.sparsity:
            raise WeightsError(
                f"{where} is of sparsity={shorten(sparsity)}, this run's is {self.sparsity}: resume with the former, "
                f"or start a new run from the checkpoint's weights"
            )
        if type(seed) is not int or seed < 0:
            raise WeightsError(f"{where}: seed={shorten(seed)} must be an integer of 0 or more")
        if not isinstance(steps, list) or not all(type(step) is int and step >= 0 for step in steps):
            raise WeightsError(f"{where}: steps={shorten(steps)} must be the steps of each optimiser")
        if len(steps) != len(self._optimizers):
            raise WeightsError(f"{where} is of {len(steps)} optimisers, this run has {len(self._optimizers)}")
        if not isinstance(saved, dict):
            raise WeightsError(f"{where}: masks={shorten(saved)} must be masks by name")
        known = {layer.name: layer for layer in self._layers}
        # SNIP may have seen the gradients of one optimiser, and not yet those of another
        late = {n for n, layer in known.items() if not steps[layer.group] and self.init.startswith("snip")}
        surplus, missing = [n for n in saved if n not in known], [n for n in known if n not in saved and n not in late]
        if surplus or missing:
            name = (surplus or missing)[0]
            raise WeightsError(
                f"{where} has {len(saved)} masks for the {len(known)} layers of this run: there is "
                + (f"no layer {shorten(name)}{nearest(str(name), known)}" if surplus else f"none for {shorten(name)}")
                + "; resume with the same layers and exclude"
            )
        masks = {}
        for name, mask in saved.items():
            try:
                masks[name] = unpack_mask(mask, known[name].parameter.shape)
            except ValueError as error:
                raise WeightsError(f"{where}: the mask of {name} {error}") from error
        for group in range(len(self._optimizers)):
            own = [masks[layer.name] for layer in self._of_group(group) if layer.name in masks]
            zeros, expected = sum(int(mask.sum()) for mask in own), self._zeros_of(group)
            if any(mask.all() for mask in own) or (own and self.sparsity is not None and zeros != expected):
                raise WeightsError(
                    f"{where} holds {zeros} zeros instead of {expected}, or a layer without weights: it was altered"
                )
        self._seed, self._steps = seed, list(steps)
        self._set_all(masks)


def _scaler(trainer: L.Trainer) -> Any:
    """Return the gradient scaler of mixed precision in 16 bits, which skips steps; ``None`` where there is none."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={shorten(value)} must be one of {', '.join(choices)}{nearest(str(value), choices)}")
