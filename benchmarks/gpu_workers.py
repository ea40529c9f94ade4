"""Processes that compile and check candidates for ``gpu.py`` before it times them.

Compiling is most of the work of a first run and uses one processor at a time, so several processes share it; what they
compile is found by the others in Triton's cache on the disk. Whatever crashes there, crashes there: an access to wrong
memory ends a worker, and what it was at is never run in the process that measures.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_device import DeviceLost, start_helper
from gpu_operator import KINDS_TOGETHER, Setting, check, forbid

MARK = "@gpu "  # lines of a worker that are meant for us begin with it
START_PATIENCE = 90.0  # seconds until a worker is up
PATIENCE = 120.0  # seconds for one candidate, its compilation included


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
        try:
            for found in check(
                setting, tuple(task["kinds"]), device, without, lambda kind, path: say(starting=[kind, path])
            ):
                say(found=found)
        except DeviceLost as lost:
            say(lost=str(lost))
            sys.exit(3)
        except Exception as error:  # such as no memory for the operands
            say(failed=f"{type(error).__name__}: {error}"[:300])
        say(done=True)


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
    """

    command: list[str]
    count: int
    progress: Callable[[str], None]
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    complete: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)
    _idle: list[_Worker] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _unusable: bool = False
    _closing: bool = False

    def is_checked(self, setting: Setting) -> bool:
        """Return whether all results of a setting were checked."""
        return all((setting.label, kinds) in self.complete for kinds in KINDS_TOGETHER)

    def check(self, settings: list[Setting], deadline: float) -> None:
        """Check settings, in this order, until all are done or the time is up; a task that has begun is finished."""
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
        for thread in threads:
            thread.join(max(1.0, deadline + 30 - time.monotonic()))
        if any(thread.is_alive() for thread in threads):  # a candidate that takes forever
            self.progress("a worker does not come to an end and is stopped")
            self.close()
            for thread in threads:
                thread.join(5)

    def _work(self, tasks: deque[Task], deadline: float) -> None:
        worker = None
        while tasks and time.monotonic() < deadline and not self._unusable:
            try:
                task = tasks.popleft()
            except IndexError:  # another thread was faster
                break
            worker = worker or self._take()
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
            if self._idle:
                return self._idle.pop()
        worker = _Worker(self.command)
        message = worker.receive(START_PATIENCE)
        if message is not None and message.get("ready"):
            return worker
        worker.stop()
        return None

    def _run(self, worker: _Worker, task: Task, deadline: float) -> _Worker | None:
        """Run a task, in new workers as long as old ones die of it; return one that lives."""
        with self._lock:
            own = self.found.setdefault(task.setting.label, {})
            for kind in task.kinds:
                own.setdefault(kind, {})
        current: _Worker | None = worker
        while current is not None:
            without = [[kind, path] for kind in task.kinds for path in own[kind]]
            current.send({"setting": task.setting.to_json(), "kinds": task.kinds, "without": without})
            at: list[str] | None = None
            while True:
                message = current.receive(PATIENCE)
                if message is None or "lost" in message:
                    current.stop()
                    if at is None or self._closing:  # it died of the setting itself, or by our hand
                        return None
                    cause = "took too long or died" if message is None else message["lost"]
                    failure = {"kind": at[0], "path": at[1], "failed": f"its process was lost: {cause}"}
                    own[at[0]][at[1]] = failure
                    forbid(at[1])
                    self.progress(f"{task.setting.label}: {at[0]} by {at[1]} cost its process: {cause}")
                    current = self._take() if time.monotonic() < deadline else None
                    break
                if "starting" in message:
                    at = message["starting"]
                elif "found" in message:
                    own[message["found"]["kind"]][message["found"]["path"]] = message["found"]
                elif "failed" in message:
                    self.progress(f"{task.setting.label} cannot be checked: {message['failed']}")
                elif message.get("done"):
                    self.complete.add((task.setting.label, task.kinds))
                    return current
        return None

    def close(self) -> None:
        """End all workers that wait for work, and those that do not come to an end."""
        self._closing = True
        with self._lock:
            self._idle.clear()
        stop_workers()


class _Worker:
    """One process and what it says."""

    started: list[_Worker] = []  # noqa: RUF012 (all of this process, to be ended with it)

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
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

    def send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:  # it is dead, which `receive` notices
            pass

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next message, or ``None`` if the process has died or says nothing."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return None
        return None if line is None else json.loads(line)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def stop_workers() -> None:
    """End all workers of this process."""
    for worker in _Worker.started:
        worker.stop()
    _Worker.started.clear()


if __name__ == "__main__":
    serve(start_helper())
