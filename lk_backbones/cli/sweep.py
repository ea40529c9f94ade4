"""``lk-backbones sweep``: train every cell of a published table, and print it beside the published numbers."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lk_backbones._files import write_atomically
from lk_backbones._printing import printable
from lk_backbones.cli.sweep_file import Cell, Sweep, read_sweep
from lk_backbones.weights.errors import shorten

__all__ = ["run"]

# Seconds in which a run that was asked to end has saved its checkpoint.
_PATIENCE = 120


@dataclass(frozen=True)
class _Run:
    """One training.

    Attributes:
        cell: What is trained.
        seed: Its seed.
        folder: Where everything of it lies.
        arguments: Arguments of `lk-backbones`, but for a checkpoint.
    """

    cell: Cell
    seed: int
    folder: Path
    arguments: list[str]

    @property
    def results(self) -> Path:
        """The file of its metrics, which is there once it is finished."""
        return self.folder / "metrics.json"

    def checkpoint(self) -> Path | None:
        """Return the checkpoint to go on from, the newest there is."""
        found = list(self.folder.rglob("*.ckpt"))
        return max(found, key=lambda path: path.stat().st_mtime, default=None)


def run(args: Sequence[str]) -> None:
    """Run a sweep, or go on with it, and print its table.

    Args:
        args: What follows the command.

    Raises:
        ValueError: If the file is no sweep, what lies in the folder is of another one, or a training fails.
        OSError: If something cannot be read or written.
    """
    parser = argparse.ArgumentParser(
        prog="lk-backbones sweep",
        description="Train every cell of a published table with every seed, and print what was reached beside what was "
        "published. What is finished is kept, and what was interrupted goes on from its last checkpoint: the same "
        "command again goes on where it was stopped. Beside the trainings lie table.md and table.csv.",
        epilog="Example: lk-backbones sweep guidelines/shortcut --small -- --trainer.accelerator cpu",
    )
    parser.add_argument("file", help="such as guidelines/shortcut, or a file of your own")
    parser.add_argument("--small", action="store_true", help="the small experiment on drawn pictures, nothing needed")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--root", help="folder for everything; by default runs/sweeps/NAME, or NAME_small")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of what is left to train, and end")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags for every `lk-backbones fit`")
    before, _, after = [list(args), [], []] if "--" not in args else _split(args)
    arguments = parser.parse_args(before)
    if arguments.flags:
        raise ValueError(f"{shorten(arguments.flags[0])}: flags for `lk-backbones fit` come after --")

    sweep = read_sweep(arguments.file, arguments.small)
    if arguments.seeds is not None:
        if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
            raise ValueError(f"--seeds must be different numbers, none of them negative, got {arguments.seeds}")
        sweep = replace(sweep, seeds=arguments.seeds)
    name = f"{sweep.path.stem}_small" if arguments.small else sweep.path.stem
    root = Path(arguments.root or Path("runs", "sweeps", name))
    runs = [_plan(sweep, cell, seed, root, after) for seed in sweep.seeds for cell in sweep.cells]
    for each in runs:
        _check_settings(each)
    if arguments.dry_run:
        for each in runs:
            if not each.results.exists():
                print(printable(shlex.join(["lk-backbones", *_command(each)])))
        return
    with _sigterm_as_exit():
        for each in runs:
            _train(sweep, each)
            _write_tables(sweep, root, runs)
    Console(soft_wrap=True).print(_table(sweep, runs))
    print(printable(f"written: {root / 'table.md'}, {root / 'table.csv'}"))


def _split(args: Sequence[str]) -> list[list[str]]:
    place = list(args).index("--")
    return [list(args[:place]), ["--"], list(args[place + 1 :])]


def _plan(sweep: Sweep, cell: Cell, seed: int, root: Path, flags: list[str]) -> _Run:
    folder = root / cell.folder / f"seed_{seed}"
    overrides = {"trainer.enable_progress_bar": False} | cell.overrides
    arguments = [
        *("fit", "--config", sweep.recipe),
        *(f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()),
        *flags,
        *(f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}"),
        *("--trainer.callbacks+=lk_backbones.callbacks.MetricsFile", f"--trainer.callbacks.path={folder}/metrics.json"),
    ]
    return _Run(cell, seed, folder, arguments)


def _command(run: _Run) -> list[str]:
    checkpoint = run.checkpoint()
    return [*run.arguments, *([] if checkpoint is None else [f"--ckpt_path={checkpoint}"])]


def _check_settings(run: _Run) -> None:
    """Refuse a folder in which the cell was trained otherwise: its results would stand in the wrong table."""
    path = run.folder / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ValueError(f"{path} is damaged: remove the folder, or name another --root") from error
    if settings != run.arguments:
        known = settings if isinstance(settings, list) else []
        changed = next((a for a in run.arguments if a not in known), None) or next(iter(known), "")
        raise ValueError(
            f"{run.folder} holds a training with other settings than {shorten(changed)}: remove it, or name another "
            f"--root"
        )


def _train(sweep: Sweep, run: _Run) -> None:
    """Train a cell, unless it is finished, and say what came out."""
    begin = time.monotonic()
    finished = run.results.exists()
    if not finished:
        with write_atomically(run.folder / "settings.json") as file:
            file.write(json.dumps(run.arguments, indent=2).encode())
        command = _command(run)
        _launch(run, command)
        if not _measured(sweep, run) and command != run.arguments:
            # the checkpoint was of the end already, and nothing was left to measure
            run.results.unlink()
            _launch(run, run.arguments)
    metrics = _measured(sweep, run)
    lacking = [key for key in sweep.metrics if key not in metrics]
    if lacking:
        raise ValueError(f"{run.results} lacks {', '.join(lacking)}, which {sweep.path} names in its metrics")
    took = "finished before" if finished else f"{(time.monotonic() - begin) / 60:.1f} min"
    told = ", ".join(f"{title} {_percent(metrics[key])}" for key, title in sweep.metrics.items())
    print(printable(f"{run.cell.name}, seed {run.seed}: {told} ({took})"), flush=True)


def _launch(run: _Run, command: list[str]) -> None:
    """Run a command in a process of its own; what ends this one asks that one to save its checkpoint and end."""
    log = run.folder / "output.txt"
    child = None
    with open(log, "ab") as file:
        try:
            with _signals_held_back():
                child = subprocess.Popen(
                    [sys.executable, "-m", "lk_backbones.cli", *command],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # so that Ctrl+C comes here only
                )
            status = child.wait()
        except BaseException:
            if child is not None:
                child.terminate()
                try:
                    child.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
            raise
    if status != 0 or not run.results.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
        raise ValueError(
            f"'{run.cell.name}' with seed {run.seed} ended with status {status}: {shorten(lines[-1], 300)}. All that "
            f"it printed: {log}"
        )


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Hold back what ends this process until a training is started: it could not be asked to end before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, frame: came.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the running training is asked to end too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- the table ----


def _measured(sweep: Sweep, run: _Run) -> dict[str, float]:
    """Return the metrics of a finished run in percent; what was not a number is NaN."""
    if not run.results.exists():
        return {}
    try:
        content = json.loads(run.results.read_text(encoding="utf-8"))
        values = {key: content[key] for key in sweep.metrics if key in content}
        return {key: float("nan") if value is None else 100 * float(value) for key, value in values.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{run.results} is damaged ({error}): remove it, and its cell is trained again") from error


def _rows(sweep: Sweep, runs: Sequence[_Run]) -> list[tuple[str, list[tuple[float | None, list[float]]]]]:
    """Return every cell's name, and for every metric the published number and those of all seeds that are finished."""
    rows = []
    for cell in sweep.cells:
        measured = [_measured(sweep, run) for run in runs if run.cell is cell]
        columns = [(cell.published.get(key), [m[key] for m in measured if key in m]) for key in sweep.metrics]
        rows.append((cell.name, columns))
    return rows


