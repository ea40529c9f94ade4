"""Measuring ahead which path of the depthwise convolution is fastest for the layers of a model, on a GPU."""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lk_backbones.analysis.speed import inference_run, training_run
from lk_backbones.layers import reparameterize
from lk_backbones.ops import Choice, is_measured, measure_again, measured_choices, recorded_choices

__all__ = ["Tuned", "tune"]

# Steps of a training: the gradients of the first ones may be zero or not finite, which lets nothing be decided.
STEPS = 3


@dataclass(frozen=True)
class Tuned:
    """What is known about the layers of a model.

    Attributes:
        choices: What was chosen, by class of problems; see `lk_backbones.ops.measured_choices`.
        measured: How many of these classes were measured now; the others were known.
        seconds: How long it took, the model's own work included.
    """

    choices: dict[str, Choice]
    measured: int
    seconds: float


def tune(
    model: nn.Module,
    size: tuple[int, int] = (224, 224),
    batch_size: int = 64,
    *,
    channels: int = 3,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    memory_format: torch.memory_format = torch.contiguous_format,
    training: bool = True,
    again: bool = False,
) -> Tuned:
    """Run a model so that every depthwise convolution in it is measured, and remembered for other processes.

    Args:
        model: Any model; it is copied.
        size: ``(height, width)`` of the images.
        batch_size: Number of images.
        channels: Of the images.
        device: A CUDA device.
        dtype: Training runs under autocast if it is a lower precision; inference casts the weights.
        memory_format: Of the images and the weights.
        training: Whether gradients are measured too.
        again: Whether what is known is measured once more.

    Raises:
        ValueError: If nothing is measured on the device, or the environment variable forbids it.
        torch.OutOfMemoryError: If the model does not fit with that many images.
    """
    device = torch.device(device)
    images = torch.randn(batch_size, channels, *size).to(device, memory_format=memory_format)
    if not is_measured(images):
        setting = os.environ.get("LK_BACKBONES_DEPTHWISE") or "auto"
        deterministic = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
        asked = " and deterministic algorithms asked for" if deterministic else ""
        raise ValueError(
            f"nothing would be measured on {device} with LK_BACKBONES_DEPTHWISE={setting}{asked}: that is for CUDA "
            "devices and auto; elsewhere a rule decides"
        )
    start, before = time.perf_counter(), {} if again else measured_choices()
    if again:
        measure_again()
    lower = dtype if dtype != torch.float32 else None
    with recorded_choices() as choices:
        if training:
            trained: Any = copy.deepcopy(model)
            trained = trained.to(device, memory_format=memory_format)
            for _ in range(STEPS):
                training_run(trained, images, lower)()
            del trained
        folded: Any = reparameterize(copy.deepcopy(model).eval(), inplace=True)
        folded = folded.to(dtype).to(device, memory_format=memory_format)
        inference_run(folded, images.to(dtype))()
    seconds = time.perf_counter() - start
    return Tuned(choices, len(choices.keys() - before.keys()), seconds)
