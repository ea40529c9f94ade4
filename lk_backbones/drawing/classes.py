"""Pictures of a classification: a picture's best classes, sheets of many, the confusion matrix."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lk_backbones.drawing.canvas import BACKGROUND, FAINT, FONT_SIZE, INK, LINE, MARGIN
from lk_backbones.drawing.palette import Color

__all__ = ["draw_best_classes", "draw_confusion", "draw_sheet"]

GREY, RIGHT, WRONG, BLUE = (95, 99, 104), (24, 128, 56), (197, 34, 31), (26, 95, 180)
SMALL = 12
ROW = 17
#: Up to this many classes the confusion matrix has names and numbers, and bars of the classes' accuracy.
MOST_NAMED = 40
#: How many of the worst classes are listed beside a matrix without names.
WORST = 25


def draw_best_classes(
    picture: Image.Image,
    size: tuple[int, int],
    best: Sequence[tuple[str, float, Color]],
    caption: str,
    truth: str | None = None,
) -> Image.Image:
    """Draw a picture, and below it its best classes with bars of their probabilities.

    Args:
        picture: The picture, no larger than ``size``.
        size: Width and height of its place.
        best: Name, probability and colour of the classes, the best first.
        caption: A line above the classes, such as the file name.
        truth: Name of the true class, if it is known: it is marked, and named if it is not among the best.

    Returns:
        A figure whose size depends on ``size`` and the number of classes alone.
    """
    font, small = ImageFont.load_default(SMALL), ImageFont.load_default(SMALL - 1)
    width = max(size[0], 160)
    height = size[1] + ROW * (len(best) + 1 + (truth is not None)) + 6
    figure = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(figure)
    figure.paste(picture, ((width - picture.width) // 2, (size[1] - picture.height) // 2))
    y = size[1] + 4
    draw.text((0, y), _fitted(caption, small, width), fill=GREY, font=small)
    y += ROW
    if truth is not None:
        is_right = bool(best) and best[0][0] == truth
        draw.text((0, y), _fitted(f"truth: {truth}", font, width), fill=RIGHT if is_right else WRONG, font=font)
        y += ROW
    for name, probability, color in best:
        draw.rectangle((0, y + 2, width - 1, y + ROW - 3), fill=(245, 246, 247))
        draw.rectangle((0, y + 2, max(round(probability * (width - 1)), 1), y + ROW - 3), fill=_pale(color))
        number = f"{100 * probability:.1f}"
        place = width - 3 - int(small.getlength(number))
        draw.text((3, y + 1), _fitted(name, font, place - 8), fill=RIGHT if name == truth else INK, font=font)
        draw.text((place, y + 2), number, fill=INK, font=small)
        y += ROW
    return figure


def draw_sheet(cells: Sequence[Image.Image], columns: int, title: str = "") -> Image.Image:
    """Put figures of one size on a sheet, row by row.

    Args:
        cells: The figures, at least one.
        columns: Figures in a row.
        title: A line at the top.
    """
    width, height = cells[0].size
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    top = MARGIN + (LINE if title else 0)
    sheet = Image.new("RGB", (MARGIN + columns * (width + MARGIN), top + rows * (height + MARGIN)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    if title:
        draw.text((MARGIN, MARGIN - 3), _fitted(title, font, sheet.width - 2 * MARGIN), fill=INK, font=font)
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        sheet.paste(cell, (MARGIN + column * (width + MARGIN), top + row * (height + MARGIN)))
    return sheet


def draw_confusion(matrix: np.ndarray, names: Sequence[str], title: str = "") -> Image.Image:
    """Draw a confusion matrix, every row as shares of its class, and beside it the accuracy of the classes.

    Of up to 40 classes there are names, numbers in percent and a bar for each class; of more the matrix alone, with
    the worst classes listed.

    Args:
        matrix: int ``(C, C)``, truth by prediction.
        names: Names of the classes.
        title: A line at the top.
    """
    counts = matrix.sum(axis=1)
    shares = matrix / np.maximum(counts, 1)[:, None]
    if len(names) <= MOST_NAMED:
        return _named_confusion(shares, counts, names, title)
    return _plain_confusion(shares, counts, names, title)


def _named_confusion(shares: np.ndarray, counts: np.ndarray, names: Sequence[str], title: str) -> Image.Image:
    font, small = ImageFont.load_default(SMALL), ImageFont.load_default(SMALL - 2)
    cell, count = 26, len(names)
    label = int(min(max(font.getlength(name) for name in names), 180)) + 8
    bar = 140
    left, top = MARGIN + label, MARGIN + 2 * LINE + label
    figure = Image.new("RGB", (left + count * cell + 2 * MARGIN + bar, top + count * cell + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(figure)
    _head(draw, title, "rows: truth, columns: prediction, in % of the row's pictures", figure.width)
    column_names = Image.new("RGB", (label, count * cell), BACKGROUND)  # to be turned upright
    writer = ImageDraw.Draw(column_names)
    for i, name in enumerate(names):
        text = _fitted(name, font, label - 8)
        place = (label - 6 - font.getlength(text), top + i * cell + 6)
        draw.text((MARGIN + place[0], place[1]), text, fill=INK if counts[i] else GREY, font=font)
        writer.text((2, i * cell + 6), text, fill=INK, font=font)
    figure.paste(column_names.transpose(Image.Transpose.ROTATE_90), (left, top - label))
    for row in range(count):
        for column in range(count):
            share, (x, y) = float(shares[row, column]), (left + column * cell, top + row * cell)
            box = (x, y, x + cell - 2, y + cell - 2)
            draw.rectangle(box, fill=_mixed(BLUE if row == column else WRONG, share))
            if share > 0:
                text = f"{100 * share:.0f}"
                place = (x + (cell - 2 - small.getlength(text)) / 2, y + 7)
                draw.text(place, text, fill=BACKGROUND if share > 0.5 else INK, font=small)
        x, y = left + count * cell + MARGIN, top + row * cell
        draw.rectangle((x, y + 5, x + bar - 50, y + cell - 7), fill=(245, 246, 247))
        if length := round(float(shares[row, row]) * (bar - 50)):
            draw.rectangle((x, y + 5, x + length, y + cell - 7), fill=BLUE)
        number = f"{100 * shares[row, row]:.1f} %" if counts[row] else "-"
        draw.text((x + bar - 44, y + 6), number, fill=INK, font=small)
    return figure


def _plain_confusion(shares: np.ndarray, counts: np.ndarray, names: Sequence[str], title: str) -> Image.Image:
    count = len(names)
    side = max(count, 600 // count * count)
    font = ImageFont.load_default(SMALL)
    on_diagonal = np.eye(count, dtype=bool)[..., None]
    # the root lets rare confusions be seen
    strength = np.sqrt(shares)[..., None]
    colors = np.where(on_diagonal, np.array(BLUE), np.array(WRONG))
    pixels = (255 * (1 - strength) + colors * strength).round().astype(np.uint8)
    matrix = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    top, listed = MARGIN + 2 * LINE, 320
    figure = Image.new("RGB", (side + 3 * MARGIN + listed, top + max(side, (WORST + 1) * ROW) + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(figure)
    _head(draw, title, "rows: truth, columns: prediction, the square root of the row's shares", figure.width)
    figure.paste(matrix, (MARGIN, top))
    draw.rectangle((MARGIN - 1, top - 1, MARGIN + side, top + side), outline=FAINT)
    seen = np.flatnonzero(counts)
    accuracy = shares.diagonal()
    worst = seen[np.argsort(accuracy[seen], kind="stable")][:WORST]
    x, y = side + 2 * MARGIN, top
    draw.text((x, y), f"the worst of {len(seen)} classes with pictures", fill=GREY, font=font)
    for index in worst.tolist():
        y += ROW
        number = f"{100 * accuracy[index]:.1f} %"
        draw.text((x, y), _fitted(names[index], font, listed - 60), fill=INK, font=font)
        draw.text((x + listed - 6 - font.getlength(number), y), number, fill=INK, font=font)
    return figure


def _head(draw: ImageDraw.ImageDraw, title: str, explanation: str, width: int) -> None:
    font, small = ImageFont.load_default(FONT_SIZE), ImageFont.load_default(SMALL)
    draw.text((MARGIN, MARGIN - 3), _fitted(title, font, width - 2 * MARGIN), fill=INK, font=font)
    draw.text((MARGIN, MARGIN + LINE - 5), _fitted(explanation, small, width - 2 * MARGIN), fill=GREY, font=small)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Return as much of a text as fits, on one line."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _pale(color: Color) -> Color:
    return _mixed(color, 0.45)


def _mixed(color: Color, share: float) -> Color:
    """Mix a colour into white."""
    red, green, blue = (round(255 * (1 - share) + channel * share) for channel in color)
    return red, green, blue
