"""Depthwise 2-D convolution for large kernels: the one public op."""

from __future__ import annotations

import torch
from torch import Tensor

from lk_backbones._private.torch import operators_are_watched
from lk_backbones.ops import _operators, _paths
from lk_backbones.ops._plan import METHODS, Method, Plan, operand_dtype, wants_plain_convolution

__all__ = ["Plan", "depthwise_conv2d", "depthwise_conv2d_and_more", "explain", "has_fused_depthwise"]


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: int | tuple[int, int] = 1,
    method: Method = "auto",
) -> Tensor:
    """Depthwise convolution with stride 1 and zero padding that keeps the map's size, fast for large kernels.

    The same numbers as ``torch.nn.functional.conv2d(input, weight, bias, padding="same", dilation=dilation,
    groups=C)`` up to float rounding, on every device. Half precision is added up in float32 and rounded once.
    Results are deterministic on CPUs. On CUDA devices the first call for a class of shapes measures which path is
    fastest there (`explain` tells), which is remembered; see docs/depthwise.md.

    Two things see PyTorch's own convolution instead: exporters and tracers (``torch.export``, ONNX, TorchScript), so
    that exported models run without this package, and function transforms (``torch.func``, forward-mode AD).

    A NaN or an infinity in the input reaches the outputs whose window covers it; on the ``"fft"`` path it reaches the
    whole map of that image and channel, and rounding errors are relative to the largest value of that map; on the
    ``"triton"`` paths it reaches all of the tiles whose windows cover it.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, floating point. The result is in its memory format.
        weight: ``(C, 1, kH, kW)``, odd sizes, of the input's dtype and device. May be larger than the map.
        bias: ``(C,)`` or ``None``.
        dilation: Distance between the taps in pixels, for both axes or for ``(rows, columns)``.
        method: ``"auto"`` chooses by shape and device (see `explain`), on CUDA devices by what was measured there,
            measuring what is new; ``"lookup"`` measures nothing and ``"rule"`` goes by nothing measured. ``"fft"`` and
            ``"native"`` insist on a path, and so does ``"direct"`` on CPUs and do ``"triton"``, ``"cudnn"`` and
            ``"aten"`` on CUDA devices; where the device or dtype lacks it, the rule decides. The environment variable
            ``LK_BACKBONES_DEPTHWISE`` takes the place of ``"auto"``.

    Returns:
        Tensor of the input's shape and dtype. Under autocast, the dtype that autocast gives a convolution.

    Raises:
        ValueError: If shapes, dtypes, devices, dilation or method do not fit.
    """
    dilation = _operators.pair(dilation)
    if wants_plain_convolution(input, weight):
        return _operators.native(input, weight, bias, dilation)
    input, weight = input.to(operand_dtype(input)), weight.to(operand_dtype(weight))
    bias = None if bias is None else bias.to(operand_dtype(bias))
    _check(input, weight, bias, method)
    device = _paths.device_type(input)
    if method == "native" or (method == "auto" and _paths.native_is_best(device, weight, dilation)):
        return _operators.native(input, weight, bias, dilation)
    if input.dim() == 3:
        return depthwise_conv2d(input.unsqueeze(0), weight, bias, dilation, method).squeeze(0)
    wants_gradient = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    inference = not (wants_gradient or torch.compiler.is_compiling() or device == "cuda")
    if inference and _paths.plan_for(input, weight, dilation, method, device).forward == "native":
        return _operators.native(input, weight, bias, dilation)
    return _operators.apply(input, weight, bias, dilation, method)


def has_fused_depthwise(input: Tensor, *tensors: Tensor | None) -> bool:
    """Return whether `depthwise_conv2d_and_more` saves anything here and can stand in for its parts.

    It has no gradient, and nothing that looks at operators one by one knows it; what it saves is on CUDA devices.

    Args:
        input: ``(N, C, H, W)``.
        *tensors: What else it is given.
    """
    given = [input, *(tensor for tensor in tensors if tensor is not None)]
    return (
        _paths.device_type(input) == "cuda"
        and input.dim() == 4
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in given)
        and len({operand_dtype(tensor) for tensor in given}) == 1
        and not operators_are_watched()
        and not wants_plain_convolution(*given)
    )


