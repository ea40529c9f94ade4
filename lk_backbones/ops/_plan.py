"""What a depthwise convolution will do for a given shape, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lk_backbones._private.torch import functorch_is_active, uses_forward_gradients

Method = Literal["auto", "direct", "fft", "native"]

METHODS: tuple[str, ...] = get_args(Method)
ENVIRONMENT_VARIABLE = "LK_BACKBONES_DEPTHWISE"


@dataclass(frozen=True)
class Plan:
    """The paths that a depthwise convolution takes.

    Attributes:
        forward: Path of the output: ``"direct"`` (in the spatial domain, arranged for speed), ``"fft"`` (through
            Fourier transforms), ``"native"`` (PyTorch's own operator, as it runs without this package) or, for packed
            weights only, ``"bands"`` (products with band matrices).
        backward: Path of both gradients.
        reason: Why, in words.
    """

    forward: str
    backward: str
    reason: str

    def __str__(self) -> str:
        return f"forward {self.forward}, backward {self.backward}: {self.reason}"


def resolve_method(method: str) -> str:
    """Return the method that counts: the argument's, or the environment variable's where the argument leaves it open.

    Raises:
        ValueError: If the argument or the environment variable names no method.
    """
    source = "method"
    if method == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        source, method = f"environment variable {ENVIRONMENT_VARIABLE}", os.environ[ENVIRONMENT_VARIABLE]
    if method not in METHODS:
        raise ValueError(f"{source} must be one of {', '.join(METHODS)}, got {method!r}")
    return method


def operand_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution or a matrix product takes a tensor: autocast's, where that is on."""
    dtype, device = tensor.dtype, tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) if dtype.is_floating_point and dtype != torch.float64 else dtype
    return dtype


def wants_plain_convolution(*tensors: Tensor) -> bool:
    """Return whether something is at work that must see PyTorch's own operator.

    Exporters and tracers (each of ONNX's exporters is one of them), whose results run elsewhere. Function transforms
    and forward-mode AD, in which registered operators do not take part: the latter would silently treat the output as
    a constant.
    """
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_exporting()
        or functorch_is_active()
        or uses_forward_gradients(tensors)
    )
