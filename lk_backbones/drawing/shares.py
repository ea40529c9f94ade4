"""Shares with intervals, one row for each class: the plot of shape bias."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from lk_backbones.drawing.canvas import BACKGROUND, FAINT, INK
from lk_backbones.drawing.palette import Color

__all__ = ["ShareSeries", "draw_shares"]

Interval = tuple[float, float, float]

# Drawn at this multiple and made smaller: lines and markers have smooth edges then.
_FINE = 3
_MARGIN, _ROW, _FONT, _PLOT = 14, 26, 14, 460
_GREY = (95, 99, 104)


@dataclass(frozen=True)
class ShareSeries:
    """What is drawn in one colour.

    Attributes:
        name: For the legend.
        color: RGB.
        total: Share of all, lower and upper end of its interval; NaN where there is none.
        rows: The same for every row.
    """

    name: str
    color: Color
    total: Interval
    rows: Sequence[Interval]


def draw_shares(
    rows: Sequence[str],
    series: Sequence[ShareSeries],
    top_title: str,
    bottom_title: str,
    caption: str = "",
) -> Image.Image:
    """Draw shares from 1 (left) to 0 (right), with intervals, and a line at the share of all.

    Args:
        rows: Name of each row.
        series: What to draw, each with one interval per row.
        top_title: What the shares are of, at the axis above.
        bottom_title: What the rest is, at the axis below, which runs from 0 to 1.
        caption: A line at the bottom.

    Returns:
        The figure.
    """
    font = ImageFont.load_default(_FONT * _FINE)
    names = [*rows, "all"]
    label = max(font.getlength(name) for name in names) / _FINE + 8
    left, top = _MARGIN + label, _MARGIN + 44
    bottom = top + _ROW * len(names) + 8
    legend = bottom + 50
    legend_rows = [f"{one.name}: {_percent(one.total)}" for one in series]
    height = legend + _ROW * len(series) * 0.85 + (_ROW if caption else 0) + _MARGIN
    width = left + _PLOT + 2 * _MARGIN
    widest = max(font.getlength(text) / _FINE for text in [*(f"---{text}" for text in legend_rows), caption])
    width = max(width, widest + 2 * _MARGIN + 24)
    pen = _Pen(width, height, font)

    def place(share: float) -> float:
        return left + (1 - share) * _PLOT

    for tick in range(0, 11, 2):
        x = place(tick / 10)
        pen.line((x, top, x, bottom), FAINT, 1)
        pen.text((x, top - 20), f"{tick / 10:g}", INK, "middle")
        pen.text((x, bottom + 4), f"{1 - tick / 10:.2g}", INK, "middle")
    pen.text((left + _PLOT / 2, _MARGIN - 6), top_title, INK, "middle")
    pen.text((left + _PLOT / 2, bottom + 22), bottom_title, INK, "middle")
    pen.line((place(1), top, place(1), bottom), _GREY, 1)
    pen.line((place(0), top, place(0), bottom), _GREY, 1)
    for i, name in enumerate(names):
        y = top + _ROW * (i + 0.5) + (4 if i == len(rows) else 0)
        pen.text((left - 8, y - _FONT * 0.6), name, INK, "right")
    y = top + _ROW * len(rows) + 2
    pen.line((left, y, left + _PLOT, y), _GREY, 1)
    spread = min(0.7 * _ROW / max(len(series), 1), 8)
    for j, one in enumerate(series):
        offset = (j - (len(series) - 1) / 2) * spread
        if _known(one.total):
            x = place(one.total[0])
            pen.line((x, top, x, bottom), one.color, 2)
        for i, interval in enumerate([*one.rows, one.total]):
            if not _known(interval):
                continue
            y = top + _ROW * (i + 0.5) + (4 if i == len(rows) else 0) + offset
            share, low, high = interval
            pen.line((place(low), y, place(high), y), one.color, 2)
            pen.marker((place(share), y), one.color, 4.2 if len(series) < 4 else 3.4)
        y = legend + _ROW * 0.85 * j
        pen.marker((_MARGIN + 6, y + 8), one.color, 4.5)
        pen.text((_MARGIN + 18, y), legend_rows[j], INK)
    if caption:
        pen.text((_MARGIN, height - _MARGIN - _FONT), caption, _GREY)
    return pen.finished()


def _known(interval: Interval) -> bool:
    return interval[0] == interval[0]


def _percent(interval: Interval) -> str:
    if not _known(interval):
        return "no decision for shape or texture"
    share, low, high = (100 * value for value in interval)
    return f"{share:.1f} % ({low:.1f} to {high:.1f})"


class _Pen:
    """Draws in the finished picture's pixels on a finer sheet."""

    def __init__(self, width: float, height: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> None:
        self.size = round(width), round(height)
        self.sheet = Image.new("RGB", (self.size[0] * _FINE, self.size[1] * _FINE), BACKGROUND)
        self.draw = ImageDraw.Draw(self.sheet)
        self.font = font

    def line(self, ends: tuple[float, float, float, float], color: Color, width: float) -> None:
        self.draw.line([_FINE * value for value in ends], fill=color, width=round(_FINE * width))

    def marker(self, centre: tuple[float, float], color: Color, radius: float) -> None:
        x, y = centre
        box = [_FINE * value for value in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(box, fill=color, outline=BACKGROUND, width=_FINE)

    def text(self, place: tuple[float, float], text: str, color: Color, anchor: str = "left") -> None:
        length = self.font.getlength(text)
        shift = {"left": 0, "middle": length / 2, "right": length}[anchor]
        self.draw.text((_FINE * place[0] - shift, _FINE * place[1]), text, fill=color, font=self.font)

    def finished(self) -> Image.Image:
        return self.sheet.reduce(_FINE)
