"""The effective receptive field: how much every pixel of the input matters for the centre of a map.

The measure is RepLKNet's (arXiv 2203.06717, section 5.1 and appendix; ``erf/`` of the authors' code), after Luo et al.
(arXiv 1701.04128).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lk_backbones.analysis.levels import Level, find_map, normalized_input

__all__ = [
    "THRESHOLDS",
    "EffectiveReceptiveField",
    "area_ratios",
    "effective_receptive_field",
    "observed",
    "one_by_one",
    "placement",
]

#: The shares of the whole for which the papers print the area.
THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


@dataclass(frozen=True, eq=False)
class EffectiveReceptiveField:
    """What `effective_receptive_field` measured.

    Attributes:
        contribution: float64 ``(H, W)``, how much each pixel of the input matters, averaged over the images. It is what
            the authors' script saves, and what theirs and ours make everything else of.
        level: Which map was looked at.
        map_size: ``(h, w)`` of that map.
        num_images: Images that it is the average of.
        num_skipped: Images left out because their gradients were not finite.
        relu: Whether negative gradients were cut off.
    """

    contribution: np.ndarray
    level: str
    map_size: tuple[int, int]
    num_images: int
    num_skipped: int = 0
    relu: bool = True

    @property
    def matrix(self) -> np.ndarray:
        """float64 ``(H, W)`` in [0, 1]: ``log10(1 + contribution)`` over its maximum; all 0 if nothing contributes."""
        logarithm = np.log1p(self.contribution) / np.log(10)
        highest = logarithm.max()
        return logarithm / highest if highest > 0 else logarithm

    @property
    def ratios(self) -> dict[float, float]:
        """`area_ratios` of `matrix` at the papers' thresholds."""
        return area_ratios(self.matrix)


