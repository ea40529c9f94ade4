"""Heat maps side by side on one scale."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lk_backbones.drawing.canvas import BACKGROUND, FAINT, FONT_SIZE, INK, LINE, MARGIN

__all__ = ["draw_heat_maps", "draw_pictures", "heat_map", "heat_overlay", "ratio_lines", "shorten_to_width"]

# "inferno" of Smith and van der Walt (CC0), at 17 equal distances: even in lightness, also for colour-blind eyes.
_COLORS = (
    (0, 0, 4), (11, 7, 36), (33, 12, 74), (61, 9, 101), (87, 16, 110), (113, 25, 110), (138, 34, 106), (163, 44, 97),
    (188, 55, 84), (210, 70, 68), (228, 90, 49), (241, 115, 29), (249, 142, 9), (252, 172, 17), (249, 203, 53),
    (242, 234, 105), (252, 255, 164),
)  # fmt: skip
_BAR, _NOTE_SIZE, _NOTE_LINE = 14, 13, 18
_GREY = (95, 99, 104)


def heat_map(matrix: np.ndarray, size: tuple[int, int] | None = None, power: float = 1.0) -> Image.Image:
    """Turn a matrix into a picture: 0 is black, 1 light yellow, what is no number is grey.

    Args:
        matrix: ``(H, W)`` in [0, 1].
        size: Width and height of the picture. Smaller ones show averages, larger ones every element as a rectangle.
        power: Colours are of the values to this power: one below 1 shows what is faint.
    """
    values = np.asarray(matrix, dtype=np.float32)
    if size is not None and size != values.shape[::-1]:
        smaller = size[0] < values.shape[1] and size[1] < values.shape[0]
        method = Image.Resampling.BOX if smaller else Image.Resampling.NEAREST
        values = np.asarray(Image.fromarray(values).resize(size, method))
    values = np.clip(values, 0, 1) ** power
    places = np.linspace(0, 1, len(_COLORS))
    channels = [np.interp(values, places, [color[i] for color in _COLORS]) for i in range(3)]
    pixels = np.where(np.isfinite(values)[..., None], np.stack(channels, axis=-1), 128)
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_heat_maps(
    panels: Sequence[tuple[str, np.ndarray, Sequence[str]]],
    caption: str = "",
    scale_title: str = "",
    side: int = 280,
    columns: int = 4,
    power: float = 1.0,
) -> Image.Image:
    """Put heat maps side by side, in rows, under their titles, with one colour bar from 0 to 1 for all.

    Args:
        panels: Title, matrix ``(H, W)`` in [0, 1], and lines of text below it.
        caption: A line at the bottom.
        scale_title: What the colours stand for, below the bar.
        side: Longer side of each heat map in pixels.
        columns: Heat maps per row.
        power: As in `heat_map`; the bar's numbers are of the values themselves.

    Returns:
        The figure.
    """
    pictures = [(title, heat_map(matrix, _fitted(matrix, side), power), lines) for title, matrix, lines in panels]
    return draw_pictures(pictures, caption, scale_title, columns, power)


def draw_pictures(
    panels: Sequence[tuple[str, Image.Image, Sequence[str]]],
    caption: str = "",
    scale_title: str | None = None,
    columns: int = 4,
    power: float = 1.0,
) -> Image.Image:
    """Put pictures side by side, in rows, under their titles, with a colour bar from 0 to 1 where they are heat maps.

    Args:
        panels: Title, picture, and lines of text below it.
        caption: A line at the bottom.
        scale_title: What the colours of heat maps stand for, below the bar; ``None`` for no bar.
        columns: Pictures per row.
        power: As in `heat_map`; the bar's numbers are of the values themselves.

    Returns:
        The figure.
    """
    font, note_font = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(_NOTE_SIZE)
    columns = min(columns, len(panels))
    width = max(max(picture.width for _, picture, _ in panels), 160)
    height = max(picture.height for _, picture, _ in panels)
    notes = max(len(lines) for _, _, lines in panels)
    cell = LINE + height + 6 + notes * _NOTE_LINE + MARGIN
    rows = -(-len(panels) // columns)
    total_width = MARGIN + columns * (width + MARGIN)
    bar_top = MARGIN + rows * cell
    bar_height = _BAR + _NOTE_LINE + 4 if scale_title is not None else 0
    under = [text for text in (scale_title, caption) if text]
    total_height = bar_top + bar_height + len(under) * _NOTE_LINE + MARGIN
    figure = Image.new("RGB", (total_width, total_height), BACKGROUND)
    draw = ImageDraw.Draw(figure)
    for i, (title, picture, lines) in enumerate(panels):
        row, column = divmod(i, columns)
        left, top = MARGIN + column * (width + MARGIN), MARGIN + row * cell
        draw.text((left, top), shorten_to_width(title, width, FONT_SIZE), fill=INK, font=font)
        figure.paste(picture, (left, top + LINE))
        draw.rectangle((left - 1, top + LINE - 1, left + picture.width, top + LINE + picture.height), outline=FAINT)
        for j, line in enumerate(lines):
            y = top + LINE + picture.height + 6 + j * _NOTE_LINE
            draw.text((left, y), shorten_to_width(line, width, _NOTE_SIZE), fill=_GREY, font=note_font)
    if scale_title is not None:
        _draw_bar(figure, draw, bar_top, power)
    for j, text in enumerate(under):
        place = (MARGIN, bar_top + bar_height + j * _NOTE_LINE)
        draw.text(place, shorten_to_width(text, total_width - 2 * MARGIN, _NOTE_SIZE), fill=_GREY, font=note_font)
    return figure


def heat_overlay(picture: Image.Image, matrix: np.ndarray, opacity: float = 0.6) -> Image.Image:
    """Lay a heat map over a picture.

    Args:
        picture: The picture, which sets the size.
        matrix: ``(H, W)`` in [0, 1], of any size.
        opacity: Of the heat map, 0 to 1.
    """
    smooth = Image.fromarray(np.asarray(matrix, np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    return Image.blend(picture.convert("RGB"), heat_map(np.asarray(smooth)), opacity)


def ratio_lines(ratios: Mapping[float, float]) -> list[str]:
    """Write area ratios as lines below a heat map: two shares of the whole in each, with their areas in percent."""
    texts = [f"{100 * share:g} % in {100 * area:.1f} %" for share, area in ratios.items()]
    return [",  ".join(texts[i : i + 2]) for i in range(0, len(texts), 2)]


def _draw_bar(figure: Image.Image, draw: ImageDraw.ImageDraw, top: int, power: float) -> None:
    font = ImageFont.load_default(_NOTE_SIZE)
    width = min(figure.width - 2 * MARGIN, 280)
    figure.paste(heat_map(np.linspace(0, 1, width)[None].repeat(_BAR, 0)), (MARGIN, top))
    for tick in (0, 0.25, 0.5, 0.75, 1):
        text, x = f"{tick ** (1 / power):.2g}", MARGIN + round(tick * (width - 1))
        draw.line((x, top + _BAR, x, top + _BAR + 3), fill=INK)
        length = font.getlength(text)
        place = min(max(x - length / 2, MARGIN), MARGIN + width - length)
        draw.text((place, top + _BAR + 3), text, fill=INK, font=font)


def _fitted(matrix: np.ndarray, side: int) -> tuple[int, int]:
    height, width = matrix.shape
    scale = side / max(height, width)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def shorten_to_width(text: str, width: float, font_size: int) -> str:
    """Cut a text at its end, with three dots, so that it is no wider than some pixels in the pictures' font."""
    font = ImageFont.load_default(font_size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
