"""Pictures of results: coloured label maps, boxes and masks with names, panels with a legend."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import draw_segmentation_masks

from lk_backbones._files import write_atomically
from lk_backbones.drawing.palette import Color

__all__ = [
    "draw_objects",
    "draw_panels",
    "fit_size",
    "label_map_image",
    "overlay",
    "save_png",
    "to_rgb",
]

BACKGROUND, INK, FAINT = (255, 255, 255), (32, 33, 36), (218, 220, 224)
MARGIN, LINE, FONT_SIZE, NAME_SIZE = 12, 22, 15, 11
MAX_LEGEND = 30


def to_rgb(image: torch.Tensor) -> Image.Image:
    """Turn a float image ``(C, H, W)`` in [0, 1] into a picture; of many channels the first three, of few the first."""
    image = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    array = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def label_map_image(label_map: torch.Tensor, num_classes: int) -> Image.Image:
    """Turn labels ``(H, W)`` into a picture that holds the labels themselves: 8 bit up to 256 classes, else 16 bit."""
    array = label_map.cpu().numpy()
    return Image.fromarray(array.astype(np.uint8 if num_classes <= 256 else np.uint16))


def overlay(image: Image.Image, label_map: torch.Tensor, colors: Sequence[Color], opacity: float = 0.6) -> Image.Image:
    """Lay the classes' colours over a picture; labels that are no class (ignored pixels) are hatched in black.

    Args:
        image: The picture, which sets the size.
        label_map: int ``(H, W)`` of any size, resized by nearest neighbour.
        colors: RGB colour of every class.
        opacity: Of the colours, 0 to 1.

    Returns:
        A picture of the image's size.
    """
    labels = torch.from_numpy(_resize_labels(label_map, image.size))
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    present = [int(c) for c in labels.unique() if 0 <= c < len(colors)]
    if present:
        masks = torch.stack([labels == c for c in present])
        pixels = draw_segmentation_masks(pixels, masks, alpha=opacity, colors=[colors[c] for c in present])
    ignored = (labels < 0) | (labels >= len(colors))
    if ignored.any():
        pixels = torch.where(ignored, torch.from_numpy(_hatching(*labels.shape)).permute(2, 0, 1), pixels)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def draw_objects(
    image: Image.Image,
    boxes: torch.Tensor,
    texts: Sequence[str],
    colors: Sequence[Color],
    masks: torch.Tensor | None = None,
    opacity: float = 0.6,
) -> Image.Image:
    """Draw objects over a picture: masks, then boxes, then names, the first object on top.

    Args:
        image: The picture.
        boxes: ``(N, 4)``, corners in pixels of the picture.
        texts: What to write at each box.
        colors: RGB colour of each object.
        masks: ``(N, H, W)`` of any size, not 0 inside; resized by nearest neighbour.
        opacity: Of the masks, 0 to 1.

    Returns:
        A picture of the same size.
    """
    if masks is not None and len(masks):
        inside = [torch.from_numpy(_resize_labels(mask != 0, image.size)).bool() for mask in masks.flip(0)]
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        pixels = draw_segmentation_masks(pixels, torch.stack(inside), alpha=opacity, colors=list(colors)[::-1])
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    else:
        image = image.convert("RGB").copy()
    draw = ImageDraw.Draw(image)
    order = range(len(texts) - 1, -1, -1)
    corners = [[round(side) for side in box] for box in boxes.tolist()]
    for i in order:
        left, top, right, bottom = corners[i]
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colors[i], width=2)
    font = ImageFont.load_default(NAME_SIZE)
    for i in order:
        left, top = corners[i][:2]
        width, height = int(font.getlength(texts[i])) + 4, NAME_SIZE + 3
        # above the box if there is room, else inside
        x, y = max(min(left, image.width - width), 0), top - height if top >= height else max(top, 0)
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colors[i])
        dark = sum(channel * part for channel, part in zip(colors[i], (0.3, 0.59, 0.11), strict=True)) < 140
        draw.text((x + 2, y), texts[i], fill=BACKGROUND if dark else INK, font=font)
    return image


def draw_panels(
    panels: Sequence[tuple[str, Image.Image]],
    legend: Sequence[tuple[str, Color | None]],
    caption: str = "",
) -> Image.Image:
    """Put pictures side by side under their titles, with a legend below.

    Args:
        panels: Title and picture, all pictures of one size.
        legend: Text and colour of every entry; without a colour the swatch is hatched. At most 30 are drawn.
        caption: A line at the bottom, such as the file name.

    Returns:
        The figure.
    """
    font = ImageFont.load_default(FONT_SIZE)
    width, height = panels[0][1].size
    total_width = MARGIN + len(panels) * (width + MARGIN)
    entries = legend[:MAX_LEGEND]
    if len(legend) > MAX_LEGEND:
        caption = f"{caption}  (and {len(legend) - MAX_LEGEND} more classes)".strip()
    column = max((int(font.getlength(text)) for text, _ in entries), default=0) + LINE + 2 * MARGIN
    columns = max((total_width - MARGIN) // column, 1)
    rows = -(-len(entries) // columns)
    top = MARGIN + LINE
    total_height = top + height + MARGIN + rows * LINE + (LINE if caption else 0) + (MARGIN if rows or caption else 0)
    figure = Image.new("RGB", (max(total_width, MARGIN + column), total_height), BACKGROUND)
    draw = ImageDraw.Draw(figure)
    for i, (title, picture) in enumerate(panels):
        left = MARGIN + i * (width + MARGIN)
        draw.text((left, MARGIN - 3), title, fill=INK, font=font)
        figure.paste(picture, (left, top))
        draw.rectangle((left - 1, top - 1, left + width, top + height), outline=FAINT)
    for i, (text, color) in enumerate(entries):
        row, col = divmod(i, columns)
        x, y = MARGIN + col * column, top + height + MARGIN + row * LINE
        swatch = (x, y + 2, x + LINE - 6, y + LINE - 4)
        if color is None:
            figure.paste(Image.fromarray(_hatching(swatch[3] - swatch[1], swatch[2] - swatch[0])), swatch[:2])
        else:
            draw.rectangle(swatch, fill=color, outline=FAINT)
        draw.text((x + LINE, y), text, fill=INK, font=font)
    if caption:
        draw.text((MARGIN, total_height - LINE - MARGIN // 2), caption, fill=(95, 99, 104), font=font)
    return figure


def fit_size(size: tuple[int, int], smallest: int = 400, largest: int = 640) -> tuple[int, int]:
    """Width and height to draw a picture at, so that details of small ones and the whole of large ones can be seen."""
    side = max(size)
    scale = min(max(side, smallest), largest) / side
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def save_png(image: Image.Image, path: Path, replace: bool = True) -> None:
    """Write a PNG file that appears at once, whole, under its name; folders are made as needed.

    Args:
        image: The picture.
        path: The file's name.
        replace: Whether an existing file is replaced.

    Raises:
        FileExistsError: If there is a file of the name and it may not be replaced.
    """
    with write_atomically(path, replace=replace) as file:
        image.save(file, format="PNG")


def _resize_labels(label_map: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    labels = label_map.cpu().numpy().astype(np.int32)
    if labels.shape == (size[1], size[0]):
        return labels
    return np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def _hatching(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    stripes = np.where(((rows + columns) // 4) % 2, 0, 70).astype(np.uint8)
    return np.repeat(stripes[..., None], 3, axis=2)