def area_ratios(matrix: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> dict[float, float]:
    """Measure how much of the picture holds a share of the whole, by centred squares.

    The centre is element ``(H // 2, W // 2)``, as in the authors' script. Squares that stick out are cut off at the
    border, so that the largest is the whole matrix.

    Args:
        matrix: ``(H, W)``, not negative.
        thresholds: Shares of the sum, 0 to 1.

    Returns:
        For every threshold the area of the smallest square (of an odd number of elements each side) that holds more
        than this share of the sum, over the area of the matrix; NaN if all elements are 0.

    Raises:
        ValueError: If the matrix is empty or no matrix, or has elements that are negative, infinite or NaN, or a
            threshold is not in [0, 1).
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"a matrix (H, W) is expected, got the shape {matrix.shape}")
    if not np.isfinite(matrix).all() or matrix.min() < 0:
        raise ValueError("the matrix has elements that are negative, infinite or not a number")
    for threshold in thresholds:
        if not 0 <= threshold < 1:
            raise ValueError(f"thresholds are shares of the sum, from 0 to below 1; got {threshold}")
    height, width = matrix.shape
    total = matrix.sum()
    if total == 0:
        return dict.fromkeys(thresholds, float("nan"))
    integral = np.pad(matrix.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    reach = np.arange(max(height, width) // 2 + 1)
    top, bottom = np.maximum(height // 2 - reach, 0), np.minimum(height // 2 + 1 + reach, height)
    left, right = np.maximum(width // 2 - reach, 0), np.minimum(width // 2 + 1 + reach, width)
    sums = integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
    areas = (bottom - top) * (right - left) / (height * width)
    shares = sums / total
    shares[areas == 1] = 1  # whatever rounding says
    return {threshold: float(areas[np.argmax(shares > threshold)]) for threshold in thresholds}


def effective_receptive_field(
    model: nn.Module,
    images: torch.Tensor | Iterable[torch.Tensor],
    level: Level = -1,
    relu: bool = True,
    *,
    num_images: int | None = None,
    gradient_checkpointing: bool = False,
) -> EffectiveReceptiveField:
    """Measure the effective receptive field of a map's centre, as RepLKNet's authors do.

    For every image: the central position ``(h // 2, w // 2)`` of the map, ReLU, summed over channels; the gradient of
    that with respect to the image as the first layer sees it (normalised), ReLU, summed over colours. The average over
    the images is `EffectiveReceptiveField.contribution`. Images are taken one at a time, so that memory does not grow
    with their number; no gradient of a parameter is computed. The model is left as it was, training mode, gradients and
    random numbers included.

    Args:
        model: Any module, in any mode; it is measured in evaluation mode.
        images: ``(N, C, H, W)`` or any number of ``(C, H, W)`` or ``(N, C, H, W)`` of one size, normalised as the model
            expects them; of a task of ours (which normalises by itself) in [0, 1].
        level: What to look at: the number of a feature level (of the encoder, where the model has one; from the end if
            negative), the path of a module, ``"output"`` for what the model returns, such as a segmentation network's
            logits, or ``"output.<key>"`` if that is several maps. Modules that offer no feature levels have the last
            map of each size, in the order of computation; of one that is called several times the first call counts.
        relu: ``False`` cuts nothing off: the gradient of the plain sum, by its magnitude.
        num_images: Images to average over, for a longer series; ``None`` for all.
        gradient_checkpointing: Compute the blocks of a timm model (or of an encoder that is one) twice instead of
            keeping what is inside them: slower by a third to a half, in much less memory.

    Returns:
        The receptive field.

    Raises:
        ValueError: If there is no image or no such level, sizes differ, the map has no spatial extent or does not
            depend on the image, every gradient is NaN or infinite, or the model has no weights (meta device).
    """
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images={num_images} must be positive")
    total: np.ndarray | None = None
    count = skipped = 0
    name, map_size = "", (0, 0)
    device, dtype = placement(model)
    if device.type == "meta":
        raise ValueError(f"{type(model).__name__} is on the meta device: it has no weights to measure with")
    with observed(model, gradient_checkpointing):
        for image in one_by_one(images):
            x = image.detach().to(device=device, dtype=dtype, copy=True)
            if total is not None and x.shape[2:] != total.shape:
                raise ValueError(f"images of one size are expected, got {tuple(x.shape[2:])} after {total.shape}")
            gradient, name, map_size = _gradient(model, x, level, relu)
            if not np.isfinite(gradient).all():
                skipped += 1
                continue
            total = gradient if total is None else total + gradient
            count += 1
            if count == num_images:
                break
    if total is None:
        if skipped:
            raise ValueError(f"the gradients of all {skipped} images are infinite or not a number")
        raise ValueError("there is no image to measure on")
    return EffectiveReceptiveField(total / count, name, map_size, count, skipped, relu)


def _gradient(
    model: nn.Module, image: torch.Tensor, level: Level, relu: bool
) -> tuple[np.ndarray, str, tuple[int, int]]:
    """Measure on one image ``(1, C, H, W)``: float64 ``(H, W)``, the map's name, and its size."""
    x = normalized_input(model, image).detach().requires_grad_()
    found, name = find_map(model, x, level)
    height, width = found.shape[2:]
    centre = found[:, :, height // 2, width // 2]
    target = (centre.relu() if relu else centre).sum()
    gradient = None
    if target.requires_grad:
        (gradient,) = torch.autograd.grad(target, x, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"{name} of {type(model).__name__} does not depend on the image, or not in a way that has gradients"
        )
    gradient = gradient.relu() if relu else gradient.abs()
    return gradient.double().sum((0, 1)).cpu().numpy(), name, (height, width)


def one_by_one(images: torch.Tensor | Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Give images ``(1, C, H, W)``."""
    for image in [images] if isinstance(images, torch.Tensor) else images:
        if not isinstance(image, torch.Tensor) or image.ndim not in (3, 4) or not image.is_floating_point():
            got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(f"images must be float tensors (C, H, W) or (N, C, H, W), got {got}")
        for one in image if image.ndim == 4 else image[None]:
            yield one[None]


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of a model's first floating-point parameter, else buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


@contextmanager
def observed(model: nn.Module, gradient_checkpointing: bool = False) -> Iterator[None]:
    """Make a model ready to be looked at, and leave it as it was, whatever happens.

    Evaluation mode is set module by module: `train` and `eval` of some modules do more than that, such as merging
    weights, and parts of a model that trains may be in evaluation mode.
    """
    training = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # of timm's models, and of ours
    switches = [(m, m.grad_checkpointing) for m in model.modules() if hasattr(m, "grad_checkpointing")]
    if gradient_checkpointing and not switches:
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} is no timm model and has no blocks to repeat")
    device = placement(model)[0]
    devices = [device] if device.type == "cuda" else []
    # in a callback of Lightning's gradients are switched off, and the precision is that of the training
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            for module, _ in training:
                module.training = False
            for parameter, _ in trained:
                parameter.requires_grad_(False)  # what only its gradient needs is not kept
            for module, _ in switches if gradient_checkpointing else ():
                module.grad_checkpointing = True  # type: ignore[assignment]
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for parameter, mode in trained:
                parameter.requires_grad_(mode)
            for module, switch in switches:
                module.grad_checkpointing = switch
