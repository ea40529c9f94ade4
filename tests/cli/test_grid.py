from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lk_backbones.cli import main


def run(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(["grid", *args])
    return capsys.readouterr().out


def test_a_grid_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "37")
    assert "cells        2 8 4 2 1 1 1 1 1 2 4 8 2\n" in out
    assert "13×13: 169 weights for 1369 taps, 12.3 %" in out
    assert "centre radius 2, base 2" in out
    assert "17 16 8 4 2 1 1 1 1 1 1 1 2 4 8 16 17\n" in run(capsys, "101")  # a centre of 7, as the paper
    assert "26 16 8 4 2 1 1 1 1 1 2" in run(capsys, "117", "--center-radius", "2", "--grid-size", "15")
    assert "4 9 3 1 1 1 1 1 3 9 4\n" in run(capsys, "37", "--base", "3")


def test_the_picture_shows_the_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "grid.png"
    assert f"written:     {file}" in run(capsys, "51", "--save", str(file))
    picture = np.asarray(Image.open(file))
    colors, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    areas = sorted(counts[(colors.max(1) - colors.min(1)) > 100], reverse=True)[:5]
    scale = areas[0] / (51**2 - 33**2)  # rings of 9, 8, 4, 2 and the centre, less the lines between the cells
    expected = [51**2 - 33**2, 33**2 - 17**2, 17**2 - 9**2, 9**2 - 5**2, 5**2]
    assert [area / scale / rings for area, rings in zip(areas, expected, strict=True)] == pytest.approx(
        [1] * 5, abs=0.15
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["50"], "kernel_size must be a positive odd number, got 50"),
        (["51", "--grid-size", "15"], "grid_size must be one of 7, 9, 11, 13 for a kernel of 51"),
        (["5", "--center-radius", "3"], "center_radius must be 0 to 2 for a kernel of 5"),
        (["51", "--save", "grid.jpg"], "--save: the name of the picture must end in .png, got 'grid.jpg'"),
        (["51", "--save", "there.png"], "there.png is there already and stays as it is"),
        (["51", "--save", "there.png/grid.png"], "there.png is there already and stays as it is"),
    ],
)
def test_errors_leave_nothing_behind(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.png").write_bytes(b"somebody's")
    with pytest.raises(SystemExit) as exit_:
        main(["grid", *args])
    assert exit_.value.code == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("there.png", b"somebody's")]
