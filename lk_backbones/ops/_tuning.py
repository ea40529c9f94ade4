"""Choosing a path by measuring: on the device at hand, once per class of shapes, remembered in a file.

Which of several ways to compute is fastest depends on the card, the shape and the library releases. Rather than guess,
every candidate computes the very problem that came up; those whose numbers agree with the reference are timed, and the
fastest is taken from then on for all problems of the class. Classes are coarse in the batch and in the size of maps, so
that inputs of varying size are not measured forever.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from lk_backbones._files import write_atomically

__all__ = ["FOLDER_VARIABLE", "KINDS", "Choice", "Kind", "Problem", "Tuner", "cache_file", "disagreement"]

Kind = Literal["forward", "input_gradient", "weight_gradient"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FOLDER_VARIABLE = "LK_BACKBONES_CACHE"
FORMAT = 1  # of the file; one of another format is begun anew
LARGEST_FILE = 16 * 2**20  # bytes: tens of thousands of classes; what is larger was not written here
PATIENCE = 5.0  # seconds to wait for the file's lock, whose holders need milliseconds
SAMPLES = 5  # timed runs, of which the median counts
CHUNK = 2**24  # values that are compared at once, in float32
SLOW = 3.0  # a candidate that takes this many times as long as the best so far is timed once
RECHECK = 10.0  # seconds after which the file is looked at again for what was not in it
ATTEMPTS = 3  # on numbers that cannot be compared, before made-up ones take their place

_log = logging.getLogger(__name__)


class Problem(NamedTuple):
    """What is to be computed.

    Attributes:
        kind: Which of the three results.
        shape: Of the input, ``(N, C, H, W)``.
        kernel_size: ``(kH, kW)``.
        dilation: ``(dH, dW)``.
        dtype: Of the operands.
        channels_last: Whether the input is laid out in channels_last.
        precision: Of products of float32: ``"ieee"`` or ``"tf32"``.
        device: Index of the device.
    """

    kind: Kind
    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, int]
    dtype: torch.dtype
    channels_last: bool
    precision: str
    device: int

    def describe(self) -> dict[str, str]:
        """Say which class it belongs to, in words, beside the device and the releases."""
        batch, channels, height, width = self.shape
        dtype = str(self.dtype).removeprefix("torch.")
        # Rows of whole vectors of 16 bytes need no copy; whether they are decides as much as the size.
        row = math.gcd(width * self.dtype.itemsize, 16)
        return {
            "result": self.kind,
            "dtype": dtype if self.dtype != torch.float32 else f"{dtype} ({self.precision})",
            "layout": "channels_last" if self.channels_last else "contiguous",
            "batch": f"~{_bucket(batch, 1)}",
            "channels": str(channels),
            "map": f"~{_bucket(height, 4)}x{_bucket(width, 4)}, rows of {row} bytes",
            "kernel": f"{self.kernel_size[0]}x{self.kernel_size[1]}"
            + ("" if self.dilation == (1, 1) else f", dilation {self.dilation[0]}x{self.dilation[1]}"),
        }


@dataclass(frozen=True)
class Choice:
    """What was measured for a class of problems.

    Attributes:
        path: The fastest of those whose numbers agree.
        milliseconds: Time of each path that was timed.
        rejected: Why the others were not, in words.
    """

    path: str
    milliseconds: Mapping[str, float]
    rejected: Mapping[str, str] = field(default_factory=dict)


def _bucket(size: int, steps: int) -> int:
    """Return what stands for a size and those near it, of which each doubling has ``steps``."""
    return round(2 ** (round(math.log2(max(size, 1)) * steps) / steps))


def cache_file() -> Path:
    """Return where choices are kept: in the folder that ``LK_BACKBONES_CACHE`` names, else the user's for caches."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        return Path(folder) / "depthwise.json"
    if sys.platform == "win32":
        parent = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return parent / "lk_backbones" / "depthwise.json"


