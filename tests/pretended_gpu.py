"""A fixture that lets the CUDA road run on a CPU: kernels through Triton's interpreter, times that are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lk_backbones.ops import _cuda, _paths, _tuning


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[dict[str, Any]]:
    """Milliseconds that each path seems to take, for a test to set, and under ``"timed"`` which paths were timed."""
    pytest.importorskip("triton", reason="Triton does not exist for this platform")
    if torch.cuda.is_available():
        pytest.skip("this is the pretence for machines without a GPU")
    from lk_backbones.ops import _triton

    monkeypatch.delenv("LK_BACKBONES_DEPTHWISE", raising=False)
    monkeypatch.setattr(_paths, "device_type", lambda tensor: "cuda")
    monkeypatch.setattr(_cuda, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_cuda, "device_name", lambda device: "Pretended Card (9.0)")
    small = {name: _triton.Config(16, 32, 32, 4, 3) for name in ("triton", "triton-wide")}
    monkeypatch.setattr(_triton, "CONFIGS", small)
    monkeypatch.setattr(_triton, "worth_timing", lambda *arguments: list(small))
    timed: list[str] = []
    milliseconds: dict[str, Any] = {"timed": timed}

    def clock(run: Callable[[], object], calls: int) -> float:
        path = run.args[0]  # type: ignore[attr-defined]
        timed.append(path)
        return float(milliseconds.get(path, 100.0))

    monkeypatch.setattr(_cuda, "tuner", _tuning.Tuner(_cuda.device_name, clock, tmp_path / "choices.json"))
    monkeypatch.setattr(_cuda, "precision", lambda dtype: "ieee")
    monkeypatch.setattr(_cuda, "_products", lambda input: "ieee")  # the interpreter knows no others
    _paths._cached_plan.cache_clear()
    yield milliseconds
    _paths._cached_plan.cache_clear()
