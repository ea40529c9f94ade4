"""``lk-backbones grid``: how the taps of a peripheral kernel share their weights."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from lk_backbones._printing import printable
from lk_backbones.drawing.canvas import save_png
from lk_backbones.drawing.kernel_grid import draw_kernel_grid
from lk_backbones.layers import peripheral_grid
from lk_backbones.weights.errors import shorten

__all__ = ["run"]

_WIDE_CENTER_FROM = 101  # pixels, where the paper goes from 5×5 to 7×7


def run(args: Sequence[str]) -> None:
    """Print the grid of a kernel, and draw it if asked to.

    Args:
        args: What follows the command: the kernel's size, and options.

    Raises:
        ValueError: If there is no such grid, or the picture's name does not end in ``.png``.
        FileExistsError: If the picture would replace a file.
    """
    parser = argparse.ArgumentParser(
        prog="lk-backbones grid",
        description="Show how the taps of a peripheral kernel (PeLK) share their weights along each axis.",
        epilog="Example: lk-backbones grid 101 --save grid.png",
    )
    parser.add_argument("kernel_size", type=int, help="odd size of the kernel, such as 51")
    parser.add_argument(
        "--center-radius",
        type=int,
        help="offsets on each side of the centre that share with none; by default, as in the paper, 2, and 3 for "
        f"kernels of {_WIDE_CENTER_FROM} and more",
    )
    parser.add_argument("--base", type=int, default=2, help="width of the innermost shared cell; 2 by default")
    parser.add_argument("--grid-size", type=int, help="number of cells; by default as many as the paper's rule makes")
    parser.add_argument("--save", metavar="FILE", help="draw it into this PNG file")
    arguments = parser.parse_args(args)

    size, radius = arguments.kernel_size, arguments.center_radius
    if radius is None:
        radius = 3 if size >= _WIDE_CENTER_FROM else 2
    grid = peripheral_grid(size, radius, arguments.base, arguments.grid_size)
    weights, taps = len(grid) ** 2, size**2
    share = f"{weights} weights for {taps} taps, {100 * weights / taps:.1f} %"
    if arguments.save is not None:
        _save(arguments.save, grid, f"{share}; centre radius {radius}, base {arguments.base}")
    print(f"kernel       {size}×{size}, centre radius {radius}, base {arguments.base}")
    print(f"cells        {' '.join(map(str, grid))}")
    print(f"free weights {len(grid)}×{len(grid)}: {share}")
    if arguments.save is not None:
        print(printable(f"written:     {arguments.save}"))


def _save(name: str, grid: list[int], caption: str) -> None:
    if "\0" in name or not name.lower().endswith(".png"):
        raise ValueError(f"--save: the name of the picture must end in .png, got {shorten(name)}")
    try:
        save_png(draw_kernel_grid(grid, caption), Path(name), replace=False)
    except FileExistsError as error:
        # the file itself, or one where a folder would have to be
        there = next(part for part in (Path(name), *Path(name).parents) if os.path.lexists(part))
        raise FileExistsError(f"{there} is there already and stays as it is: name another file to write") from error
