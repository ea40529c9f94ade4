"""What a depthwise convolution will do for a given shape, and why."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lk_backbones._private.torch import functorch_is_active, uses_forward_gradients

Method = Literal["auto", "lookup", "rule", "direct", "fft", "native", "triton", "cudnn", "aten"]

METHODS: tuple[str, ...] = get_args(Method)
ENVIRONMENT_VARIABLE = "LK_BACKBONES_DEPTHWISE"


@dataclass(frozen=True)
class Plan:
    """The paths that a depthwise convolution takes.

    Paths are ``"direct"`` (CPU: in the spatial domain, arranged for speed), ``"fft"`` (through Fourier transforms),
    ``"native"`` (PyTorch's own operator, as it runs without this package), for packed weights on CPUs ``"bands"``
    (products with band matrices) and, on CUDA devices, ``"triton"`` (products on tensor cores; with a suffix, cut up in
    another way), ``"cudnn"`` and ``"aten"`` (PyTorch's operator, told which of its two libraries to use) and
    ``"native-contiguous"`` and ``"native-channels_last"`` (PyTorch's operator in the other memory format).

    Attributes:
        forward: Path of the output.
        input_gradient: Path of the gradient of the input.
        weight_gradient: Path of the gradient of the weight.
        reason: Why, in words.
        milliseconds: Where paths were timed on this device: for ``"forward"``, ``"input_gradient"`` and
            ``"weight_gradient"`` the time of each path.
    """

    forward: str
    input_gradient: str
    weight_gradient: str
    reason: str
    milliseconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False)

    @property
    def backward(self) -> str:
        """Path of both gradients; two names with a plus if they differ."""
        paths = dict.fromkeys((self.input_gradient, self.weight_gradient))
        return "+".join(paths)

    def __str__(self) -> str:
        if self.input_gradient == self.weight_gradient:
            backward = f"backward {self.input_gradient}"
        else:
            backward = f"input gradient {self.input_gradient}, weight gradient {self.weight_gradient}"
        lines = [f"forward {self.forward}, {backward}: {self.reason}"]
        for kind, times in self.milliseconds.items():
            measured = ", ".join(f"{path} {time:.3f}" for path, time in sorted(times.items(), key=lambda item: item[1]))
            lines.append(f"  {kind.replace('_', ' ')}, ms: {measured}")
        return "\n".join(lines)


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
