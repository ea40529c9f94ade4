"""The benchmark for GPUs goes through all it has on a CPU, at tiny shapes, and survives what may go wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton does not exist for this platform")
ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SECTIONS = ["stages", "tuning", "models", "paper", "shapes", "more models"]
KINDS = ["forward", "input_gradient", "weight_gradient"]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


Pretended = tuple[Path, dict[str, Any], str]


def pretended_run(tmp_path: Path) -> Pretended:
    """Folder, JSON and output of a run through everything; what the user's cache and variables say must not matter."""
    folder = tmp_path
    user = folder / "of the user"
    arguments = ("--pretend", "--minutes", "5", "--output", str(folder / "card.1"))
    result = run(*arguments, TRITON_INTERPRET="1", LK_BACKBONES_CACHE=str(user), LK_BACKBONES_DEPTHWISE="native")
    assert result.returncode == 0, result.stderr
    assert not user.exists()
    return folder, json.loads((folder / "card.1_pretended.json").read_text()), result.stdout


def check_every_section_is_there(pretended: Pretended) -> None:
    _, content, output = pretended
    assert content["pretended"] is True
    assert content["state"] == "complete"
    assert list(content["sections"]) == SECTIONS
    assert {own["state"] for own in content["sections"].values()} == {"complete"}
    assert {row["group"] for row in content["operator"]} == {"stages", "paper", "strips"}
    assert {group["kind"] for group in content["models"]} == {"training", "inference"}
    assert content["tuning"]["nothing known"]["measured_classes"] == 3
    assert content["look_up"]["look_up_microseconds"] > 0
    assert set(content["rates"]) == {"bfloat16", "float16", "tf32", "float32", "copy_gb_per_second"}
    assert content["machine"]["torch"] == torch.__version__
    assert not content["failures"]
    assert set(content["condition"]) == {"begin", "end"}
    assert all(own["bfloat16"] > 0 for own in content["condition"].values())
    assert "min left] " in output
    assert "asked for | measured | met" in output


def check_every_candidate_is_timed_or_its_failure_told(pretended: Pretended) -> None:
    rows = pretended[1]["operator"]
    large = [row for row in rows if row["kernel_width"] >= 7]
    assert large
    assert len(large) < len(rows)
    for row in large:
        assert list(row["results"]) == KINDS
        for result in row["results"].values():
            libraries = {"cudnn", "aten"} if hasattr(torch.backends.cudnn, "depthwise_kernel") else set()
            assert {"triton", "fft", "native"} | libraries <= set(result["paths"])
            assert result["chosen"] == "triton"  # the pretended clock says so
            assert result["ours"]["called_ms_best"] > 0
            for entry in result["paths"].values():
                assert 0 < entry["device_ms_best"] <= entry["device_ms_median"]
                assert entry["error"] <= 1.5e-2
                assert entry["share_of_roofline"] > 0
            assert result["failed"]["triton-raises"] == "RuntimeError: out of resource: pretended shared memory"
            assert result["failed"]["triton-wrong"].startswith("wrong numbers against float64: relative error ")
    (small,) = (row for row in rows if row["kernel_width"] < 7)
    assert not any(path.startswith("triton") for path in small["results"]["forward"]["paths"])


def check_a_model_that_timm_lacks_is_told(pretended: Pretended) -> None:
    (training,) = (group for group in pretended[1]["models"] if group["kind"] == "training")
    entries = training["models"]
    assert "has no model no_such_model" in entries["no_such_model"]["failed"]
    assert all(own["images_per_second"] > 0 for name, own in entries.items() if name != "no_such_model")
    assert len(entries) == 3


def check_tables_and_plots(pretended: Pretended) -> None:
    folder, content, _ = pretended
    text = (folder / "card.1_pretended.md").read_text()
    assert "**Pretended: " in text
    for title in ("Asked for and measured", "Operator", "Errors against float64", "Models", "Failures"):
        assert f"\n## {title}\n" in text
    assert "Nothing was measured" not in text
    assert "pretended shared memory" in text
    assert len(content["targets"]) > 15
    pictures = sorted(path.name for path in folder.glob("*.png"))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not pictures
    else:
        assert pictures == [f"card.1_pretended_{name}.png" for name in ("models", "operator", "roofline")]
    assert not list(folder.glob(".unfinished*"))


