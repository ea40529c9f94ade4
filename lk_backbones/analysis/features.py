"""The maps that an encoder makes of a picture, as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from lk_backbones.analysis.erf import observed, placement
from lk_backbones.analysis.levels import feature_maps, normalized_input, trunk_of
from lk_backbones.drawing.heat_maps import draw_pictures, heat_map

__all__ = ["draw_feature_pyramid", "feature_pyramid", "mean_magnitude", "principal_colors"]


def feature_pyramid(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute all feature levels of a model's encoder for an image.

    Args:
        model: Any module, in any mode; it is run in evaluation mode, and left as it was.
        image: ``(C, H, W)``, normalised as the model expects it; of a task of ours in [0, 1].

    Returns:
        For each level ``(C', h, w)`` on the CPU, float32, in the order in which `effective_receptive_field` numbers
        them. The names are those numbers, of a module without feature levels the paths of the modules.

    Raises:
        ValueError: If the model has no spatial maps, cannot be run on such an image, or has no weights (meta device).
    """
    device, dtype = placement(model)
    if device.type == "meta":
        raise ValueError(f"{type(model).__name__} is on the meta device: it has no weights to look at")
    if image.ndim != 3 or not image.is_floating_point():
        raise ValueError(f"an image must be a float tensor (C, H, W), got {image.dtype} {tuple(image.shape)}")
    with observed(model):
        x = normalized_input(model, image[None].detach().to(device=device, dtype=dtype))
        try:
            maps = feature_maps(trunk_of(model), x.detach().requires_grad_())
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            size = " × ".join(map(str, image.shape[1:]))
            raise ValueError(
                f"{type(model).__name__} cannot be run on images of {image.shape[0]} channels and {size} pixels: "
                f"{error}"
            ) from error
        found = {name: m[0].detach().float().cpu() for name, m in maps.items() if m.ndim == 4 and m.shape[1]}
    if not found:
        raise ValueError(f"{type(model).__name__} has no spatial maps: it has no features to be shown as pictures")
    return found


def principal_colors(features: torch.Tensor) -> np.ndarray:
    """Turn a map into colours: its first three principal components over the positions are red, green and blue.

    Positions of one colour have much the same features; the colours themselves mean nothing, and those of two maps
    cannot be compared. Each component is signed so that its largest weight is positive, and stretched from its 1st
    to its 99th percentile.

    Args:
        features: ``(C, h, w)``.

    Returns:
        uint8 ``(h, w, 3)``; where there are fewer components the rest is 0.
    """
    channels, height, width = features.shape
    values = features.double().flatten(1).T
    values = torch.nan_to_num(values - values.mean(0))
    # of the smaller of the two products: channels by channels, or positions by positions
    if channels <= height * width:
        vectors = torch.linalg.eigh(values.T @ values).eigenvectors.flip(1)[:, :3]
    else:
        vectors = values.T @ torch.linalg.eigh(values @ values.T).eigenvectors.flip(1)[:, :3]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    components = (values @ (vectors * largest.sign())).numpy()
    low, high = np.percentile(components, (1, 99), axis=0)
    scale = np.where(high - low > 1e-9 * max(float(np.abs(components).max()), 1e-300), high - low, np.inf)
    colors = np.zeros((height * width, 3), np.uint8)
    colors[:, : components.shape[1]] = (np.clip((components - low) / scale, 0, 1) * 255).round()
    return colors.reshape(height, width, 3)


def mean_magnitude(features: torch.Tensor) -> np.ndarray:
    """Turn a map into a matrix: the mean magnitude over the channels, over its maximum.

    Args:
        features: ``(C, h, w)``.

    Returns:
        float32 ``(h, w)`` in [0, 1].
    """
    magnitude = features.float().abs().mean(0).numpy()
    highest = magnitude.max()
    return np.asarray(magnitude / highest if highest > 0 else magnitude, dtype=np.float32)


def draw_feature_pyramid(
    picture: Image.Image, pyramid: dict[str, torch.Tensor], show: str = "pca", caption: str = "", side: int = 280
) -> Image.Image:
    """Draw a picture and all feature levels of it, every position as a rectangle.

    Args:
        picture: The picture.
        pyramid: What `feature_pyramid` returned.
        show: ``"pca"`` for `principal_colors`, ``"mean"`` for `mean_magnitude`.
        caption: A line at the bottom.
        side: Longer side of each in pixels.

    Raises:
        ValueError: If ``show`` is something else.
    """
    if show not in ("pca", "mean"):
        raise ValueError(f"show={show!r} must be 'pca' or 'mean'")
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    panels: list[tuple[str, Image.Image, Sequence[str]]] = [
        ("picture", picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), [])
    ]
    for i, (name, features) in enumerate(pyramid.items()):
        channels, height, width = features.shape
        if show == "pca":
            drawn = Image.fromarray(principal_colors(features)).resize(size, Image.Resampling.NEAREST)
        else:
            drawn = heat_map(mean_magnitude(features), size)
        title = f"level {i}" + (f", {name}" if name != str(i) else "")
        panels.append((title, drawn, [f"{height} x {width}, {channels} channels"]))
    scale_title = "mean magnitude over the channels / its maximum in the level" if show == "mean" else None
    told = "colours: the first three principal components of each level" if show == "pca" else ""
    return draw_pictures(panels, "; ".join(filter(None, [told, caption])), scale_title)
