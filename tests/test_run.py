"""``python -m lk_backbones.run``: other people's programs know our encoders, and notice nothing else."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lk_backbones

ENCODER = lk_backbones.list_encoders("replknet_31n")[0]


def run(*arguments: object, cwd: Path, module: str = "lk_backbones.run") -> subprocess.CompletedProcess[str]:
    root = str(Path(lk_backbones.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The same in this process, which knows the package already: a new one takes seconds to import it."""
    for name in ("__main__", "__mp_main__"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name))
    monkeypatch.setenv("LK_BACKBONES_RUN", "null")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run_inside(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        return runpy.run_module("lk_backbones.run", run_name="__main__")

    return run_inside


# What a program can see of how it was started.
LOOK = """
import json, pickle, sys
import neighbour

class Local:
    pass

if __name__ == "__main__":
    assert type(pickle.loads(pickle.dumps(Local()))) is Local
    seen = dict(argv=sys.argv, path=sys.path[0], file=__file__, name=__name__, package=__package__ or "", doc=__doc__,
                neighbour=neighbour.__file__, imported=sys.modules["__main__"].Local is Local)
    if "lk_backbones" in sys.modules:
        import timm
        timm.create_model("{encoder}")
    print(json.dumps(seen))
""".replace("{encoder}", ENCODER)


def test_a_script_sees_what_it_would_without_us(tmp_path: Path) -> None:
    write(tmp_path / "scripts" / "neighbour.py", "")
    write(tmp_path / "scripts" / "look.py", f'"""Text: ü"""\n{LOOK}')
    arguments = ["scripts/look.py", "data", "-m", "--lr", "0.1", "--", "-x", ""]
    plain = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
    ours = run(*arguments, cwd=tmp_path)
    assert ours.returncode == 0, ours.stderr
    assert json.loads(ours.stdout) == json.loads(plain.stdout)
    assert ours.stderr == ""


@pytest.mark.parametrize("name", ["program.look", "program"])
def test_a_module_sees_what_it_would_without_us(
    tmp_path: Path,
    name: str,
    inside: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in ("look", "__main__"):
        write(tmp_path / "program" / f"{file}.py", LOOK.replace("import neighbour", "from . import neighbour"))
    write(tmp_path / "program" / "__init__.py", "")
    write(tmp_path / "program" / "neighbour.py", "")
    command = [sys.executable, "-m", name, "--lr", "1"]
    plain = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    for module in ("program", "program.neighbour"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    inside("-m", name, "--lr", "1")
    assert json.loads(capsys.readouterr().out) == json.loads(plain.stdout)


def test_exit_codes_and_tracebacks_are_the_programs(tmp_path: Path, inside: Callable[..., Any]) -> None:
    with pytest.raises(SystemExit) as exit:
        inside(str(write(tmp_path / "exits.py", "import sys\nsys.exit(7)\n")))
    assert exit.value.code == 7
    with pytest.raises(KeyError, match="mine") as failed:
        inside(str(write(tmp_path / "fails.py", "def inner():\n    raise KeyError('mine')\n\n\ninner()\n")))
    *_, outer, inner = traceback.extract_tb(failed.value.__traceback__)
    assert (Path(outer.filename).name, outer.lineno, outer.line) == ("fails.py", 5, "inner()")
    assert (Path(inner.filename).name, inner.lineno, inner.name) == ("fails.py", 2, "inner")
    with pytest.raises(SyntaxError) as broken:
        inside(str(write(tmp_path / "broken.py", "x = (\n")))
    assert Path(str(broken.value.filename)).name == "broken.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m lk_backbones.run (SCRIPT | -m MODULE)"),
        (["-m"], "usage: python -m lk_backbones.run (SCRIPT | -m MODULE)"),
        (["--model", "x"], "usage: python -m lk_backbones.run (SCRIPT | -m MODULE)"),
        (["missing.py"], "no script 'missing.py' in "),
        (["."], "no script '.' in "),
        (["-m", "not_there"], "no module 'not_there' to run"),
        (["-m", "not.there"], "no module 'not.there' to run: No module named 'not'"),
        (["-m", "..x"], "no module '..x' to run"),
        (["-m", "math"], "no module 'math' to run"),
        (["-m", "json"], "no module 'json' to run"),
    ],
    ids=str,
)
def test_nothing_to_run_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    inside: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        inside(*arguments)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert len(err.splitlines()) == 1


