"""What the arguments may be that every task has."""

from collections import Counter
from typing import Any

from lk_backbones.tasks.encoder import check_enlargement
from lk_backbones.weights.errors import shorten
from lk_backbones.weights.saved import require_finite

__all__ = ["check_shared_arguments"]


def check_shared_arguments(hparams: Any, least_classes: int, why: str) -> None:
    """Refuse impossible values of the arguments that every task has, before anything is built.

    Args:
        hparams: A task's arguments by name.
        least_classes: Smallest number of classes.
        why: What to say of it.

    Raises:
        ValueError: With the argument's name and what would be right.
    """
    require_finite(hparams)
    num_classes = hparams["num_classes"]
    if num_classes < least_classes:
        raise ValueError(f"num_classes={num_classes} must be at least {least_classes} ({why})")
    for key in ("class_names", "class_colors"):
        values = hparams[key]
        if values is not None and len(values) != num_classes:
            raise ValueError(f"{key} has {len(values)} entries, but num_classes={num_classes}")
    twice = sorted(name for name, count in Counter(hparams["class_names"] or []).items() if count > 1)
    if twice:
        raise ValueError(f"class_names must differ, got {shorten(twice)} twice")
    check_enlargement(hparams.get("enlarge_kernels"))
    for key in ("lr", "layer_decay", "encoder_lr_scale"):
        if hparams.get(key, 1) <= 0:
            raise ValueError(f"{key}={hparams[key]} must be positive")
    for key in ("weight_decay", "bias_weight_decay", "momentum", "power", "min_lr", "gamma"):
        if (hparams.get(key) or 0) < 0:
            raise ValueError(f"{key}={hparams[key]} must be at least 0")
    if hparams["warmup_steps"] < 0 or not 0 <= hparams["warmup_ratio"] <= 1:
        raise ValueError(
            f"warmup_steps={hparams['warmup_steps']} must be at least 0 and "
            f"warmup_ratio={hparams['warmup_ratio']} in [0, 1]"
        )
    if hparams["optimizer"] not in ("adamw", "sgd"):
        raise ValueError(f"optimizer='{hparams['optimizer']}' must be one of adamw, sgd")
    if hparams["layer_decay_type"] not in ("layer_wise", "stage_wise"):
        raise ValueError(f"layer_decay_type='{hparams['layer_decay_type']}' must be one of layer_wise, stage_wise")
    milestones = list(hparams.get("milestones") or [])
    if milestones != sorted(set(milestones)) or min(milestones, default=1) <= 0:
        raise ValueError(f"milestones={milestones} must be epochs in ascending order, counted from 1")