def test_a_whole_run(tmp_path: Path) -> None:
    pretended = pretended_run(tmp_path)  # once for all, as it takes half a minute
    check_every_section_is_there(pretended)
    check_every_candidate_is_timed_or_its_failure_told(pretended)
    check_a_model_that_timm_lacks_is_told(pretended)
    check_tables_and_plots(pretended)


def test_a_run_that_is_stopped_leaves_valid_files(tmp_path: Path) -> None:
    result = run("--pretend", "--minutes", "0.05", "--output", str(tmp_path / "card"))
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "card_pretended.json").read_text())
    assert content["state"] == "the time was up"
    states = {own["state"] for own in content["sections"].values()}
    assert "time was up" in states
    assert any(own["left_out"] for own in content["sections"].values())
    text = (tmp_path / "card_pretended.md").read_text()
    assert "not measured" in text
    assert ", left out: " in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    result = run("--output", str(tmp_path / "card"))
    assert result.returncode == 2
    assert "needs an NVIDIA GPU" in result.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ its parts


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_device
    import gpu_operator
    import gpu_report
    import gpu_workers

    return {"device": gpu_device, "operator": gpu_operator, "report": gpu_report, "workers": gpu_workers}


WORKER = """
import json, os, sys
def say(**message):
    print("@gpu " + json.dumps(message), flush=True)
print("something that a library says")
say(ready=True)
for line in sys.stdin:
    task = json.loads(line)
    for kind in task["kinds"]:
        for path in ("a", "deadly", "b"):
            if [kind, path] in task["without"]:
                continue
            say(starting=[kind, path])
            if path == "deadly" and kind == "forward":
                os._exit(9)
            say(found={"kind": kind, "path": path, "error": 0.0})
    say(done=True)
"""