class Tuner:
    """Measures, remembers, and keeps what it remembers in a file that other processes write too.

    The file is read when something is not known yet and the file has changed. It is written whole, under a lock that
    nobody waits for long; what others have written meanwhile is kept. A file that cannot be read is begun anew; where
    none can be written, choices last as long as the process.

    Args:
        device_name: Tells the device of an index, with its compute capability.
        timer: Tells how many milliseconds a call takes, on average over a number of calls in a row.
        file: Where choices are kept; `cache_file` if ``None``.
        releases: Tells the libraries' releases that times depend on.

    Attributes:
        known: The problems that came up, for calls that cannot wait for `look_up`.
    """

    def __init__(
        self,
        device_name: Callable[[int], str],
        timer: Callable[[Callable[[], object], int], float],
        file: Path | None = None,
        releases: Callable[[], str] = lambda: f"torch {torch.__version__}",
    ) -> None:
        self._device_name = device_name
        self._releases = releases
        self._timer = timer
        self._file = file
        self.known: dict[Problem, Choice] = {}
        self._choices: dict[str, Choice] = {}  # by class, with what the file says
        self._unsaved: dict[str, Choice] = {}
        self._state: tuple[int, int] | None = None  # time and size of the file as it was read
        self._undecided: dict[Problem, int] = {}
        self._missed: dict[Problem, float] = {}  # when it was looked up in vain
        self._outdated: set[str] = set()  # classes that are to be measured again
        self.broken: set[str] = set()  # paths that failed in this process, and not for want of memory
        self._lock = threading.RLock()
        self._warned = self._told_failure = False

    @property
    def file(self) -> Path:
        """Where choices are kept."""
        return cache_file() if self._file is None else self._file

    def look_up(self, problem: Problem, can_compute: Callable[[str], bool] = lambda path: True) -> Choice | None:
        """Return what was measured for problems of this class, in this process or another.

        Args:
            problem: What is to be computed.
            can_compute: Whether a path, of whatever name, can be taken for this very problem.

        Returns:
            What was measured, with the fastest path that can be taken; ``None`` if nothing was, or no path can.
        """
        known = self.known.get(problem)
        if known is not None:
            return known
        if time.monotonic() - self._missed.get(problem, -math.inf) < RECHECK:
            return None
        with self._lock:
            if self.key(problem) not in self._choices:
                self._read()
            choice = self._find(problem, can_compute)
            if choice is None:
                self._missed[problem] = time.monotonic()
            return choice

    def _find(self, problem: Problem, can_compute: Callable[[str], bool]) -> Choice | None:
        """`look_up` in what this process has read or measured."""
        key = self.key(problem)
        choice = self._choices.get(key)
        if choice is None or key in self._outdated:
            return None
        paths = [choice.path, *sorted(choice.milliseconds, key=choice.milliseconds.__getitem__)]
        path = next(filter(can_compute, paths), None)
        if path is None:
            return None
        self.known[problem] = choice = replace(choice, path=path)
        return choice

    def key(self, problem: Problem) -> str:
        """Return the name of a problem's class."""
        return "; ".join(
            (
                self._device_name(problem.device),
                self._releases(),
                *(f"{name} {value}" for name, value in problem.describe().items()),
            )
        )

    def entries(self) -> dict[str, Choice]:
        """Return everything that is known, by class."""
        with self._lock:
            self._read()
            return dict(self._choices)

    @contextmanager
    def recorded(self) -> Iterator[dict[Problem, Choice]]:
        """Collect the problems that come up within a block, and what was chosen for them; complete after it."""
        problems: dict[Problem, Choice] = {}
        with self._lock:
            before, self.known = self.known, {}
        try:
            yield problems
        finally:
            with self._lock:
                problems.update(self.known)
                self.known = {**before, **problems}

    def measure_again(self) -> None:
        """Let everything that is known be measured once more when it comes up."""
        with self._lock:
            self._read()
            self._outdated = set(self._choices)
            self.known, self._missed = {}, {}

    def measure(
        self,
        problem: Problem,
        candidates: Mapping[str, Callable[[], Tensor]],
        references: Sequence[str],
        made_up: Callable[[], Mapping[str, Callable[[], Tensor]]] | None = None,
    ) -> Choice | None:
        """Time candidates on the numbers at hand, and remember the fastest whose result agrees with the reference's.

        Numbers that are not finite, or all zero, tell nothing about an algorithm, and a first training step has them.
        Then nothing is decided; the third time made-up numbers are taken.

        Args:
            problem: What is to be computed.
            candidates: What computes it, by path; the likely ones first, as what is far slower is not timed at length.
            references: The path whose numbers count; others follow whose count if it cannot compute them.
            made_up: Returns the candidates for made-up numbers.

        Returns:
            The choice, or ``None`` if the numbers do not let one be made.

        Raises:
            Exception: What the last of the references raises if none can compute it, such as `torch.OutOfMemoryError`.
        """
        with self._lock:
            if (known := self._find(problem, candidates.__contains__)) is not None:  # another thread was faster
                return known
            if self._undecided.get(problem, 0) > ATTEMPTS:
                return None
            try:
                reference, expected = _first_result(candidates, references)
            except Exception:
                self._undecided[problem] = ATTEMPTS + 1  # each further attempt would end like this one
                raise
            if not _tells_something(expected):
                self._undecided[problem] = self._undecided.get(problem, 0) + 1
                if made_up is None or self._undecided[problem] < ATTEMPTS:
                    return None
                candidates = made_up()
                reference, expected = _first_result(candidates, references)
                if not _tells_something(expected):
                    return None
                made_up = None
            choice, may_be_kept = self._compare(problem, candidates, reference, expected, made_up)
            self.known[problem] = choice
            key = self.key(problem)
            self._outdated.discard(key)
            self._choices[key] = choice
            if may_be_kept:
                self._unsaved[key] = choice
                self._save()
            return choice

    def _compare(
        self,
        problem: Problem,
        candidates: Mapping[str, Callable[[], Tensor]],
        reference: str,
        expected: Tensor,
        made_up: Callable[[], Mapping[str, Callable[[], Tensor]]] | None,
    ) -> tuple[Choice, bool]:
        """Return the choice, and whether it holds beyond this process."""
        tolerance = TOLERANCES[problem.dtype, problem.precision]
        rejected: dict[str, str] = {}
        may_be_kept, agreeing = True, {}
        for path, run in candidates.items():  # all of them first: compiling lets the device rest and cool
            try:
                wrong = disagreement(run(), expected, tolerance)
            except Exception as failure:  # whatever a library throws, others can compute it
                if is_lost(failure):
                    raise
                rejected[path] = _in_a_line(failure)
                may_be_kept = may_be_kept and _is_lasting(failure)
                if not (_is_lasting(failure) or isinstance(failure, torch.OutOfMemoryError)):
                    self.broken.add(path)
                self._tell_failure(path, self.key(problem), rejected[path], expected=_is_lasting(failure))
                continue
            if wrong:
                rejected[path] = f"wrong numbers: {wrong}"
                may_be_kept = may_be_kept and (
                    made_up is None or _is_wrong_again(path, reference, made_up(), tolerance)
                )
                _log.warning("path %s is not used for %s: %s", path, self.key(problem), rejected[path])
            else:
                agreeing[path] = run
        times = self._time(agreeing)
        path = min(times, key=times.__getitem__) if times else reference
        return Choice(path, times, rejected), may_be_kept and bool(times)

    def _time(self, candidates: Mapping[str, Callable[[], Tensor]]) -> dict[str, float]:
        """Milliseconds of each: the median of a few samples, taken in turn, so that what else goes on hits all alike.

        Short calls are timed many in a row, as a queue of work runs them.
        """
        first = {path: self._timer(run, 1) for path, run in candidates.items()}
        best = min(first.values(), default=0.0)
        # What seems far slower is left at that; a short time may be mostly the way to the device.
        close = [path for path, took in first.items() if took <= max(SLOW * best, 0.2)]
        calls = {path: max(1, min(20, round(1 / max(first[path], 1e-3)))) for path in close}
        samples: dict[str, list[float]] = {path: [] for path in close}
        for _ in range(SAMPLES):
            for path in close:
                samples[path].append(self._timer(candidates[path], calls[path]))
        return {**first, **{path: statistics.median(taken) for path, taken in samples.items()}}

    def _tell_failure(self, path: str, key: str, reason: str, expected: bool) -> None:
        """Say that a path failed: once per process so that it is seen, as a broken installation would just be slow."""
        level = logging.INFO if expected or self._told_failure else logging.WARNING
        self._told_failure = self._told_failure or not expected
        _log.log(level, "path %s is not used for %s: %s", path, key, reason)

    def _read(self) -> None:
        """Take over what is in the file, if it has changed."""
        try:
            status = self.file.stat()
            state = status.st_mtime_ns, status.st_size
            if state == self._state:
                return
            if status.st_size > LARGEST_FILE:
                raise ValueError(f"it has {status.st_size} bytes")
            found = _parse(self.file.read_bytes())
        except FileNotFoundError:
            return
        except Exception as error:  # whatever is wrong with it, convolutions must go on
            self._warn(f"what was measured earlier cannot be read and is begun anew: {_in_a_line(error)}")
            return
        self._state = state
        self._choices = {**found, **self._unsaved}

    def _save(self) -> None:
        """Write what is new, with what others have written since."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.file}.lock", timeout=PATIENCE):
                self._read()
                entries = {key: asdict(choice) for key, choice in sorted(self._choices.items())}
                with write_atomically(self.file) as file:
                    file.write(json.dumps({"format": FORMAT, "choices": entries}, indent=1).encode())
            self._unsaved.clear()
        except Timeout:
            _log.info("%s is being written by others; the next choice is saved with this one", self.file)
        except Exception as error:  # a folder that is read-only or not to be found, a file system without locks
            self._warn(f"what is measured lasts as long as this process, as it cannot be written: {_in_a_line(error)}")

    def _warn(self, message: str) -> None:
        if not self._warned:
            _log.warning("%s", message)
        self._warned = True


# Relative L2 errors up to which results agree: both are rounded, and sums are taken in another order.
TOLERANCES = {
    (torch.float16, "ieee"): 2e-3,
    (torch.bfloat16, "ieee"): 1.5e-2,
    (torch.float32, "ieee"): 2e-5,
    (torch.float32, "tf32"): 3e-3,
    (torch.float64, "ieee"): 1e-12,
}


def disagreement(actual: Tensor, expected: Tensor, tolerance: float) -> str:
    """Return in what a result is not the expected one, in words; nothing if it agrees.

    The relative L2 error must be within the tolerance, that of each map within eight times as much (a map that is
    missing), and the largest error within four times as much of the largest value (a pixel that is missing): errors of
    tiles, edges and images would vanish in a sum over everything.

    Args:
        actual: Of any shape.
        expected: What it is compared with.
        tolerance: See `TOLERANCES`.
    """
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)} rather than {tuple(expected.shape)}"
    maps, largest_error, largest_value = [], 0.0, 0.0
    step = max(1, CHUNK // max(1, expected[0].numel())) if expected.dim() else 1
    for mine, theirs in zip(_chunks(actual, step), _chunks(expected, step), strict=True):
        dtype = torch.promote_types(theirs.dtype, torch.float32)
        rows = math.prod(theirs.shape[:-2])
        error, value = (mine.to(dtype) - theirs).reshape(rows, -1), theirs.to(dtype).reshape(rows, -1)
        maps.append(torch.stack([torch.linalg.vector_norm(error, dim=1), torch.linalg.vector_norm(value, dim=1)]))
        largest_error = max(largest_error, float(error.abs().max()) if bool(torch.isfinite(error).all()) else math.inf)
        largest_value = max(largest_value, float(value.abs().max()))
    norms = torch.cat(maps, 1).double()
    whole = torch.linalg.vector_norm(norms, dim=1)
    relative = float(whole[0] / whole[1])
    if not relative <= tolerance:
        return f"relative error {relative:.1e}, at most {tolerance:.0e} allowed"
    # A map that is nearly empty beside the others is judged by what they are like.
    typical = whole[1] / math.sqrt(norms.shape[1])
    of_map = float((norms[0] / (norms[1] + 0.01 * typical)).max())
    if not of_map <= 8 * tolerance:
        return f"relative error {of_map:.1e} of one map, at most {8 * tolerance:.0e} allowed"
    if not largest_error <= 4 * tolerance * largest_value:
        return (
            f"a value is off by {largest_error / largest_value:.1e} of the largest, at most {4 * tolerance:.0e} allowed"
        )
    return ""


def _chunks(values: Tensor, step: int) -> tuple[Tensor, ...]:
    return values.split(step) if values.dim() else (values,)


def is_lost(error: BaseException) -> bool:
    """Return whether a device is of no use to this process any more, whatever is chosen."""
    return isinstance(error, getattr(torch, "AcceleratorError", ()))


def _is_lasting(failure: Exception) -> bool:
    """Return whether a path would fail every time: more memory, a compiler or room on the disk would not help."""
    lacks_kernel = type(failure).__name__ in ("OutOfResources", "NotImplementedError")
    return lacks_kernel or "unable to find an engine" in str(failure)  # cuDNN


def _is_wrong_again(
    path: str, reference: str, candidates: Mapping[str, Callable[[], Tensor]], tolerance: float
) -> bool:
    """Return whether a path also gives wrong numbers of operands that are as they should be."""
    try:
        return bool(disagreement(candidates[path](), candidates[reference](), tolerance))
    except Exception as failure:
        if is_lost(failure):
            raise
        return False


def _first_result(candidates: Mapping[str, Callable[[], Tensor]], references: Sequence[str]) -> tuple[str, Tensor]:
    """Return the first of the references that can compute it, and its result."""
    *others, last = [path for path in references if path in candidates]
    for path in others:
        try:
            return path, candidates[path]()
        except Exception as failure:  # mostly memory, of which others need less
            if is_lost(failure):
                raise
            _log.info("path %s computes nothing to compare with: %s", path, failure)
    return last, candidates[last]()


def _tells_something(expected: Tensor) -> bool:
    """Return whether a result can be compared: errors of tiny numbers vanish, or are those of rounding to zero."""
    smallest = torch.finfo(expected.dtype).tiny
    squared = torch.finfo(torch.promote_types(expected.dtype, torch.float32)).tiny
    norm = _norm(expected)
    return math.isfinite(norm) and norm > max(smallest, 1e6 * math.sqrt(squared)) * math.sqrt(expected.numel())


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32)))


def _parse(content: bytes) -> dict[str, Choice]:
    """Read a file's choices; those that are not as we write them are left out.

    Raises:
        ValueError: If it is no such file, or of another format.
    """
    data: Any = json.loads(content)
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("choices"), dict):
        raise ValueError(f"it is not of format {FORMAT}")
    choices = {}
    for key, entry in data["choices"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            continue
        times, rejected = entry.get("milliseconds"), entry.get("rejected")
        if not isinstance(times, dict) or not isinstance(rejected, dict):
            continue
        numbers = all(isinstance(took, float | int) and math.isfinite(took) and took >= 0 for took in times.values())
        if numbers and all(isinstance(reason, str) for reason in rejected.values()):
            choices[key] = Choice(entry["path"], times, rejected)
    return choices
