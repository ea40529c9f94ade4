"""``lk-backbones sweep``: the cells of a table, interrupted and gone on with, and what comes out."""

from __future__ import annotations

import csv
import json
import os
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lk_backbones.cli import main, sweep, training
from lk_backbones.cli.recipes import list_sweeps
from lk_backbones.cli.sweep_file import read_sweep
from lk_backbones.tasks import ClassificationTask

FILE: dict[str, Any] = {
    "title": "Two cells",
    "source": "nobody",
    "recipe": "quickstart/classify_replknet_31n_shapes",
    "metrics": {"val/top1": "top-1", "shape_decisions": "shape decisions"},
    "seeds": [0],
    "small": {
        "overrides": {
            "model.encoder_kwargs.depths": [1, 1, 1, 1],
            "model.input_size": 32,
            "model.warmup_steps": 1,
            "trainer.max_epochs": 2,
            "trainer.accelerator": "cpu",
            "data.image_size": 32,
            "data.train_images": 8,
            "data.val_images": 4,
            "data.batch_size": 8,
            "data.num_workers": 0,
            "data.conflict_images": 8,
        }
    },
    "cells": [
        {"name": "3×3", "overrides": {"model.encoder_kwargs.kernel_sizes": 3}, "published": {"val/top1": 71.8}},
        {"name": "3×3 again", "overrides": {"model.encoder_kwargs.kernel_sizes": 3}},
    ],
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(FILE, sort_keys=False))
    return path


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", *map(str, args)])
    assert exit_.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def test_an_interrupted_cell_goes_on_and_finished_ones_stay(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    interrupted: list[int] = []
    step = ClassificationTask.training_step

    def launch(run: Any, command: list[str]) -> None:
        commands.append(command)
        try:
            training.run(command)
        except SystemExit as error:  # Lightning's way to end upon Ctrl+C
            raise KeyboardInterrupt from error

    def stop_in_the_second_epoch(self: ClassificationTask, batch: Any, batch_idx: int) -> Any:
        if len(commands) == 2 and self.current_epoch == 1:
            interrupted.append(self.global_step)
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(sweep, "_launch", launch)
    monkeypatch.setattr(ClassificationTask, "training_step", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        main(["sweep", "table.yaml", "--small", "--root", "out"])
    assert interrupted == [1]
    assert "1 of 2 trainings to go" in Path("out/table.md").read_text()
    first = Path("out/3x3/seed_0/metrics.json").read_bytes()
    capsys.readouterr()

    main(["sweep", "table.yaml", "--small", "--root", "out", "--dry-run"])
    (left,) = capsys.readouterr().out.splitlines()
    assert left.startswith("lk-backbones fit --config quickstart/classify_replknet_31n_shapes ")
    assert "last.ckpt" in left
    assert len(commands) == 2

    main(["sweep", "table.yaml", "--small", "--root", "out"])
    assert len(commands) == 3
    (resumed,) = [argument for argument in commands[2] if argument.startswith("--ckpt_path=")]
    assert Path(resumed.partition("=")[2]).name == "last.ckpt"
    again = Path("out/3x3_again/seed_0/metrics.json").read_bytes()
    assert json.loads(first) == json.loads(again)  # the same cell, stopped and gone on with
    assert Path("out/3x3/seed_0/metrics.json").read_bytes() == first
    checkpoint = torch.load(max(Path("out/3x3_again").rglob("last.ckpt"), key=os.path.getmtime), weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["hyper_parameters"]["encoder_kwargs"] == {"kernel_sizes": 3, "depths": [1, 1, 1, 1]}
    out = capsys.readouterr().out
    assert "finished before" in out
    top1 = 100 * json.loads(first)["val/top1"]
    assert f"| 3×3 | 71.8 | {top1:.1f} |" in Path("out/table.md").read_text()
    assert "to go" not in Path("out/table.md").read_text()


def test_the_table_has_mean_and_spread(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(run: Any, command: list[str]) -> None:
        shape = None if run.cell.name == "3×3 again" else 0.5
        run.results.write_text(json.dumps({"val/top1": 0.6 + 0.1 * run.seed, "shape_decisions": shape}))

    monkeypatch.setattr(sweep, "_launch", launch)
    main(["sweep", "table.yaml", "--seeds", "1", "2", "--", "--trainer.devices", "1"])
    lines = Path("runs/sweeps/table/table.md").read_text().splitlines()
    assert lines[0] == "|  | top-1, published | top-1, here | shape decisions |"
    assert lines[2:4] == ["| 3×3 | 71.8 | 75.0 ± 7.1 | 50.0 ± 0.0 |", "| 3×3 again | – | 75.0 ± 7.1 | nan ± nan |"]
    assert "mean ± standard deviation of 2 seeds" in lines[-1]
    assert "75.0 ± 7.1" in capsys.readouterr().out
    with open("runs/sweeps/table/table.csv", newline="") as sheet:
        row = next(csv.DictReader(sheet))
    assert (row["cell"], row["published"], row["mean"], row["seeds"]) == ("3×3", "71.8", "75", "2")
    assert (row["seed_1"], row["seed_2"]) == ("70", "80")
    settings = json.loads(Path("runs/sweeps/table/3x3/seed_1/settings.json").read_text())
    assert settings[-6:-4] == ["--trainer.devices", "1"]

    error = refused(capsys, "table.yaml", "--seeds", 1, "--", "--trainer.devices", 2)
    assert "3x3/seed_1 holds a training with other settings than '2': remove it, or name another --root" in error
    Path("runs/sweeps/table/3x3/seed_1/metrics.json").write_text("{")
    error = refused(capsys, "table.yaml", "--seeds", 1, "--", "--trainer.devices", 1)
    assert "metrics.json is damaged" in error


def test_a_checkpoint_of_the_end_is_measured_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def launch(run: Any, command: list[str]) -> None:
        commands.append(command)
        # what is resumed at its end validates no more, and logs nothing
        run.results.write_text("{}" if len(command) > len(run.arguments) else '{"val/top1": 1, "shape_decisions": 1}')

    monkeypatch.setattr(sweep, "_launch", launch)
    checkpoint = Path("runs/sweeps/table/3x3/seed_0/checkpoints/last.ckpt")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    main(["sweep", "table.yaml"])
    assert [any(argument.startswith("--ckpt_path") for argument in command) for command in commands] == [True] + [
        False
    ] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands for the training")
def test_what_ends_the_sweep_lets_the_training_save(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path("fit.sh").absolute()
    script.write_text(
        "#!/bin/sh\ntrap 'echo saved; exit 143' TERM\necho started > started\nwhile :; do sleep 0.1; done\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))

    def terminate() -> None:
        while not Path("started").exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", "table.yaml"])
    thread.join()
    assert exit_.value.code == 143
    assert Path("runs/sweeps/table/3x3/seed_0/output.txt").read_text().endswith("saved\n")
    assert signal.getsignal(signal.SIGTERM) == before

    script.write_text("#!/bin/sh\necho out of memory\nexit 3\n")
    error = refused(capsys, "table.yaml")
    assert "'3×3' with seed 0 ended with status 3: 'out of memory'. All that it printed: runs/sweeps/table/3x3" in error


def test_the_training_is_our_own_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own; the only one here, as it takes seconds to start."""
    error = refused(capsys, "table.yaml", "--", "--model.lrr", 1)
    assert "ended with status 2" in error
    output = Path("runs/sweeps/table/3x3/seed_0/output.txt").read_text()
    assert "there is no argument 'lrr'; did you mean 'lr'" in output


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", [recipe.name for recipe in list_sweeps()])
def test_every_sweep_that_comes_with_the_package_is_one(name: str, small: bool) -> None:
    read = read_sweep(name, small)
    assert read.recipe.startswith("quickstart/" if small or "shape_bias" in name else "mobilenetv2/")
    assert len(read.seeds) == (3 if small or "shape_bias" in name else 1)
    for cell in read.cells:
        arguments = cell.overrides.get("model.encoder_kwargs", cell.overrides)
        assert arguments.keys() & {"kernel_sizes", "model.encoder_kwargs.kernel_sizes"}
        assert not (small and cell.overrides.get("model.encoder_weights"))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"titel": "x"}, "table.yaml has no key 'titel'; did you mean 'title'?"),
    ({"title": None}, "table.yaml: title must be a line of text, got None"),
    ({"recipe": "quickstart/clasify"}, "table.yaml: recipe: there is no recipe and no file 'quickstart/clasify'; did"),
    ({"seeds": [0, 0]}, "table.yaml: seeds must be a list of different numbers, none of them negative, got [0, 0]"),
    ({"seeds": [True]}, "table.yaml: seeds must be a list of different numbers"),
    ({"metrics": {}}, "table.yaml: metrics must name one metric at least"),
    ({"small": {"seed": [0]}}, "table.yaml: small has no key 'seed'; did you mean 'seeds'?"),
    ({"small": {"overrides": {"lr": 1}}}, "table.yaml: small.overrides: 'lr' is no flag of `lk-backbones fit`"),
    ({"cells": []}, "table.yaml: cells must be a list of cells, got []"),
    ({"cells": ["3×3"]}, "table.yaml: cells[0] must be values by name, got '3×3'"),
    ({"cells": [{"overrides": {}}]}, "table.yaml: cells[0] lacks 'name'"),
    ({"cells": [{"name": "a", "published": {"val/top5": 1}}]}, "cells[0].published: 'val/top5' is none of the metrics"),
    ({"cells": [{"name": "a", "published": {"val/top1": "9"}}]}, "val/top1 must be a number in percent, got '9'"),
    ({"cells": [{"name": "3x3"}, {"name": "3×3"}]}, "cells[1].name: '3×3' and '3x3' would share a folder"),
    ({"cells": [{"name": "..//"}, {"name": "a", "overrides": {"fit": 1}}]}, "cells[1].overrides: 'fit' is no flag"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_mistake_is_named_with_file_and_key(
    change: dict[str, Any], message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(yaml.safe_dump(FILE | change, sort_keys=False))
    assert message in refused(capsys, "table.yaml", "--dry-run")


def test_other_mistakes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(yaml.safe_dump({key: value for key, value in FILE.items() if key != "small"}))
    assert "table.yaml has no 'small'" in refused(capsys, "table.yaml", "--small")
    assert "--seeds must be different numbers" in refused(capsys, "table.yaml", "--seeds", 1, 1)
    assert "no sweep has this name; did you mean 'guidelines/shortcut'" in refused(capsys, "guidelines/shortcuts")
    assert "flags for `lk-backbones fit` come after --" in refused(capsys, "table.yaml", "extra")
    file.write_text("cells: [")
    assert "table.yaml is no YAML" in refused(capsys, "table.yaml")
