"""Everything about speed on an NVIDIA GPU, in one command that needs nobody beside it.

The operator on the shapes of the papers and of encoders, every way to compute it, its errors against float64 and its
share of what the card can do; whole models in training and inference beside ConvNeXt and Swin; what choosing by
measuring costs. The most important comes first, each section has its share of the time, and files are written again
after every shape and every group of models, so that a run cut short leaves what it has measured::

    python benchmarks/gpu.py                                 # half an hour; writes docs/benchmarks/gpu_<card>.*
    python benchmarks/gpu.py --minutes 9 --output results/h200
    python benchmarks/gpu.py --only stages --only tuning     # some sections
    python benchmarks/gpu.py --pretend --output /tmp/gpu     # for developers: the whole program on a CPU, tiny shapes

Beside the JSON it writes a .md with tables and, if matplotlib is there, plots. Compiled kernels and choices go to a
folder of its own that it removes: what the user's cache knows neither counts nor changes.

Exit status: 0 when done, also when the time was up, even in the middle of ``torch.compile``; 2 without a CUDA device; 3
if the device stopped working half-way, or something did not come to an end; 130 or 143 if it was interrupted. Files are
written in any case but 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

# Triton reads the variable when it is imported, and the cache folders must be known before too.
if "--pretend" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import datetime
import json
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import gpu_models
import gpu_operator
import gpu_report
import gpu_tuning
import torch
from gpu_device import (
    DeviceLost,
    Stopwatch,
    describe_device,
    explain_failure,
    forbidden,
    free_memory,
    measure_condition,
    measure_rates,
    pretend,
    use_folders_of_our_own,
)
from gpu_operator import Setting
from gpu_workers import Workers, stop_workers

from lk_backbones._files import write_atomically

BEGIN = time.monotonic()
GRACE = 25.0  # seconds after the time is up until the program ends whatever it is at
LAST_SAVE = 15.0  # seconds for the last files
SHORT = 5.0  # seconds of a job that may be begun with less than it takes
CHECKED, UNCHECKED = 5.0, 15.0  # seconds for a setting of the operator, by whether workers have compiled it
LEAST_CHECK = 60.0  # seconds of a section in which workers check and compile
FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
# Section -> its share of the time, in the order of importance. What one leaves is shared by those that follow.
SHARES = {"stages": 0.24, "tuning": 0.11, "models": 0.24, "paper": 0.17, "shapes": 0.13, "more models": 0.11}


TUNING_STATES = ("nothing known", "kernels compiled before", "everything known")


@dataclass
class Job:
    """Something to measure.

    Attributes:
        label: What it is.
        seconds: That it takes, about; it is not begun with less.
        run: Does it.
    """

    label: str
    seconds: float
    run: Callable[[], None]


@dataclass
class Run:
    """A run of the benchmark: what it has found, and its files.

    Attributes:
        stem: Of the files.
        seconds: That it may take.
        pretended: Whether nothing of it is real.
        device: Where.
        content: What is in the JSON.
        compiling: Whether it is in ``torch.compile``, which cannot be interrupted and may take minutes.
        ending: Whether all is measured and only the last files are to be written.
    """

    stem: Path
    seconds: float
    pretended: bool
    device: torch.device
    content: dict[str, Any] = field(default_factory=dict)
    compiling: bool = False
    ending: bool = False
    _saving: threading.Lock = field(default_factory=threading.Lock)
    _warned: bool = False

    @property
    def left(self) -> float:
        """Seconds until the time is up."""
        return BEGIN + self.seconds - time.monotonic()

    def say(self, text: str) -> None:
        """Print a line with the time that is left."""
        print(f"[{max(0.0, self.left) / 60:5.1f} min left] {text}", flush=True)

    def failed(self, where: str, what: str) -> None:
        """Note what went wrong outside of candidates."""
        self.content["failures"].append({"where": where, "what": what})
        self.say(f"{where}: {what}")

    def save(self, plots: bool = False) -> None:
        """Write JSON and tables, each at once; drawing takes seconds and is for the ends of sections."""
        with self._saving:
            self.content["seconds"] = time.monotonic() - BEGIN
            self.content["targets"] = gpu_report.targets(self.content)
            for suffix, text in (
                (".json", json.dumps(_finite(self.content), indent=1, allow_nan=False)),
                (".md", gpu_report.markdown(self.content)),
            ):
                with write_atomically(self.stem.with_name(self.stem.name + suffix)) as file:
                    file.write((text.rstrip() + "\n").encode())
            if plots:
                try:
                    gpu_report.plots(self.content, self.stem)
                except Exception as error:  # a picture is not worth the figures
                    if not self._warned:
                        self.say(f"no plots: {type(error).__name__}: {error}")
                    self._warned = True

    def sum_up(self) -> None:
        """Print what was asked for, what came out, and where everything is."""
        plots = ", plots" if list(self.stem.parent.glob(f"{self.stem.name}_*.png")) else ""
        print("\n" + "\n".join(gpu_report.target_lines(self.content)))
        print(f"{self.content['state']}; files: {self.stem}.json, {self.stem}.md{plots}", flush=True)


def _finite(value: Any) -> Any:
    """``value`` with ``None`` for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in list(value.items())}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and value - value != 0 else value