def _percent(value: float) -> str:
    return f"{value:.1f}"


def _mean_and_std(values: list[float]) -> tuple[float | None, float | None]:
    """Return the mean, ``None`` of nothing, and the standard deviation of a sample, ``None`` of less than two."""
    if not all(map(math.isfinite, values)):  # for which `statistics` has no deviation
        return math.nan, math.nan if len(values) > 1 else None
    return (
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def _spread(values: list[float]) -> str:
    mean, std = _mean_and_std(values)
    return "–" if mean is None else _percent(mean) if std is None else f"{_percent(mean)} ± {_percent(std)}"


def _cells_of_table(sweep: Sweep, runs: Sequence[_Run]) -> tuple[list[str], list[list[str]]]:
    """Return the table as texts; metrics of which nothing is published have no column for it."""
    told = [any(key in cell.published for cell in sweep.cells) for key in sweep.metrics]
    head = [""]
    for title, published in zip(sweep.metrics.values(), told, strict=True):
        head += [f"{title}, published", f"{title}, here"] if published else [title]
    body = []
    for name, columns in _rows(sweep, runs):
        row = [name]
        for (number, values), published in zip(columns, told, strict=True):
            row += ["–" if number is None else f"{number:g}"] if published else []
            row.append(_spread(values))
        body.append(row)
    return head, body


def _caption(sweep: Sweep, runs: Sequence[_Run]) -> str:
    seeds = len(sweep.seeds)
    finished = sum(run.results.exists() for run in runs)
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    left = f", {len(runs) - finished} of {len(runs)} trainings to go" if finished < len(runs) else ""
    return f"In percent, {spread}{left}. Recipe {sweep.recipe}. Published: {sweep.source}."


def _table(sweep: Sweep, runs: Sequence[_Run]) -> Table:
    head, body = _cells_of_table(sweep, runs)
    table = Table(title=Text(printable(sweep.title)), title_justify="left", box=box.SIMPLE)
    for i, title in enumerate(head):
        table.add_column(Text(printable(title)), justify="right" if i else "left", no_wrap=True)
    for row in body:
        table.add_row(*(Text(printable(text)) for text in row))
    table.caption = Text(printable(_caption(sweep, runs)))
    return table


def _write_tables(sweep: Sweep, root: Path, runs: Sequence[_Run]) -> None:
    """Write ``table.md`` and ``table.csv``, as far as they are known."""
    head, body = _cells_of_table(sweep, runs)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    markdown = "\n".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in lines)
    with write_atomically(root / "table.md") as file:
        file.write(f"{markdown}\n\n{_caption(sweep, runs)}\n".encode())
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["cell", "metric", "published", "mean", "std", "seeds", *(f"seed_{seed}" for seed in sweep.seeds)])
    for name, columns in _rows(sweep, runs):
        for key, (number, values) in zip(sweep.metrics, columns, strict=True):
            by_seed = {r.seed: _measured(sweep, r).get(key) for r in runs if r.cell.name == name}
            mean, std = _mean_and_std(values)
            each = [by_seed[seed] for seed in sweep.seeds]
            writer.writerow(
                [name, key, *("" if v is None else f"{v:.6g}" for v in (number, mean, std)), len(values)]
                + ["" if v is None else f"{v:.6g}" for v in each]
            )
    with write_atomically(root / "table.csv") as file:
        file.write(sheet.getvalue().encode())
