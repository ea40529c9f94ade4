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
    assert set(content["condition"]) == {"beginning", "end"}
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
    import gpu
    import gpu_device
    import gpu_operator
    import gpu_report
    import gpu_workers

    return {
        "gpu": gpu,
        "device": gpu_device,
        "operator": gpu_operator,
        "report": gpu_report,
        "workers": gpu_workers,
    }


def new_run(gpu: ModuleType, folder: Path, seconds: float, pretended: bool = False) -> Any:
    """A run that has so many seconds left, on a CPU."""
    began = time.monotonic() - gpu.BEGIN
    found = gpu.Run(folder / "card", began + seconds, pretended, torch.device("cpu"))
    found.content = gpu.new_content(pretended, seconds / 60, "card")
    return found


def jobs_done(gpu: ModuleType, sections: Any, estimates: list[float], seconds: float, again: bool = False) -> list[str]:
    """Which of some jobs are begun in a section of so many seconds."""
    done: list[str] = []
    jobs = [
        gpu.Job(f"job {number}", own, lambda number=number: done.append(f"job {number}"))
        for number, own in enumerate(estimates)
    ]
    left = sections._section("models", jobs, seconds, again)
    assert sorted([*done, *(job.label for job in left)]) == [job.label for job in jobs]
    assert sections.run.content["sections"]["models"]["left_out"] == [job.label for job in left]
    return done


