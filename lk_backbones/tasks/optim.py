"""Parameter groups and the learning-rate schedule that every task shares.

The published recipes (RepLKNet paper, section 4; OpenMMLab configurations): AdamW without weight decay on norms,
learning rates that shrink from the head down to the stem, linear warm-up into a polynomial decay (segmentation), into
drops after some epochs (detection) or into a cosine (classification), per step.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LinearLR, LRScheduler, MultiStepLR

from lk_backbones.layers.enlarge import original_name
from lk_backbones.tasks.encoder import timm_model, timm_names

__all__ = [
    "encoder_lr_scales",
    "parameter_groups",
    "warmup_cosine",
    "warmup_cosine_scheduler",
    "warmup_poly",
    "warmup_poly_scheduler",
    "warmup_step_scheduler",
]


def encoder_lr_scales(
    encoder: nn.Module,
    layer_decay: float,
    kwargs: dict[str, Any] | None = None,
    layer_decay_type: str = "layer_wise",
    lr_scale: float = 1.0,
) -> tuple[dict[str, float], set[str]]:
    """Learning-rate scales of an encoder's parameters, through the ``group_matcher`` of its timm model.

    A parameter in the n-th layer below the head gets ``lr_scale * layer_decay ** n``, as in
    `timm.optim.param_groups_layer_decay`; the head itself, everything outside of the encoder, is layer 0 and gets 1. So
    do norms that only a dense task has, where the model counts them to the head.

    Args:
        encoder: An smp encoder.
        layer_decay: Factor from one layer to the next one below, 1 for no decay.
        kwargs: Keyword arguments that the encoder was built with.
        layer_decay_type: ``"layer_wise"``, or ``"stage_wise"`` for whole stages as layers, timm's ``coarse`` groups.
        lr_scale: Factor of all layers but the head.

    Returns:
        Scale by parameter name, and the names that the model itself exempts from weight decay.

    Raises:
        ValueError: If ``layer_decay`` is not 1 and the encoder is not a timm model or has no ``group_matcher``.
    """
    parameters = [name for name, _ in encoder.named_parameters()]
    all_alike = {} if lr_scale == 1 else dict.fromkeys(parameters, lr_scale)
    try:
        full: Any = timm_model(encoder, kwargs or {})
    except ValueError as error:
        if layer_decay == 1:
            return all_alike, set()
        raise ValueError(
            f"layer_decay={layer_decay} needs to know the encoder's layers, and only timm models tell them: use a "
            f"'tu-…' encoder or one of lk_backbones instead of {type(encoder).__name__}, or layer_decay=1"
        ) from error
    # an enlarged kernel, which timm's model does not have, goes with the kernel it was made of
    names = {name: original_name(full_name) for name, full_name in timm_names(encoder, full).items()}
    exempt_in_full = set(full.no_weight_decay()) if hasattr(full, "no_weight_decay") else set()
    exempt = {name for name, full_name in names.items() if full_name in exempt_in_full}
    if layer_decay == 1 and (lr_scale == 1 or not hasattr(full, "group_matcher")):
        return all_alike, exempt
    if not hasattr(full, "group_matcher"):
        raise ValueError(f"layer_decay={layer_decay}: the timm model '{encoder.name}' has no group_matcher; use 1")
    layers = group_parameters(full, full.group_matcher(coarse=layer_decay_type == "stage_wise"), reverse=True)
    head = max(layers.values())
    below = {n: head - layers[full_n] for n, full_n in names.items() if n in parameters}
    return {name: lr_scale * layer_decay**depth if depth else 1.0 for name, depth in below.items()}, exempt


def parameter_groups(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    lr_scales: dict[str, float] | None = None,
    no_decay: set[str] | None = None,
    bias_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Sort a module's trainable parameters into optimiser groups.

    Args:
        module: The module to train; parameters with ``requires_grad=False`` are left out.
        lr: Learning rate of parameters with scale 1.
        weight_decay: Weight decay of matrices and kernels. Norms and other vectors, such as layer scales, get none.
        lr_scales: Scale of the learning rate by parameter name; 1 where not given.
        no_decay: Further names without weight decay, such as position biases.
        bias_weight_decay: Weight decay of biases outside of norms; ``None`` for ``weight_decay``.

    Returns:
        Groups for a torch optimiser, lowest learning rate first, each with ``params``, ``lr``, ``weight_decay`` and a
        ``name`` (which Lightning's ``LearningRateMonitor`` shows).

    Raises:
        ValueError: If nothing is trainable.
    """
    of_norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if _is_norm(layer)
        for name, _ in layer.named_parameters(recurse=False)
    }
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = (lr_scales or {}).get(name, 1.0)
        decay = 0.0
        if name not in of_norms and name not in (no_decay or set()):
            if parameter.ndim > 1:
                decay = weight_decay
            elif name.endswith("bias"):  # "bias", and the "in_proj_bias" or "q_bias" of an attention
                decay = weight_decay if bias_weight_decay is None else bias_weight_decay
        kind = {weight_decay: "decay", 0.0: "no_decay"}.get(decay, "bias_decay")
        group = groups.setdefault(
            (scale, decay),
            {"params": [], "lr": lr * scale, "weight_decay": decay, "name": f"scale_{scale:.4g}_{kind}"},
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("there is no trainable parameter")
    return [groups[key] for key in sorted(groups)]


def _is_norm(layer: nn.Module) -> bool:
    """Return whether a layer normalises: its class or a base of it says so, as in torch, timm and torchvision."""
    return any("norm" in base.__name__.lower() for base in type(layer).__mro__)


def warmup_poly(
    step: int, total_steps: int, warmup_steps: int, warmup_ratio: float, power: float, min_factor: float
) -> float:
    """Factor of the learning rate at a step: polynomial decay, multiplied by a linear ramp during the warm-up.

    With ``progress = step / total_steps`` the decay is ``(1 - min_factor) * (1 - progress)**power + min_factor``; the
    ramp goes from ``warmup_ratio`` at step 0 to 1 at ``warmup_steps``. The same formula as OpenMMLab's ``poly`` policy
    with ``warmup="linear"``.

    Args:
        step: Optimiser steps taken so far.
        total_steps: Optimiser steps of the whole training.
        warmup_steps: Length of the warm-up.
        warmup_ratio: Ramp at step 0.
        power: Exponent of the decay; 0 for a constant rate.
        min_factor: Factor at the end.

    Returns:
        The factor.
    """
    decay = (1 - min_factor) * (1 - min(step, total_steps) / total_steps) ** power + min_factor
    return decay * _ramp(step, warmup_steps, warmup_ratio)


def _ramp(step: int, warmup_steps: int, warmup_ratio: float) -> float:
    return 1.0 if step >= warmup_steps else 1 - (1 - step / warmup_steps) * (1 - warmup_ratio)


def warmup_poly_scheduler(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_ratio: float = 1e-6,
    power: float = 1.0,
    min_factor: float = 0.0,
) -> LambdaLR:
    """`warmup_poly` as a scheduler, to be stepped after every optimiser step. Arguments as there."""
    # Not torch's PolynomialLR: it ends at 0 only, which min_factor need not be. It also multiplies its way down: over
    # the 160 000 steps of the ADE20K recipes its rates come to differ from the formula by up to 1.7e-12.
    factor = partial(
        warmup_poly,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        warmup_ratio=warmup_ratio,
        power=power,
        min_factor=min_factor,
    )
    return LambdaLR(optimizer, factor)


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, warmup_ratio: float, min_factor: float) -> float:
    """Factor of the learning rate at a step: a linear ramp, then half a cosine over the rest of the training.

    The schedule of ConvNeXt's ImageNet training, which RepLKNet, SLaK, PeLK and UniRepLKNet took over.

    Args:
        step: Optimiser steps taken so far.
        total_steps: Optimiser steps of the whole training.
        warmup_steps: Length of the warm-up.
        warmup_ratio: Ramp at step 0.
        min_factor: Factor at the end.

    Returns:
        The factor.
    """
    if step < warmup_steps:
        return _ramp(step, warmup_steps, warmup_ratio)
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return min_factor + (1 - min_factor) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine_scheduler(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_ratio: float = 1e-6,
    min_factor: float = 0.0,
) -> LambdaLR:
    """`warmup_cosine` as a scheduler, to be stepped after every optimiser step. Arguments as there."""
    # Not torch's LinearLR and CosineAnnealingLR: the latter ends at one rate for all groups, and with layer decay each
    # ends at its own share of it. timm's CosineLRScheduler likewise, and it is no scheduler that Lightning steps.
    factor = partial(
        warmup_cosine,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        warmup_ratio=warmup_ratio,
        min_factor=min_factor,
    )
    return LambdaLR(optimizer, factor)


def warmup_step_scheduler(
    optimizer: torch.optim.Optimizer,
    milestones: Sequence[int],
    gamma: float = 0.1,
    warmup_steps: int = 0,
    warmup_ratio: float = 1e-6,
) -> LRScheduler:
    """Drop the learning rate at every milestone, and multiply it by a linear ramp during the warm-up.

    OpenMMLab's ``step`` policy with ``warmup="linear"``. To be stepped after every optimiser step.

    Args:
        optimizer: The optimiser.
        milestones: Optimiser steps after which the rate is multiplied by ``gamma``.
        gamma: Factor of every drop.
        warmup_steps: Length of the warm-up.
        warmup_ratio: Ramp at step 0; it is 1 at ``warmup_steps``.
    """
    schedulers: list[LRScheduler] = [MultiStepLR(optimizer, list(milestones), gamma)]
    if warmup_steps:
        # LinearLR multiplies its way up, and so could not leave 0
        schedulers.append(LinearLR(optimizer, max(warmup_ratio, 1e-200), 1.0, warmup_steps))
    return ChainedScheduler(schedulers)