def depthwise_conv2d_and_more(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    relu: bool = False,
    dilation: int | tuple[int, int] = 1,
    method: Method = "auto",
) -> Tensor:
    """`depthwise_conv2d`, then a sum and a ReLU, for inference: in one pass over the output where tensor cores do it.

    Args:
        input: ``(N, C, H, W)``, floating point. The result is in its memory format.
        weight: As `depthwise_conv2d`.
        bias: ``(C,)`` or ``None``.
        addend: ``(N, C, H, W)`` to be added, such as the sum of other branches, or ``None``.
        relu: Whether negative values become zero.
        dilation: As `depthwise_conv2d`.
        method: As `depthwise_conv2d`.

    Returns:
        Tensor of the input's shape and dtype, under autocast of the dtype that autocast gives a convolution. No
        gradient flows through it.

    Raises:
        ValueError: As `depthwise_conv2d`, or if the addend's shape, dtype or device is not the input's.
    """
    input, weight = input.to(operand_dtype(input)), weight.to(operand_dtype(weight))
    bias = None if bias is None else bias.to(operand_dtype(bias))
    addend = None if addend is None else addend.to(operand_dtype(addend))
    _check(input, weight, bias, method)
    if input.dim() != 4:
        raise ValueError(f"input must be (N, C, H, W), got shape {tuple(input.shape)}")
    if addend is not None and (addend.shape, addend.dtype, addend.device) != (input.shape, input.dtype, input.device):
        raise ValueError(
            f"addend must be as the input, {tuple(input.shape)} {input.dtype} on {input.device}, "
            f"got {tuple(addend.shape)} {addend.dtype} on {addend.device}"
        )
    with torch.no_grad():
        return _operators.convolve_and_more(input, weight, bias, addend, relu, _operators.pair(dilation), method)


def explain(
    input: Tensor,
    weight: Tensor,
    dilation: int | tuple[int, int] = 1,
    method: Method = "auto",
    device: str | None = None,
    packed: bool = False,
) -> Plan:
    """Say which path `depthwise_conv2d` takes for these tensors, and why.

    Only shapes, dtype and memory format count, so tensors on the ``meta`` device do. Under autocast it is the path that
    the op takes there.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        weight: ``(C, 1, kH, kW)``.
        dilation: As `depthwise_conv2d`.
        method: As `depthwise_conv2d`.
        device: Device type to plan for, such as ``"cuda"``; the input's if ``None``.
        packed: Whether to say it of a layer whose weight is packed ahead (`lk_backbones.prepack_weights`).

    Returns:
        The plan; ``print`` it.

    Raises:
        ValueError: As `depthwise_conv2d`.
    """
    dilation = _operators.pair(dilation)
    dtype = operand_dtype(input)
    if dtype != input.dtype or dtype != weight.dtype:  # nothing is computed: the conversions cost nothing
        device = input.device.type if device is None else device
        input, weight = (tensor.to("meta", operand_dtype(tensor)) for tensor in (input, weight))
    _check(input, weight, None, method)
    input = input if input.dim() == 4 else input.unsqueeze(0)
    device = _paths.device_type(input) if device is None else device
    return _paths.measured_plan(input, weight, dilation, method, device, packed)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, method: str) -> None:
    """Refuse what the op does not do, naming shapes and what is allowed."""
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be (N, C, H, W) or (C, H, W), got shape {tuple(input.shape)}")
    channels, shape = input.shape[-3], weight.shape
    if len(shape) != 4 or shape[0] != channels or shape[1] != 1:
        raise ValueError(
            f"weight must be ({channels}, 1, kH, kW) for the {channels} channels of input {tuple(input.shape)}, "
            f"got {tuple(shape)}"
        )
    if shape[2] % 2 == 0 or shape[3] % 2 == 0:
        raise ValueError(f"kernel sizes must be odd for a map to keep its size, got {tuple(shape[2:])}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be ({channels},), one value per channel of input, got {tuple(bias.shape)}")
    dtype, device = input.dtype, input.device
    if not dtype.is_floating_point or weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        dtypes = _each(dtype, weight.dtype, None if bias is None else bias.dtype)
        raise ValueError(f"input, weight and bias must share one floating point dtype, got {dtypes}")
    if weight.device != device or (bias is not None and bias.device != device):
        devices = _each(device, weight.device, None if bias is None else bias.device)
        raise ValueError(f"input, weight and bias must be on one device, got {devices}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def _each(input: object, weight: object, bias: object) -> str:
    return f"input {input}, weight {weight}" + ("" if bias is None else f", bias {bias}")
