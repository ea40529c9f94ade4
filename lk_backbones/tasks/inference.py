"""Inference on whole images, in sliding windows, and over scales and flips: pure functions on tensors."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

__all__ = ["augmented_probabilities", "pad_to_multiple", "resize", "sliding_window"]

Predict = Callable[[torch.Tensor], torch.Tensor]


def resize(x: torch.Tensor, size: tuple[int, int], align_corners: bool = False) -> torch.Tensor:
    """Resize maps bilinearly, if they do not have the size already.

    Args:
        x: ``(N, C, H, W)``.
        size: Height and width of the result.
        align_corners: As in `torch.nn.functional.interpolate`; the decoder's own convention.

    Returns:
        ``(N, C, *size)``.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def pad_to_multiple(x: torch.Tensor, multiple: int, smallest: int = 1) -> torch.Tensor:
    """Pad normalised images with zeros (the mean colour) on the right and at the bottom.

    Args:
        x: ``(N, C, H, W)``.
        multiple: What height and width shall be multiples of.
        smallest: What height and width shall at least be.

    Returns:
        The padded images, or ``x`` itself if nothing is missing.
    """
    height, width = (max(-(-side // multiple) * multiple, smallest) for side in x.shape[2:])
    bottom, right = height - x.shape[2], width - x.shape[3]
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def sliding_window(
    predict: Predict, image: torch.Tensor, window: tuple[int, int], stride: tuple[int, int]
) -> torch.Tensor:
    """Predict in overlapping windows and average the logits where they overlap.

    The windows lie on a grid of ``stride``; those that would stick out are moved back to the border (OpenMMLab's
    "slide" mode). An image smaller than the window is predicted whole.

    Args:
        predict: Maps ``(N, C, h, w)`` to logits ``(N, num_classes, h, w)``.
        image: ``(N, C, H, W)``.
        window: Height and width of a window.
        stride: Vertical and horizontal step.

    Returns:
        Logits ``(N, num_classes, H, W)``.

    Raises:
        ValueError: If the stride is larger than the window, so that pixels would be left out.
    """
    if not all(0 < s <= w for s, w in zip(stride, window, strict=True)):
        raise ValueError(f"the stride {tuple(stride)} must be positive and at most the window {tuple(window)}")
    height, width = image.shape[2:]
    total: torch.Tensor | None = None
    count = image.new_zeros(1, 1, height, width)
    for top in _window_starts(height, window[0], stride[0]):
        for left in _window_starts(width, window[1], stride[1]):
            rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
            logits = predict(image[:, :, rows, columns])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[:, :, rows, columns] += logits
            count[:, :, rows, columns] += 1
    assert total is not None
    return total / count.to(total.dtype)


def augmented_probabilities(
    predict: Predict,
    image: torch.Tensor,
    size: tuple[int, int],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    align_corners: bool = False,
) -> torch.Tensor:
    """Average the class probabilities over scaled and mirrored copies of the images.

    Every copy's logits are resized to ``size`` before the softmax, as in the published multi-scale ("ms") results.

    Args:
        predict: Maps images ``(N, C, h, w)`` of any size to logits ``(N, num_classes, h, w)``.
        image: ``(N, C, H, W)``.
        size: Height and width of the result.
        scales: Factors of the image size.
        flip: Whether to add the mirror image (left-right) of every scale.
        align_corners: As in `resize`.

    Returns:
        Probabilities ``(N, num_classes, *size)``, float32.
    """
    total = torch.zeros((), device=image.device)
    for scale in scales:
        scaled_size = tuple(max(int(side * scale + 0.5), 1) for side in image.shape[2:])
        scaled = resize(image, (scaled_size[0], scaled_size[1]))
        for mirrored in (False, True) if flip else (False,):
            logits = predict(scaled.flip(3) if mirrored else scaled)
            if mirrored:
                logits = logits.flip(3)
            total = total + resize(logits.float(), size, align_corners).softmax(dim=1)
    return total / (len(scales) * (2 if flip else 1))