class Sections:
    """The sections of a run and their jobs."""

    def __init__(self, run: Run, folder: Path, wanted: list[str]) -> None:
        self.run = run
        self.folder = folder
        self.wanted = wanted or list(SHARES)
        self.watch = Stopwatch(run.device)
        self.workers = Workers(self._helper("gpu_workers.py"), self._worker_count(), self._tell_of_workers)

    def _helper(self, program: str) -> list[str]:
        """Return the command that starts one of the programs beside this one."""
        command = [sys.executable, str(Path(__file__).resolve().with_name(program))]
        command += ["--pretend"] if self.run.pretended else ["--device", str(self.run.device.index)]
        return [*command, *(f"--forbid={path}" for path in sorted(forbidden))]

    def _tell_of_workers(self, what: str) -> None:
        self.run.failed("checking and compiling", what)

    def _worker_count(self) -> int:
        if self.run.device.type != "cuda":
            return 1
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        free = torch.cuda.mem_get_info()[0]
        return max(1, min(12, processors - 1, int(free / 8e9)))

    def jobs(self, section: str) -> list[Job]:
        """Return what a section measures, the important first."""
        if section in ("stages", "paper", "shapes"):
            seconds = 2.0 if self.run.pretended else UNCHECKED
            return [
                Job(setting.label, seconds, lambda setting=setting: self._operator(setting))  # type: ignore[misc]
                for setting in self.settings(section)
            ]
        if section == "tuning":
            probes = [
                Job(state, own, lambda state=state, own=own: self._tuning(state, own))  # type: ignore[misc]
                for state, own in zip(TUNING_STATES, (5.0,) if self.run.pretended else (40.0, 25.0, 20.0), strict=False)
            ]
            return [Job("looking up", 2.0, self._look_up), *probes]
        if self.run.pretended:
            groups = gpu_models.pretended_groups(section)
        else:
            groups = gpu_models.groups() if section == "models" else gpu_models.more_groups()
        return [Job(group.label, group.seconds, lambda group=group: self._models(group)) for group in groups]  # type: ignore[misc]

    def settings(self, section: str) -> list[Setting]:
        """Return the settings of one of the operator's sections."""
        if self.run.pretended:
            return gpu_operator.pretended_settings(section)
        makers = {
            "stages": gpu_operator.stage_settings,
            "paper": gpu_operator.paper_settings,
            "shapes": gpu_operator.shape_settings,
        }
        return makers[section]()

    def _operator(self, setting: Setting) -> None:
        if (cause := self.workers.deadly.get(setting.label)) is not None:
            raise RuntimeError(f"it may cost this process too: {cause}")
        found = self.workers.found.get(setting.label, {})
        rates = self.run.content["rates"]
        seconds = 0.01 if self.run.pretended else 0.6
        row = gpu_operator.measure(setting, self.watch, rates, found, seconds)
        self.run.content["operator"].append(row)
        parts = []
        for kind, result in row["results"].items():
            if result["paths"]:
                ours, (path, theirs) = gpu_report.chosen_ms(result), gpu_report.pytorch(result)
                pair = f"{gpu_report.number(ours)} ms ({result['chosen']}), {path} {gpu_report.number(theirs)}"
                parts.append(f"{gpu_report.KIND_NAMES[kind]} {pair}")
        self.run.say(f"{setting.label}: {'; '.join(parts) or 'nothing could be timed'}")

    def _look_up(self) -> None:
        self.run.content["look_up"] = found = gpu_tuning.measure_look_up(self.run.device)
        self.run.say(f"a look-up adds {found['added_microseconds']:.1f} µs")

    def _tuning(self, state: str, seconds: float) -> None:
        """Tune a network in a process of its own, whose caches are empty, half empty, or as the last one left them.

        Args:
            state: One of `TUNING_STATES`.
            seconds: That it takes, about; a process that hangs must not take those of everything else.
        """
        folder = self.folder / "tuning"
        first = state == TUNING_STATES[0]
        if not first and "tuning_seconds" not in self.run.content["tuning"].get(TUNING_STATES[0], {}):
            raise RuntimeError(f"'{TUNING_STATES[0]}' did not work, on which this builds")
        choices = folder / ("choices of the first" if first else "choices of the others")
        environment = {**os.environ, "LK_BACKBONES_CACHE": str(choices), "TRITON_CACHE_DIR": str(folder / "triton")}
        limit = min(max(10.0, self.run.left), max(60.0, 3 * seconds))
        answer = subprocess.run(
            self._helper("gpu_tuning.py"), env=environment, capture_output=True, text=True, timeout=limit
        )
        lines = answer.stdout.strip().splitlines()
        if answer.returncode or not lines:
            last = (answer.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"the process ended with status {answer.returncode}: {last}")
        self.run.content["tuning"][state] = found = json.loads(lines[-1])
        self.run.say(f"tuning, {state}: {found.get('tuning_seconds', found.get('failed'))}")

    def _models(self, group: gpu_models.Group) -> None:
        seconds = 0.05 if self.run.pretended else 1.5
        self.run.compiling = group.compiled
        try:
            found = gpu_models.measure_group(group, self.run.device, seconds, self.run.say)
        finally:
            self.run.compiling = False
        self.run.content["models"].append(found)
        for label, entry in found["models"].items():
            rate = entry.get("images_per_second")
            text = f"{rate:.0f} images/s" if rate else entry.get("failed")
            self.run.say(f"{group.kind} {group.size} px, {label}: {text}")

    def measure(self) -> None:
        """Go through all sections within their shares, then through what they had to leave out."""
        run = self.run
        left_out: dict[str, list[Job]] = {}
        for section in SHARES:
            if section not in self.wanted:
                run.content["sections"][section] = {"state": "not asked for", "seconds": 0.0, "left_out": []}
        shares = {name: share for name, share in SHARES.items() if name in self.wanted}
        for position, (section, share) in enumerate(shares.items()):
            later = sum(list(shares.values())[position:])
            left_out[section] = self._section(section, self.jobs(section), max(0.0, run.left) * share / later)
        for section, jobs in left_out.items():
            if jobs and run.left > 5:
                run.say(f"once more {section}, {len(jobs)} left")
                self._section(section, jobs, run.left, again=True)

    def _section(self, section: str, jobs: list[Job], seconds: float, again: bool = False) -> list[Job]:
        """Do jobs for some seconds; return those that there was no time for.

        Args:
            section: Which.
            jobs: What to do.
            seconds: How long.
            again: Whether they were left out before; these seconds are the last of the run, and nothing may take more.
        """
        run, begin = self.run, time.monotonic()
        deadline = begin + seconds
        state = run.content["sections"].setdefault(section, {"state": "", "seconds": 0.0, "left_out": []})
        run.say(f"{section}: {len(jobs)} measurements, {seconds:.0f} s")
        before, todo = state["seconds"], list(jobs)
        waiting: list[Job] = []
        begun = False

        def note() -> None:
            state["left_out"] = [job.label for job in (*waiting, *todo)]
            state["state"] = "time was up" if state["left_out"] else "complete"
            state["seconds"] = before + time.monotonic() - begin

        note()
        if section in ("stages", "paper", "shapes") and seconds >= (5 if run.pretended else LEAST_CHECK):
            labels = {job.label for job in todo}
            settings = [setting for setting in self.settings(section) if setting.label in labels]
            run.say(f"checking and compiling in {self.workers.count} processes")
            self.workers.check(settings, begin + 0.55 * seconds, deadline)
            checked = {setting.label for setting in settings if self.workers.is_checked(setting)}
            run.say(f"{len(checked)} of {len(settings)} checked")
            for job in todo:
                if job.label in checked:
                    job.seconds = min(job.seconds, CHECKED)
            todo.sort(key=lambda job: job.label not in checked)  # what is compiled is quickly done
        elif section in ("models", "more models") and run.content["machine"].get("memory_gb", 64) < 64:
            self.workers.close()  # their contexts take memory that models may need
        while todo:
            job = todo[0]
            # A short one that is the first is begun with less, too: better one figure too late than none.
            hurried = not begun and not again and job.seconds <= SHORT
            if deadline - time.monotonic() < (0.3 if hurried else 1.0) * job.seconds:
                waiting.append(todo.pop(0))
                continue
            begun = True
            note()  # what is cut short counts as left out
            try:
                job.run()
            except DeviceLost:
                raise
            except Exception as error:
                run.failed(f"{section}, {job.label}", explain_failure(error))
            todo.pop(0)
            free_memory()
            note()
            run.save()
        note()
        run.save(plots=section == "models")  # half-way
        if waiting:
            run.say(f"{section}: no time for {len(waiting)} of {len(jobs)}")
        return waiting


