"""Colours for classes that bring none, to be laid over photographs, and for lines and marks on white."""

__all__ = ["Color", "class_palette", "plot_palette"]

Color = tuple[int, int, int]

# The result of a search over CIELAB. Any two of the first 5, 12 and 24 colours are at least 60, 28 and 18 apart, and
# 40, 18 and 12 for eyes without red or green receptors (Machado et al., 2009). All are bright (L of 45 to 90), so that
# what they are laid over can be seen, and so colourful (chroma of 45 and more) that lines show on photographs: on
# street scenes, COCO pictures and micrographs at most 2 % of the pixels are nearer than 30 to any one of them.
_COLORS = (
    (15, 90, 255), (255, 225, 0), (240, 60, 135), (0, 240, 255), (195, 75, 15), (165, 240, 150),
    (60, 165, 255), (180, 45, 180), (255, 180, 75), (0, 255, 210), (240, 135, 195), (60, 120, 240),
    (240, 90, 105), (0, 135, 75), (255, 150, 105), (210, 15, 150), (15, 150, 45), (15, 195, 255),
    (180, 120, 195), (240, 225, 120), (90, 210, 150), (255, 135, 15), (195, 15, 210), (105, 195, 45),
)  # fmt: skip


def class_palette(num_classes: int) -> list[Color]:
    """Return an RGB colour (0 to 255) for each of some classes; the first ones are the easiest to tell apart.

    A class's colour does not depend on how many there are. Beyond 24 classes the same colours come again in darker and
    lighter shades.
    """
    return [_shade(_COLORS[i % len(_COLORS)], i // len(_COLORS)) for i in range(num_classes)]


# Okabe and Ito's, which also colour-blind eyes tell apart, without black and yellow.
_ON_WHITE = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))


def plot_palette(number: int) -> list[Color]:
    """Return an RGB colour (0 to 255) for each of some lines or marks on white; beyond six they come again, darker."""
    return [
        _shade(_ON_WHITE[i % len(_ON_WHITE)], 2 * (i // len(_ON_WHITE)) - 1 if i >= len(_ON_WHITE) else 0)
        for i in range(number)
    ]


def _shade(color: Color, turn: int) -> Color:
    """Mix a colour with black and white in turn, by other shares every time; as it is at turn 0."""
    share = 0.2 + 0.5 * (turn * 0.618034 % 1) if turn else 0.0
    end = 255 * (turn % 2 == 0)
    red, green, blue = (round((1 - share) * channel + share * end) for channel in color)
    return red, green, blue
