"""A Hub of one's own for every test, an empty cache, and fresh processes that use both."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import logging as hub_logging

from lk_backbones.weights import download
from tests.hub.server import LoopbackHub

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    server = LoopbackHub()
    yield server
    server.close()


def forget_sessions() -> None:
    """Clients before 1.0 look at the offline mode when they open a session, and keep it."""
    if hasattr(huggingface_hub.utils, "reset_sessions"):
        huggingface_hub.utils.reset_sessions()


@pytest.fixture(autouse=True)
def client(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the client in this process to the server, as HF_ENDPOINT does at its import; returns the empty cache."""
    cache = tmp_path / "cache"
    download._listing.cache_clear()  # another test's server may have had this one's port, and lied
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    # older clients make it once, at import
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LK_BACKBONES_NAMESPACE"):
        monkeypatch.delenv(variable, raising=False)
    hub_logging.set_verbosity_error()
    forget_sessions()
    # the client's pauses between attempts, shortened
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    return cache


@pytest.fixture
def process(hub: LoopbackHub, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a Python script in a process of its own, set up by the environment alone, with an empty cache."""

    def start(script: str, *args: str, **options: Any) -> subprocess.Popen[str]:
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TORCH_HOME": str(tmp_path / "torch"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(
                torch.get_num_threads()
            ),  # the order of sums, for outputs that are compared bit for bit
        }
        for variable in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "LK_BACKBONES_NAMESPACE"):
            environment.pop(variable, None)
        environment |= options.pop("env", {})
        command = [sys.executable, "-c", script, *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, cwd=tmp_path, **(pipes | options))

    return start


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a process; returns what it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out