def test_nothing_long_is_begun_late(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    gpu = parts["gpu"]
    sections = gpu.Sections(new_run(gpu, tmp_path, 60), tmp_path, [])
    assert jobs_done(gpu, sections, [60.0, 5.0, 4.0], 2.0) == ["job 1"]  # the first of the short ones
    assert jobs_done(gpu, sections, [60.0, 5.0, 4.0], 2.0, again=True) == []
    assert jobs_done(gpu, sections, [60.0, 5.0, 4.0], 10.0, again=True) == ["job 1", "job 2"]
    compiled = [group for group in gpu.gpu_models.more_groups() if group.compiled]
    assert compiled
    assert all(group.seconds >= 100 for group in compiled)


@pytest.mark.parametrize(("compiling", "status", "state"), [(True, 0, "the time was up"), (False, 3, "did not come")])
def test_the_end_of_the_time_ends_the_program(
    parts: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compiling: bool,
    status: int,
    state: str,
) -> None:
    gpu, ended = parts["gpu"], []
    monkeypatch.setattr(os, "_exit", ended.append)
    run = new_run(gpu, tmp_path, -0.1 if compiling else -gpu.GRACE - 0.1)
    run.compiling = compiling
    folder = tmp_path / "caches"
    folder.mkdir()
    gpu._watch(run, folder)
    assert ended == [status]
    assert json.loads((tmp_path / "card.json").read_text())["state"].startswith(state)
    assert "asked for | measured | met" in capsys.readouterr().out
    assert not folder.exists()


def test_workers_need_their_time_and_end_with_the_section(
    parts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = parts["gpu"]
    monkeypatch.setattr(gpu, "free_memory", lambda: None)  # collecting takes a while in a large process
    sections = gpu.Sections(new_run(gpu, tmp_path, 300), tmp_path, [])
    asked: list[tuple[float, float]] = []
    monkeypatch.setattr(sections.workers, "check", lambda settings, *times: asked.append(times))
    monkeypatch.setattr(sections, "_operator", lambda setting: None)
    sections._section("stages", sections.jobs("stages"), 59.0)
    assert not asked
    begin = time.monotonic()
    sections._section("stages", sections.jobs("stages"), 100.0)
    ((deadline, end),) = asked
    assert deadline - begin == pytest.approx(55, abs=5)
    assert end - begin == pytest.approx(100, abs=5)
    sections.workers.progress("something")
    assert sections.run.content["failures"] == [{"where": "checking and compiling", "what": "something"}]


def test_tuning_has_a_time_of_its_own_and_takes_nothing_forbidden(
    parts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lk_backbones.ops import _cuda

    gpu, device = parts["gpu"], parts["device"]
    monkeypatch.setattr(_cuda, "can_compute", _cuda.can_compute)
    monkeypatch.setattr(device, "forbidden", set())
    monkeypatch.setattr(gpu, "forbidden", device.forbidden)
    device.forbid("cudnn")
    calls: list[tuple[list[str], float]] = []

    def answer(command: list[str], timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append((command, timeout))
        return subprocess.CompletedProcess(command, 0, '{"tuning_seconds": 1.0}\n', "")

    monkeypatch.setattr(subprocess, "run", answer)
    sections = gpu.Sections(new_run(gpu, tmp_path, 1000), tmp_path, [])
    sections._tuning("nothing known", 40.0)
    sections.run.seconds -= 900
    sections._tuning("nothing known", 40.0)
    assert [timeout for _, timeout in calls] == [120.0, pytest.approx(100, abs=5)]
    assert calls[0][0][-1] == "--forbid=cudnn"

    monkeypatch.setattr(sys, "argv", ["gpu_tuning.py", "--forbid=aten", "--forbid=fft"])
    monkeypatch.setattr(torch.cuda, "set_device", lambda wanted: None)
    device.start_helper()
    shape = (1, 1, 8, 8), (7, 7), torch.float32, 0
    assert not any(_cuda.can_compute(path, *shape) for path in ("cudnn", "aten", "fft"))
    assert _cuda.can_compute("native", *shape)


WORKER = """
import json, os, sys, time
def say(**message):
    print("@gpu " + json.dumps(message), flush=True)
print("something that a library says")
say(ready=True)
for line in sys.stdin:
    task = json.loads(line)
    for kind in task["kinds"]:
        if kind in os.environ.get("REFERENCE", ""):
            sys.exit("a reference")
        for path in ("a", "deadly", "b"):
            if [kind, path] in task["without"]:
                continue
            say(starting=[kind, path])
            if path == "deadly" and kind == "forward":
                time.sleep(float(os.environ.get("SLEEP", "0")))
                print("first words\\nlast words", file=sys.stderr)
                os._exit(9)
            say(found={"kind": kind, "path": path, "error": 0.0})
    say(done=True, failed=os.environ.get("FAILED"))
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
        failed = found["forward"]["deadly"]["failed"]
        assert failed == "its process was lost: it ended with status 9: last words"
        assert all(set(own) == {"a", "deadly", "b"} for own in found.values())
        assert all("failed" not in own["b"] for own in found.values())


@pytest.mark.parametrize(("suspect", "seconds"), [(0.0, 1.0), (60.0, 0.3)])
def test_a_candidate_that_hangs_when_workers_are_ended_is_to_blame(
    parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, suspect: float, seconds: float
) -> None:
    forbidden: list[str] = []
    monkeypatch.setattr(parts["workers"], "forbid", forbidden.append)
    monkeypatch.setattr(parts["workers"], "SUSPECT", suspect)
    monkeypatch.setenv("SLEEP", "60")
    workers = parts["workers"].Workers([sys.executable, "-c", WORKER], 1, lambda text: None)
    setting = parts["operator"].stage_settings()[0]
    begin = time.monotonic()
    workers.check([setting], begin + seconds, begin + seconds)
    assert time.monotonic() - begin < 10
    assert not workers.is_checked(setting)
    blamed = suspect == 0
    assert forbidden == ["deadly"] * blamed
    assert ("deadly" in workers.found[setting.label]["forward"]) is blamed
    assert not workers.deadly


def test_a_candidate_that_hangs_is_given_up(parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts["workers"], "forbid", lambda path: None)
    monkeypatch.setattr(parts["workers"], "PATIENCE", 1.0)
    monkeypatch.setenv("SLEEP", "60")
    workers = parts["workers"].Workers([sys.executable, "-c", WORKER], 1, lambda text: None)
    setting = parts["operator"].stage_settings()[0]
    try:
        workers.check([setting], time.monotonic() + 60, time.monotonic() + 60)
    finally:
        workers.close()
    assert workers.is_checked(setting)
    assert "it said nothing" in workers.found[setting.label]["forward"]["deadly"]["failed"]


@pytest.mark.parametrize("kind", ["forward", "input_gradient"])  # before all candidates, between them
def test_a_reference_that_ends_its_process_is_no_path_s_fault(
    parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    forbidden: list[str] = []
    monkeypatch.setattr(parts["workers"], "forbid", forbidden.append)
    monkeypatch.setenv("REFERENCE", kind)
    sections = parts["gpu"].Sections(new_run(parts["gpu"], tmp_path, 300), tmp_path, [])
    sections.workers.command, sections.workers.count = [sys.executable, "-c", WORKER], 1
    setting = parts["operator"].stage_settings()[0]
    try:
        sections.workers.check([setting], time.monotonic() + 60, time.monotonic() + 60)
    finally:
        sections.workers.close()
    assert sections.workers.deadly == {setting.label: "it ended with status 1: a reference"}
    assert forbidden == (["deadly"] if kind == "input_gradient" else [])
    assert "a reference" in sections.run.content["failures"][-1]["what"]
    with pytest.raises(RuntimeError, match=r"may cost this process too: .*a reference"):
        sections._operator(setting)


def test_what_workers_could_not_check_is_not_taken_for_checked(
    parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts["workers"], "forbid", lambda path: None)
    monkeypatch.setenv("FAILED", "no memory")
    said: list[str] = []
    workers = parts["workers"].Workers([sys.executable, "-c", WORKER], 1, said.append)
    setting = parts["operator"].stage_settings()[0]
    try:
        workers.check([setting], time.monotonic() + 60, time.monotonic() + 60)
    finally:
        workers.close()
    assert not workers.complete
    assert said[-1].endswith("cannot be checked: no memory")


def test_a_worker_whose_device_is_lost_ends(
    parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workers, device = parts["workers"], parts["device"]

    def raise_error(*arguments: Any) -> None:
        raise RuntimeError("CUDA error")

    def lose(error: Exception) -> None:
        raise device.DeviceLost(str(error))

    setting = parts["operator"].stage_settings()[0]
    task = {"setting": setting.to_json(), "kinds": ["forward"], "without": []}
    monkeypatch.setattr(sys, "stdin", [json.dumps(task)] * 2)
    monkeypatch.setattr(workers, "check", raise_error)
    workers.serve(torch.device("cpu"))
    assert capsys.readouterr().out.count('"failed": "RuntimeError: CUDA error"') == 2
    monkeypatch.setattr(workers, "explain_failure", lose)
    with pytest.raises(SystemExit):
        workers.serve(torch.device("cpu"))
    assert '"lost": "CUDA error"' in capsys.readouterr().out


def test_a_process_that_cannot_be_killed_is_left(parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    worker = parts["workers"]._Worker([sys.executable, "-c", "import time; time.sleep(60)"])
    kill = worker._process.kill
    monkeypatch.setattr(worker._process, "kill", lambda: None)
    begin = time.monotonic()
    parts["workers"].stop_workers(patience=0.0)
    assert time.monotonic() - begin < 5
    assert worker.is_alive()
    kill()
    worker.wait(5)
    assert not worker.is_alive()


def test_every_path_that_is_timed_is_checked(parts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    operator, device = parts["operator"], parts["device"]
    monkeypatch.setattr(operator, "free_memory", lambda: None)  # collecting takes a while in a large process
    setting = operator.Setting(operator._case("stages", 2, 4, 6, 5))
    known = {
        "native": {"error": 0.5, "kernels": []},
        "aten": {"failed": device.OUT_OF_MEMORY},
        "cudnn": {"failed": "its process was lost"},
    }
    row = operator.measure(setting, device.Stopwatch(torch.device("cpu")), {}, {"forward": known}, 0.01)
    result = row["results"]["forward"]
    assert set(result["failed"]) == {"cudnn"}
    assert result["paths"]["native"]["error"] == 0.5
    assert {"aten", "native-channels_last"} <= set(result["paths"])
    for result in row["results"].values():
        assert not result["tuned_among"]
        assert all(entry["error"] <= 1.5e-2 for path, entry in result["paths"].items() if path != "native")
        assert "cudnn" in result["failed"] or "cudnn" in result["paths"]


def test_one_kernel_is_not_listed_under_many_names(parts: dict[str, ModuleType]) -> None:
    operator = parts["operator"]

    def products(dtype: str) -> list[str]:
        setting = operator.Setting(operator.stage_settings()[0].case, dtype)
        with setting.rounding():
            return [path for path in operator.candidates("forward", setting) if path.startswith("triton")]

    assert products("float32") == ["triton-small"]
    assert len(products("tf32")) > 3


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
    paths = content["operator"][0]["results"]["forward"]["paths"]
    paths["cudnn"] = figures(0.1)  # which the tuner was not given
    paths["fft"] = {**figures(0.31), "called_ms_median": 0.2}  # by luck
    judged = {own["asked"]: own for own in report.targets(content)}
    assert met("after tuning never slower") is True
    paths["fft"] = figures(0.2)
    judged = {own["asked"]: own for own in report.targets(content)}
    assert met("after tuning never slower") is False
    assert met("forward, 31×31") is False


def test_paths_of_pytorch_that_are_one_kernel_count_as_one(parts: dict[str, ModuleType]) -> None:
    report = parts["report"]
    paths = {"native": figures(1.02), "cudnn": figures(1.0), "aten": figures(1.01), "fft": figures(2.0)}
    result = {"chosen": "fft", "ours": figures(2.0), "paths": paths, "failed": {}, "toeplitz_ms": None}
    row = {**vars(parts["operator"].stage_settings()[0].case), "dtype": "bfloat16", "layout": "contiguous"}
    content = {"operator": [{**row, "label": "a shape", "results": {"forward": result}}]}
    assert "1.00 (cudnn¹)" in "\n".join(report._operator_lines(content))
    assert report._fastest_lines(content)[-2].endswith("| native 1 |")
    paths["cudnn"] = figures(0.9)
    assert "0.900 (cudnn) " in "\n".join(report._operator_lines(content))
    assert report._fastest_lines(content)[-2].endswith("| cudnn 1 |")


def test_a_card_that_was_slowed_down_is_told(parts: dict[str, ModuleType]) -> None:
    condition = {
        "beginning": {"bfloat16": 790.0, "clocks.sm": "1980 MHz", "clocks_event_reasons.active": "0x0000000000000000"},
        "end": {"bfloat16": 700.0, "temperature.gpu": "84", "clocks_event_reasons.active": "0x0000000000000024"},
    }
    assert parts["report"].condition_line(condition) == (
        "Under load: at the beginning 790 TFLOP/s bfloat16, clocks.sm 1980 MHz, not slowed down; at the end 700 "
        "TFLOP/s bfloat16, temperature.gpu 84, slowed down by power limit, temperature (software)."
    )
    failed = parts["report"].condition_line({"end": {"failed": "out of memory"}})
    assert failed == "Under load: at the end out of memory, whether it was slowed down is unknown."


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