def test_help(inside: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        inside("--help")
    assert not exit.value.code
    assert capsys.readouterr().out.startswith("usage: python -m lk_backbones.run")


# A function and a class of the program's own reach the new process, which knows the encoder when it gets there, and
# also a process that this one starts.
START = """
import multiprocessing, sys
import timm

KNOWN = timm.is_model("{encoder}")  # while the program is imported

class Answer:
    def __init__(self, text):
        self.text = text

def work(queue, method, depth):
    if depth:
        start(method, depth - 1, queue)
    queue.put(Answer(f"{depth} {KNOWN} {type(timm.create_model('{encoder}')).__name__} {sys.argv[1:]}"))

def start(method, depth, queue=None):
    context = multiprocessing.get_context(method)
    queue = queue or context.Queue()
    process = context.Process(target=work, args=(queue, method, depth))
    process.start()
    if __name__ == "__main__":
        print(*sorted(queue.get(timeout=200).text for _ in range(depth + 1)), sep="\\n")
    process.join()
    assert process.exitcode == 0

if __name__ == "__main__":
    start(sys.argv[1], int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("method", "program", "depth"), [("spawn", ["start.py"], 1), ("forkserver", ["-m", "start"], 0)]
)
def test_processes_started_by_multiprocessing_know_the_encoders(
    tmp_path: Path, method: str, program: list[str], depth: int
) -> None:
    if sys.platform == "win32" and method == "forkserver":
        pytest.skip("Windows has no forkserver")
    write(tmp_path / "start.py", START.replace("{encoder}", ENCODER))
    started = run(*program, method, depth, cwd=tmp_path)
    assert started.returncode == 0, started.stderr
    assert started.stdout.splitlines() == [f"{i} True RepLKNet ['{method}', '{depth}']" for i in range(depth + 1)]


RANKS = """
import os, sys, timm
assert sys.argv[1:] == ["--model", "{encoder}"], sys.argv
model = timm.create_model(sys.argv[2])
print(os.environ["RANK"], type(model).__name__, flush=True)
"""


def test_torchrun(tmp_path: Path) -> None:
    write(tmp_path / "ranks.py", RANKS.replace("{encoder}", ENCODER))
    options = ["--standalone", "--nproc-per-node", "2", "-m", "lk_backbones.run"]
    started = run(*options, "ranks.py", "--model", ENCODER, cwd=tmp_path, module="torch.distributed.run")
    assert started.returncode == 0, started.stderr
    assert sorted(started.stdout.split("\n"))[-2:] == ["0 RepLKNet", "1 RepLKNet"]


LIGHTNING = """
import sys
import lightning as L
import timm
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

class Model(BoringModel):
    def __init__(self):
        super().__init__()
        self.encoder = timm.create_model(sys.argv[2])

    def on_train_end(self):
        print(f"rank {self.global_rank} {type(self.encoder).__name__}", flush=True)

L.Trainer(accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", max_steps=1, logger=False,
          enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
          limit_val_batches=0).fit(Model())
"""


def test_processes_started_by_lightning(tmp_path: Path) -> None:
    write(tmp_path / "fit.py", LIGHTNING)
    started = run("fit.py", "--model", ENCODER, cwd=tmp_path)
    assert started.returncode == 0, started.stderr
    # the processes share the stream, and either may come between the other's text and the end of its line
    assert sorted(re.findall(r"rank \d RepLKNet", started.stdout)) == ["rank 0 RepLKNet", "rank 1 RepLKNet"]
