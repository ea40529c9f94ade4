"""Processes that compile and check candidates for ``gpu.py`` before it times them.

Compiling is most of the work of a first run and uses one processor at a time, so several processes share it; what they
compile is found by the others in Triton's cache on the disk. Whatever crashes there, crashes there: an access to wrong
memory ends a worker, and what it was at is never run in the process that measures.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_device import DeviceLost, explain_failure, forbid, forbidden, start_helper
from gpu_operator import KINDS_TOGETHER, Setting, check

MARK = "@gpu "  # lines of a worker that are meant for us begin with it
START_PATIENCE = 90.0  # seconds until a worker is up
PATIENCE = 45.0  # seconds for one candidate, its compilation included
SUSPECT = 20.0  # seconds after which a candidate is to blame when all workers are ended


def serve(device: torch.device) -> None:
    """Be a worker: read tasks from the standard input, write what is found to the standard output."""

    def say(**message: Any) -> None:
        print(MARK + json.dumps(message), flush=True)

    torch.zeros(1, device=device).add(1).item()
    say(ready=True)
    for line in sys.stdin:
        task = json.loads(line)
        setting = Setting.from_json(task["setting"])
        without = {(kind, path) for kind, path in task["without"]}
        failed = None
        try:
            try:
                for found in check(
                    setting, tuple(task["kinds"]), device, without, lambda kind, path: say(starting=[kind, path])
                ):
                    say(found=found)
            except DeviceLost:
                raise
            except Exception as error:  # such as no memory for the operands
                failed = explain_failure(error)
        except DeviceLost as lost:
            say(lost=str(lost))
            sys.exit(3)
        say(done=True, failed=failed)


@dataclass
class Task:
    """Some results of a setting to be checked."""

    setting: Setting
    kinds: tuple[str, ...]


@dataclass
class Workers:
    """A few workers that live until they are closed; idle ones do not disturb measurements.

    Attributes:
        command: Starts a worker.
        count: How many there may be.
        progress: Told what goes wrong.
        found: What they found: by setting, result and path.
        complete: Settings of which everything was checked.
        deadly: Settings that cost a worker while no candidate ran, as by their reference, and how it ended.
    """

    command: list[str]
    count: int
    progress: Callable[[str], None]
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    complete: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)
    deadly: dict[str, str] = field(default_factory=dict)
    _idle: list[_Worker] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _unusable: bool = False
    _closing: bool = False

    def is_checked(self, setting: Setting) -> bool:
        """Return whether all results of a setting were checked."""
        return all((setting.label, kinds) in self.complete for kinds in KINDS_TOGETHER)

    def check(self, settings: list[Setting], deadline: float, end: float) -> None:
        """Check settings, in this order, until all are done or the time is up.

        Args:
            settings: What to check.
            deadline: When no further task is begun.
            end: When those that have begun are given up, at the latest.
        """
        self._closing = False
        tasks = deque(
            Task(setting, kinds)
            for setting in settings
            for kinds in KINDS_TOGETHER
            if (setting.label, kinds) not in self.complete
        )
        threads = [
            threading.Thread(target=self._work, args=(tasks, deadline), daemon=True)
            for _ in range(min(self.count, len(tasks)))
        ]
        for thread in threads:
            thread.start()
        _join(threads, min(deadline + 30, end))
        if any(thread.is_alive() for thread in threads):  # a candidate that takes forever
            self.progress("a worker does not come to an end and is stopped")
            self.close()
            _join(threads, time.monotonic() + 5)

    def _work(self, tasks: deque[Task], deadline: float) -> None:
        worker = None
        while tasks and time.monotonic() < deadline and not self._unusable:
            try:
                task = tasks.popleft()
            except IndexError:  # another thread was faster
                break
            worker = worker or self._take()
            if worker is None and self._closing:
                break
            if worker is None:
                self._unusable = True
                self.progress("no worker could be started: this process checks and compiles by itself")
                break
            worker = self._run(worker, task, deadline)
        if worker is not None:
            with self._lock:
                self._idle.append(worker)

    def _take(self) -> _Worker | None:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive():
                    return worker
        worker = _Worker(self.command)
        message = worker.receive(START_PATIENCE)
        if message.get("ready"):
            return worker
        worker.kill()
        if not self._closing:
            self.progress(f"a worker could not be started: {message.get('lost')}")
        return None

    def _run(self, worker: _Worker, task: Task, deadline: float) -> _Worker | None:
        """Run a task, in new workers as long as old ones die of it; return one that lives."""
        label = task.setting.label
        with self._lock:
            own = self.found.setdefault(label, {})
            for kind in task.kinds:
                own.setdefault(kind, {})
        current: _Worker | None = worker
        while current is not None:
            without = [[kind, path] for kind in task.kinds for path in {*own[kind], *forbidden}]
            current.send({"setting": task.setting.to_json(), "kinds": task.kinds, "without": without})
            at: list[str] | None = None
            since = time.monotonic()
            while True:
                message = current.receive(PATIENCE)
                if "lost" in message:
                    current.kill()
                    cause, taken = message["lost"], time.monotonic() - since
                    if self._closing:  # it died by our hand
                        if taken < SUSPECT:
                            return None
                        cause = f"it was not done after {taken:.0f} s"
                    if at is None:
                        self.deadly[label] = cause
                        self.progress(f"{label} cost its process while no candidate ran, and is left out: {cause}")
                        return None
                    own[at[0]][at[1]] = {"kind": at[0], "path": at[1], "failed": f"its process was lost: {cause}"}
                    forbid(at[1])
                    self.progress(f"{label}: {at[0]} by {at[1]} cost its process: {cause}")
                    current = self._take() if time.monotonic() < deadline and not self._closing else None
                    break
                if "starting" in message:
                    at, since = message["starting"], time.monotonic()
                elif "found" in message:
                    own[message["found"]["kind"]][message["found"]["path"]] = message["found"]
                    at, since = None, time.monotonic()  # a reference may come next
                elif message.get("done"):
                    if message.get("failed"):
                        self.progress(f"{label} cannot be checked: {message['failed']}")
                    else:
                        self.complete.add((label, task.kinds))
                    return current
        return None

    def close(self) -> None:
        """End all workers that wait for work, and those that do not come to an end."""
        self._closing = True
        with self._lock:
            self._idle.clear()
        stop_workers()


def _join(threads: list[threading.Thread], until: float) -> None:
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


class _Worker:
    """One process and what it says."""

    started: list[_Worker] = []  # noqa: RUF012 (all of this process, to be ended with it)

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        _Worker.started.append(self)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._lines.put(line.removeprefix(MARK))
        self._lines.put(None)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:  # it is dead, which `receive` notices
            pass

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the next message; one with ``lost``, and how, if the process has died or says nothing."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.kill()
            self.wait(1)
            return {"lost": f"it said nothing for {seconds:.0f} s{self._last_words()}"}
        if line is not None:
            message: dict[str, Any] = json.loads(line)
            return message
        self.wait(1)  # its output is closed: it is about to end
        return {"lost": f"it ended with status {self._process.returncode}{self._last_words()}"}

    def _last_words(self) -> str:
        """Return the last line of its errors, of a process that has ended."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4096))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""

    def kill(self) -> None:
        self._process.kill()
        self._lines.put(None)  # who waits for its messages need not wait until the driver lets it go

    def wait(self, seconds: float) -> None:
        """Wait for its end, but not forever: the driver may hold a process that is killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)


def stop_workers(patience: float = 5.0) -> None:
    """End all workers of this process, and wait some seconds for it."""
    workers = list(_Worker.started)
    _Worker.started.clear()
    for worker in workers:
        worker.kill()
    until = time.monotonic() + patience
    for worker in workers:
        worker.wait(max(0.0, until - time.monotonic()))


if __name__ == "__main__":
    serve(start_helper())
