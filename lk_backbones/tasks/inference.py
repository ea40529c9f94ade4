"""Inference on whole images, in sliding windows, and over scales and flips: pure functions on tensors."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

__all__ = ["augmented_probabilities", "pad_to_multiple", "resize", "scaled_size", "sliding_window"]

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
    scaled: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Average the class probabilities over scaled and mirrored copies of the images.

    Every copy's logits are resized to ``size`` before the softmax, as in the published multi-scale ("ms") results.

    Args:
        predict: Maps images ``(N, C, h, w)`` of any size to logits ``(N, num_classes, h, w)``.
        image: ``(N, C, H, W)``, in its original size unless ``scaled`` is given: what is resized twice is blurred.
        size: Height and width of the result.
        scales: Factors of the image size.
        flip: Whether to add the mirror image (left-right) of every scale.
        align_corners: As in `resize`.
        scaled: The images at every scale, where they were made already; 8-bit ones are divided by 255.

    Returns:
        Probabilities ``(N, num_classes, *size)``, float32.

    Raises:
        ValueError: If ``scaled`` holds more or fewer copies than there are scales.
    """
    if scaled is not None and len(scaled) != len(scales):
        raise ValueError(f"there are {len(scaled)} scaled copies of the images for {len(scales)} scales")
    total = torch.zeros((), device=image.device)
    for i, scale in enumerate(scales):
        copy = resize(image, scaled_size(image, scale)) if scaled is None else scaled[i]
        if copy.dtype == torch.uint8:
            copy = copy.to(image.dtype) / 255
        for mirrored in (False, True) if flip else (False,):
            logits = predict(copy.flip(3) if mirrored else copy)
            if mirrored:
                logits = logits.flip(3)
            total = total + resize(logits.float(), size, align_corners).softmax(dim=1)
    return total / (len(scales) * (2 if flip else 1))


def scaled_size(image: torch.Tensor, scale: float) -> tuple[int, int]:
    """Height and width of images ``(N, C, H, W)`` at a scale, as OpenMMLab's ``MultiScaleFlipAug`` rounds them.

    The sides times the scale are cut to whole pixels, and the image is made as large as fits in, keeping its shape.
    """
    sides = image.shape[2:]
    ratio = min(max(int(side * scale), 1) / side for side in sides)
    height, width = (max(int(side * ratio + 0.5), 1) for side in sides)
    return height, width