def _interrupt(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _watch(run: Run, folder: Path) -> None:
    """End the program when it compiles as its time is up, or hangs beyond it."""
    while True:
        compiling = run.compiling
        grace = 0.0 if compiling else GRACE + (LAST_SAVE if run.ending else 0.0)
        if run.left <= -grace:
            break
        time.sleep(1)
    if compiling:
        run.say("the time is up while a model is being compiled: saving and leaving")
        run.content["state"] = "the time was up"
    else:
        run.say("something does not come to an end: saving and leaving")
        run.content["state"] = "did not come to an end"
        run.content["failures"].append({"where": "the end", "what": f"still busy {grace:.0f} s after the time was up"})

    def leave() -> None:
        run.save(plots=True)
        run.sum_up()
        shutil.rmtree(folder, ignore_errors=True)

    leaving = threading.Thread(target=leave, daemon=True)  # what hangs may hang in saving
    leaving.start()
    leaving.join(LAST_SAVE)
    stop_workers(patience=0.0)
    os._exit(0 if compiling else 3)


def _card_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "pretended card"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def new_content(pretended: bool, minutes: float, card: str) -> dict[str, Any]:
    """Return what the JSON holds when nothing is measured yet."""
    return {
        "format": 1,
        "pretended": pretended,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "minutes": minutes,
        "state": "running",
        "seconds": 0.0,
        "machine": {"card": card},
        "rates": {},
        "condition": {},
        "targets": [],
        "sections": {name: {"state": "not begun", "seconds": 0.0, "left_out": []} for name in SHARES},
        "operator": [],
        "tuning": {},
        "look_up": {},
        "models": [],
        "failures": [],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="that it may take; %(default)g by default")
    parser.add_argument("--output", type=Path, help="stem of the files; docs/benchmarks/gpu_<card> by default")
    parser.add_argument("--only", action="append", choices=SHARES, default=[], help="a section; may be given again")
    parser.add_argument("--device", type=int, default=0, help="index of the card")
    parser.add_argument(
        "--pretend",
        action="store_true",
        help="for developers: go through the whole program on a CPU, with kernels in Triton's interpreter and tiny "
        "shapes; names of files end in _pretended and the figures tell nothing",
    )
    arguments = parser.parse_args()

    if arguments.pretend:
        device = torch.device("cpu")
        pretend()
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        print(
            "benchmarks/gpu.py needs an NVIDIA GPU with a CUDA build of PyTorch, and PyTorch sees none here "
            f"(torch {torch.__version__}, CUDA {torch.version.cuda}). On a CPU there are benchmarks/depthwise.py and "
            "benchmarks/models.py; --pretend goes through this program without measuring anything real.",
            file=sys.stderr,
        )
        return 2
    else:
        device = torch.device("cuda", arguments.device)
        torch.cuda.set_device(device)

    stem: Path = arguments.output or FOLDER / f"gpu_{_card_name(device)}"
    if arguments.pretend:
        stem = stem.with_name(f"{stem.name}_pretended")
    run = Run(stem, 60 * arguments.minutes, arguments.pretend, device)
    run.content = new_content(arguments.pretend, arguments.minutes, _card_name(device))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)

    status = 0
    with tempfile.TemporaryDirectory(prefix="lk_backbones_gpu_", ignore_cleanup_errors=True) as name:
        threading.Thread(target=_watch, args=(run, Path(name)), daemon=True).start()
        use_folders_of_our_own(Path(name))
        sections = None
        try:
            run.save()  # whether it can be written is better known before than after
            run.content["machine"] = describe_device(device)
            sections = Sections(run, Path(name), arguments.only)
            run.say(f"{run.content['machine']['card']}: its own rates")
            run.content["rates"] = measure_rates(sections.watch)
            run.say(gpu_report.rates_line(run.content["rates"]))
            run.content["condition"]["beginning"] = measure_condition(sections.watch)
            run.save()
            sections.measure()
            run.ending = True
            run.content["condition"]["end"] = measure_condition(sections.watch)
            cut_short = any(own["left_out"] for own in run.content["sections"].values())
            run.content["state"] = "the time was up" if cut_short else "complete"
        except DeviceLost as lost:
            run.content["state"] = "the device was lost"
            run.failed("the device", f"does not work any more in this process: {lost}")
            status = 3
        except SystemExit as ending:
            run.content["state"] = "interrupted"
            status = int(ending.code or 0)
        finally:
            if sections is not None:
                sections.workers.close()
            with contextlib.suppress(Exception) if status else contextlib.nullcontext():
                run.save(plots=True)
    run.sum_up()
    return status


if __name__ == "__main__":
    sys.exit(main())