def test_a_candidate_that_ends_its_process_is_noted_and_never_run_again(
    parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden: list[str] = []
    monkeypatch.setattr(parts["workers"], "forbid", forbidden.append)
    said: list[str] = []
    workers = parts["workers"].Workers([sys.executable, "-c", WORKER], 2, said.append)
    settings = parts["operator"].stage_settings()[:2]
    try:
        workers.check(settings, time.monotonic() + 60, time.monotonic() + 90)
    finally:
        workers.close()
    assert forbidden == ["deadly", "deadly"]
    assert len(said) == 2
    for setting in settings:
        assert workers.is_checked(setting)
        found = workers.found[setting.label]
        assert set(found) == set(KINDS)
        assert found["forward"]["deadly"]["failed"].startswith("its process was lost")
        assert all(set(own) == {"a", "deadly", "b"} for own in found.values())
        assert all("failed" not in own["b"] for own in found.values())


def test_without_workers_it_goes_on(parts: dict[str, ModuleType]) -> None:
    said: list[str] = []
    workers = parts["workers"].Workers([sys.executable, "-c", "pass"], 2, said.append)
    settings = parts["operator"].stage_settings()[:2]
    workers.check(settings, time.monotonic() + 60, time.monotonic() + 90)
    assert not any(map(workers.is_checked, settings))
    assert any("no worker could be started" in text for text in said)


def test_what_fails_half_way_through_a_race_is_told(parts: dict[str, ModuleType]) -> None:
    calls = {"good": 0, "tired": 0}

    def good() -> None:
        calls["good"] += 1

    def tired() -> None:
        calls["tired"] += 1
        if calls["tired"] > 30:
            raise RuntimeError("enough\nand more")

    def never() -> None:
        raise ValueError("no such thing")

    watch = parts["device"].Stopwatch(torch.device("cpu"))
    times, failed = watch.race({"never": never, "tired": tired, "good": good}, seconds=1.0, rounds=4)
    assert failed == {"never": "ValueError: no such thing", "tired": "RuntimeError: enough"}
    assert list(times) == ["good"]
    assert times["good"].figures()["samples"] == 4


def figures(milliseconds: float) -> dict[str, float]:
    names = ("device_ms_best", "device_ms_median", "called_ms_best", "called_ms_median")
    return dict.fromkeys(names, milliseconds)


def test_targets_are_judged_by_the_figures(parts: dict[str, ModuleType]) -> None:
    report, operator = parts["report"], parts["operator"]

    def row(setting: Any, ours: float) -> dict[str, Any]:
        result = {
            "chosen": "triton",
            "ours": figures(ours),
            "paths": {"triton": figures(ours), "fft": figures(1.0), "native": figures(4.0), "cudnn": figures(1.2)},
            "toeplitz_ms": 0.1,
            "failed": {},
            "tuned_among": ["triton", "fft", "native"],
        }
        case = setting.case
        return {
            **vars(case),
            "dtype": setting.dtype,
            "layout": "contiguous",
            "label": setting.label,
            "results": dict.fromkeys(KINDS, result),
        }

    first, second, large = operator.stage_settings()[:3]
    content: dict[str, Any] = {
        "operator": [row(first, 0.3), row(second, 0.45), row(large, 0.5)],
        "models": [],
        "tuning": {"nothing known": {"tuning_seconds": 21.0, "measured_classes": 12}},
        "look_up": {"added_microseconds": 2.5, "look_up_microseconds": 4.0},
    }
    judged = {own["asked"]: own for own in report.targets(content)}

    def met(start: str) -> bool | None:
        (own,) = (own for asked, own in judged.items() if asked.startswith(start))
        return own["met"]

    assert met("after tuning never slower") is True
    assert met("forward, k ≥ 21") is False  # 1.2 / 0.5
    assert met("forward, 31×31") is True
    assert met("stage 1 forward (") is True
    assert met("stage 1 forward: ") is False  # 3 times the roofline
    assert met("stage 1 weight gradient: ") is True
    assert met("stage 2 weight gradient: ") is False
    assert met("forward 51×51 over 31×31") is True
    assert met("tuning RepLKNet-31B") is False
    assert met("a look-up adds") is True
    assert met("RepLKNet-31B trains at 224 px, images/s beside Swin-B") is None
    content["operator"][0]["results"]["forward"]["paths"]["fft"] = figures(0.2)
    judged = {own["asked"]: own for own in report.targets(content)}
    assert met("after tuning never slower") is False
    assert met("forward, 31×31") is False


def test_limits_of_a_card(parts: dict[str, ModuleType]) -> None:
    operator = parts["operator"]
    setting = operator.stage_settings()[0]
    rates = {"bfloat16": 790.0, "tf32": 400.0, "float32": 50.0, "copy_gb_per_second": 4300.0}
    bounds = operator.limits(setting, "forward", rates)
    assert bounds["memory_ms"] == pytest.approx(2 * 64 * 128 * 56 * 56 * 2 / 4300e9 * 1e3)
    assert 0.09 < bounds["toeplitz_ms"] < 0.16
    assert bounds["roofline_ms"] == bounds["toeplitz_ms"]
    assert bounds["direct_ms"] == pytest.approx(setting.case.flops / 50e12 * 1e3)
    unknown = operator.limits(setting, "forward", {"bfloat16": "out of memory"})
    assert all(value is None for value in unknown.values())
    assert math.isclose(operator.toeplitz_flops(setting, "forward"), bounds["toeplitz_ms"] * 790e9)


def test_errors_are_of_the_result_against_float64(parts: dict[str, ModuleType]) -> None:
    operator = parts["operator"]
    case = operator._case("stages", 3, 20, 6, 5)
    setting = operator.Setting(case, "float32")
    operands = setting.operands(torch.device("cpu"))
    for kind in KINDS:
        reference = operator.Reference(kind, operands)
        result = operator.compute(kind, "native", operands)
        assert reference.error(result) < 1e-6
        assert reference.error(1.01 * result) == pytest.approx(0.01, rel=1e-3)


def test_no_setting_is_measured_twice(parts: dict[str, ModuleType]) -> None:
    operator = parts["operator"]
    settings = operator.stage_settings() + operator.paper_settings() + operator.shape_settings()
    assert len({setting.label for setting in settings}) == len(settings)
    assert all(operator.Setting.from_json(json.loads(json.dumps(own.to_json()))) == own for own in settings)
