"""Choosing by measuring: what is adopted, what is remembered, and what a broken or shared file does."""

import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from filelock import FileLock

from lk_backbones.ops import _tuning
from lk_backbones.ops._tuning import Choice, Problem, Tuner, cache_file, disagreement


def problem(**changes):
    usual = {
        "kind": "forward",
        "shape": (64, 128, 56, 56),
        "kernel_size": (31, 31),
        "dilation": (1, 1),
        "dtype": torch.float32,
        "channels_last": False,
        "precision": "ieee",
        "device": 0,
    }
    return Problem(**{**usual, **changes})


RESULT = torch.arange(1.0, 7).reshape(2, 3)


class Clock:
    """A timer that knows what every candidate takes, and counts how often it was asked."""

    def __init__(self, **milliseconds):
        self.milliseconds = milliseconds
        self.calls = []

    def __call__(self, run, calls):
        run()
        self.calls.append(run.__name__)
        return self.milliseconds[run.__name__]


def candidate(name, result=RESULT):
    def run():
        if isinstance(result, BaseException):
            raise result
        return result() if callable(result) else result.clone()

    run.__name__ = name
    return run


def candidates(**results):
    return {name: candidate(name, result) for name, result in results.items()}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "depthwise.json"


def tuner(file, clock):
    return Tuner(lambda index: f"Card {index} (9.0)", clock, file)


def test_the_fastest_of_those_that_agree_is_taken(file, caplog):
    clock = Clock(native=10.0, quick=1.0, wrong=0.1, off=0.1, slow=400.0)
    with caplog.at_level(logging.INFO, "lk_backbones"):
        choice = tuner(file, clock).measure(
            problem(),
            candidates(
                quick=RESULT,
                native=RESULT,
                wrong=RESULT + 1e-3,
                off=RESULT[:1],
                crashes=NotImplementedError("out of registers\nand more"),
                nan=RESULT * math.nan,
                slow=RESULT,
            ),
            ["native"],
        )
    assert choice.path == "quick"
    assert choice.milliseconds == {"quick": 1.0, "native": 10.0, "slow": 400.0}
    assert choice.rejected["wrong"].startswith("wrong numbers: relative error 2.")
    assert choice.rejected["off"] == "wrong numbers: shape (1, 3) rather than (2, 3)"
    assert choice.rejected["nan"] == "wrong numbers: relative error nan, at most 2e-05 allowed"
    assert choice.rejected["crashes"] == "NotImplementedError: out of registers"
    assert clock.calls.count("slow") == 1  # far slower than the best: not timed at length
    assert clock.calls.count("quick") == 1 + _tuning.SAMPLES
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 3  # one of each that is wrong; that a path does not exist for a card is no news
    assert "path wrong is not used for Card 0 (9.0); torch" in warned[0]
    assert tuner(file, clock).look_up(problem()) == choice  # all of it is so the next time too


@pytest.mark.parametrize(("scale", "decided"), [(1e-3, True), (1e-12, True), (1e-15, False), (0.0, False)])
def test_the_smallest_numbers_tell_nothing(file, scale, decided):
    clock = Clock(native=10.0, quick=1.0)
    results = candidates(quick=RESULT * scale, native=RESULT * scale)
    assert (tuner(file, clock).measure(problem(), results, ["native"]) is not None) == decided


@pytest.mark.parametrize(
    ("failure", "lasting"),
    [
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (NotImplementedError("no kernel"), True),
        (RuntimeError("Failed to find C compiler"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
    ids=str,
)
def test_only_failures_that_last_are_remembered(file, failure, lasting):
    ours = tuner(file, Clock(native=1.0))
    choice = ours.measure(problem(), candidates(native=RESULT, other=failure), ["native"])
    assert list(choice.rejected) == ["other"]
    assert tuner(file, Clock()).look_up(problem()) == (choice if lasting else None)
    assert ("other" in ours.broken) == (str(failure) == "Failed to find C compiler")


@pytest.mark.parametrize("confirmed", [True, False])
def test_wrong_numbers_are_remembered_only_if_ordinary_operands_give_them_too(file, confirmed):
    clock = Clock(native=10.0, quick=1.0)
    ours = tuner(file, clock)
    made_up = candidates(quick=RESULT * (2 if confirmed else 1), native=RESULT)
    choice = ours.measure(problem(), candidates(quick=RESULT * 2, native=RESULT), ["native"], lambda: made_up)
    assert choice.path == "native"  # on this input it is wrong in any case
    assert ours.look_up(problem()) == choice
    assert tuner(file, clock).look_up(problem()) == (choice if confirmed else None)


def test_the_median_counts(file):
    quick, native = [5.0, 5.0, 1.0, 9.0, 5.0, 90.0], [6.0] * 6
    times = iter([time for both in zip(quick, native, strict=True) for time in both])  # they take turns
    clock = Clock()
    clock.__class__ = type("Uneven", (Clock,), {"__call__": lambda self, run, calls: next(times)})
    choice = tuner(file, clock).measure(problem(), candidates(quick=RESULT, native=RESULT), ["native"])
    assert choice.milliseconds == {"quick": 5.0, "native": 6.0}


def test_short_calls_are_timed_many_in_a_row(file):
    asked = []
    Tuner(lambda index: "Card", lambda run, calls: asked.append(calls) or 0.1, file).measure(
        problem(), candidates(native=RESULT), ["native"]
    )
    assert asked == [1, *[10] * _tuning.SAMPLES]


def test_if_nothing_else_works_the_reference_is_taken(file):
    clock = Clock(native=1.0)
    choice = tuner(file, clock).measure(problem(), candidates(quick=ValueError(), native=RESULT), ["native"])
    assert choice.path == "native"


def test_where_the_reference_cannot_compute_it_another_path_is_one(file):
    results = candidates(native=torch.OutOfMemoryError(), quick=RESULT, exact=RESULT, wrong=RESULT + 1)
    made = tuner(file, Clock(quick=1.0, exact=2.0, wrong=0.1))
    choice = made.measure(problem(), results, ["native", "exact"])
    assert choice.path == "quick"
    assert set(choice.rejected) == {"native", "wrong"}
    nothing = candidates(native=torch.OutOfMemoryError("the user's batch is too large"))
    other = tuner(file.with_name("other"), Clock())
    with pytest.raises(torch.OutOfMemoryError, match="batch is too large"):
        other.measure(problem(), nothing, ["native", "exact"])
    assert other.measure(problem(), nothing, ["native", "exact"]) is None  # not on every call


@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError(), RuntimeError("Failed to find C compiler"), OSError("no space left on device")],
    ids=repr,
)
def test_what_failed_for_now_may_work_the_next_time(file, failure):
    results = candidates(native=RESULT, large=failure)
    first = tuner(file, Clock(native=1.0, large=0.1))
    assert first.measure(problem(), results, ["native"]).path == "native"
    assert first.look_up(problem()).path == "native"
    assert not file.exists()
    assert tuner(file, Clock()).look_up(problem()) is None


@pytest.mark.parametrize("useless", [torch.zeros(2, 3), torch.full((2, 3), math.nan), torch.full((2, 3), math.inf)])
def test_numbers_that_tell_nothing_decide_nothing(file, useless):
    clock = Clock(native=2.0, quick=1.0)
    made = tuner(file, clock)
    results = candidates(native=useless, quick=useless)
    for _ in range(_tuning.ATTEMPTS - 1):
        assert made.measure(problem(), results, ["native"], lambda: candidates(native=RESULT, quick=RESULT)) is None
    assert not clock.calls
    made_up = candidates(native=RESULT, quick=RESULT + 1)  # wrong, which useless numbers would not have told
    assert made.measure(problem(), results, ["native"], lambda: made_up).path == "native"
    # With numbers that tell something it would have been decided at once.
    assert tuner(file.with_name("other"), clock).measure(problem(), made_up, ["native"]).path == "native"


def test_it_is_measured_once_and_remembered_by_others(file):
    clock = Clock(native=2.0, quick=1.0)
    first = tuner(file, clock)
    assert first.look_up(problem()) is None
    choice = first.measure(problem(), candidates(native=RESULT, quick=RESULT), ["native"])
    assert first.look_up(problem()) == choice
    measured = len(clock.calls)
    assert first.measure(problem(), candidates(native=RESULT, quick=RESULT), ["native"]) == choice
    assert len(clock.calls) == measured
    assert tuner(file, clock).look_up(problem()) == choice  # another process
    near = problem(shape=(60, 128, 57, 55))
    assert tuner(file, clock).look_up(near) is None  # rows of two bytes need copies that those of sixteen do not
    assert tuner(file, clock).look_up(problem(shape=(60, 128, 57, 56))) == choice


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "weight_gradient"},
        {"shape": (16, 128, 56, 56)},
        {"shape": (64, 96, 56, 56)},
        {"shape": (64, 128, 72, 56)},
        {"shape": (64, 128, 56, 80)},
        {"kernel_size": (29, 29)},
        {"dilation": (2, 2)},
        {"dtype": torch.bfloat16},
        {"channels_last": True},
        {"precision": "tf32"},
        {"device": 1},
    ],
    ids=str,
)
def test_classes_differ_in_what_decides(file, change):
    made = tuner(file, Clock(native=1.0))
    made.measure(problem(), candidates(native=RESULT), ["native"])
    assert made.look_up(problem(**change)) is None


def test_sizes_share_a_class_within_a_factor():
    classes = {_tuning._bucket(size, 4) for size in range(1, 1025)}
    assert len(classes) <= 4 * 10 + 1
    assert all(0.9 < _tuning._bucket(size, 4) / size < 1.1 for size in range(16, 1025))
    assert [_tuning._bucket(size, 1) for size in (1, 2, 3, 5, 6, 64)] == [1, 2, 4, 4, 8, 64]


def test_a_path_that_cannot_be_taken_here_gives_way_to_the_next(file):
    made = tuner(file, Clock(native=3.0, quick=1.0, second=2.0))
    made.measure(problem(), candidates(native=RESULT, quick=RESULT, second=RESULT), ["native"])
    other = tuner(file, Clock())
    assert other.look_up(problem(), lambda path: path != "quick").path == "second"
    assert tuner(file, Clock()).look_up(problem(), lambda path: False) is None


BROKEN = {
    "empty": b"",
    "cut off": b'{"format": 1, "choices": {"a": {"pa',
    "not text": bytes(range(256)),
    "another format": json.dumps({"format": 99, "choices": {}}).encode(),
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "no choices": b'{"format": 1}',
    "large": b" " * (_tuning.LARGEST_FILE + 1),
    "a long number": b'{"format": 1' + b"0" * 10_000 + b"}",
    "a number beyond floats": json.dumps(
        {"format": 1, "choices": {"a": {"path": "native", "milliseconds": {"native": 10**400}, "rejected": {}}}}
    ).encode(),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_read_is_begun_anew(file, content, caplog):
    file.parent.mkdir()
    file.write_bytes(content)
    made = tuner(file, Clock(native=1.0))
    assert made.look_up(problem()) is None
    choice = made.measure(problem(), candidates(native=RESULT), ["native"])
    assert tuner(file, Clock()).look_up(problem()) == choice
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be read and is begun anew" in caplog.text


def test_entries_that_are_not_as_written_are_left_out(file):
    made = tuner(file, Clock(native=1.0, quick=0.5))
    choice = made.measure(problem(), candidates(native=RESULT, quick=RESULT), ["native"])
    content = json.loads(file.read_bytes())
    (good,) = content["choices"].values()
    bad = [
        None,
        [],
        {},
        {**good, "path": 3},
        {**good, "milliseconds": {"native": "fast"}},
        {**good, "milliseconds": {"native": math.nan}},
        {**good, "milliseconds": {"native": -1}},
        {**good, "milliseconds": None},
        {**good, "rejected": {"a": 1}},
        {"path": "native"},
    ]
    content["choices"].update({f"entry {index}": entry for index, entry in enumerate(bad)})
    file.write_text(json.dumps(content))
    assert list(tuner(file, Clock()).entries().values()) == [choice]


def test_where_nothing_can_be_written_choices_last_as_long_as_the_process(tmp_path, caplog):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("the user's")
    made = tuner(in_the_way / "cache" / "depthwise.json", Clock(native=1.0))
    for kind in ("forward", "input_gradient"):
        choice = made.measure(problem(kind=kind), candidates(native=RESULT), ["native"])
        assert made.look_up(problem(kind=kind)) == choice
    assert len(caplog.records) == 1  # said once
    assert in_the_way.read_text() == "the user's"


def test_nobody_waits_long_for_the_lock(file, monkeypatch):
    monkeypatch.setattr(_tuning, "PATIENCE", 0.2)
    made = tuner(file, Clock(native=1.0))
    file.parent.mkdir()
    with FileLock(f"{file}.lock"):
        start = time.monotonic()
        made.measure(problem(), candidates(native=RESULT), ["native"])
        assert time.monotonic() - start < 5
    assert not file.exists()
    made.measure(problem(kind="input_gradient"), candidates(native=RESULT), ["native"])
    assert len(tuner(file, Clock()).entries()) == 2  # the one that could not be saved is not lost


def test_a_process_that_was_killed_holds_no_lock(file):
    file.parent.mkdir()
    code = f"import os; from filelock import FileLock; FileLock({str(file) + '.lock'!r}).acquire(); os._exit(1)"
    subprocess.run([sys.executable, "-c", code], check=False)
    made = tuner(file, Clock(native=1.0))
    made.measure(problem(), candidates(native=RESULT), ["native"])
    assert file.exists()


def test_two_processes_write_one_file(file):
    code = textwrap.dedent(
        f"""
        import sys, torch
        from pathlib import Path
        from lk_backbones.ops._tuning import Problem, Tuner
        offset = int(sys.argv[1])
        made = Tuner(lambda index: "Card", lambda run, calls: 1.0, Path({str(file)!r}))
        for channels in range(offset, 50, 2):
            one = Problem("forward", (1, channels + 1, 8, 8), (7, 7), (1, 1), torch.float32, False, "ieee", 0)
            made.measure(one, {{"native": lambda: torch.ones(2)}}, ["native"])
        """
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(offset)]) for offset in (0, 1)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(tuner(file, Clock()).entries()) == 50
    assert sorted(path.name for path in file.parent.iterdir() if "unfinished" in path.name) == []


def test_what_others_have_measured_meanwhile_is_used(file, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_tuning.time, "monotonic", lambda: now[0])
    mine, theirs = tuner(file, Clock(native=1.0)), tuner(file, Clock(native=1.0))
    assert mine.look_up(problem()) is None
    choice = theirs.measure(problem(), candidates(native=RESULT), ["native"])
    assert mine.look_up(problem()) is None  # looking at the file on every call would take its time
    now[0] += _tuning.RECHECK
    assert mine.look_up(problem()) == choice


def test_threads_measure_once(file):
    clock = Clock(native=1.0)
    made, running = tuner(file, clock), []

    def measure():
        results = {"native": candidate("native", lambda: time.sleep(0.01) or RESULT)}
        running.append(made.measure(problem(), results, ["native"]))

    threads = [threading.Thread(target=measure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(running) == 4
    assert len(clock.calls) == 1 + _tuning.SAMPLES


def test_the_file_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LK_BACKBONES_CACHE", str(tmp_path))
    assert cache_file() == tmp_path / "depthwise.json"
    monkeypatch.delenv("LK_BACKBONES_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "lk_backbones" / "depthwise.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(cache_file()).startswith(os.path.expanduser("~"))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    assert cache_file() == tmp_path / "Local" / "lk_backbones" / "depthwise.json"


@pytest.mark.parametrize("chunk", [1, 1000, 2**24])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3), (torch.float32, 2e-5)]
)
def test_results_agree_as_a_whole_in_every_map_and_in_every_value(dtype, tolerance, chunk, monkeypatch):
    monkeypatch.setattr(_tuning, "CHUNK", chunk)
    torch.manual_seed(0)
    exact = torch.randn(8, 32, 24, 20, dtype=torch.double)
    exact[0, 0] *= 1e-4  # a quiet map
    expected = exact.to(dtype)
    noisy = (exact + tolerance / 10 * torch.randn_like(exact) * exact.abs()).to(dtype)
    assert disagreement(expected, expected, tolerance) == ""
    assert disagreement(noisy, expected, tolerance) == ""
    assert disagreement(expected * 1.02, expected, tolerance).startswith("relative error 2.0e-02, at most")
    map_missing, pixel_missing, corner = expected.clone(), expected.clone(), expected.clone()
    map_missing[3, 5] = 0
    pixel_missing[3, 5, 7, 7] = 3
    corner[:, :, -1, -1] = 0
    for wrong in (map_missing, pixel_missing, corner):
        assert disagreement(wrong, expected, tolerance) != ""
    not_finite = expected.clone()
    not_finite[0, 0, 0, 0] = math.nan
    assert disagreement(not_finite, expected, tolerance) != ""


def test_a_quiet_map_and_a_single_value_are_told_each_by_its_own_check():
    torch.manual_seed(0)
    expected, tolerance = torch.randn(4, 8, 64, 64), 1.5e-2
    expected[0, 0] *= 0.05
    quiet, pixel = expected.clone(), expected.clone()
    quiet[0, 0] = 0  # no value of it is large, and it is little beside the rest
    pixel[1, 2, 3, 4] += 3  # which is little beside the other values of its map
    assert "of one map" in disagreement(quiet, expected, tolerance)
    assert disagreement(pixel, expected, tolerance).startswith("a value is off by ")


def test_large_values_are_compared_too():
    large = torch.full((2, 4096), 60000.0, dtype=torch.float16)  # whose squares no float16 holds
    assert disagreement(large, large, 1e-3) == ""
    assert disagreement(large / 2, large, 1e-3).startswith("relative error 5.0e-01")
    assert Choice("a", {}).rejected == {}


def test_it_can_be_measured_again(file):
    first = tuner(file, Clock(native=1.0, quick=2.0))
    results = candidates(native=RESULT, quick=RESULT)
    assert first.measure(problem(), results, ["native"]).path == "native"
    later = tuner(file, Clock(native=2.0, quick=1.0))
    later.measure_again()
    assert later.look_up(problem()) is None
    assert later.measure(problem(), results, ["native"]).path == "quick"
    assert later.look_up(problem()).path == "quick"
    assert tuner(file, Clock()).look_up(problem()).path == "quick"


def test_without_a_home_folder_convolutions_go_on(monkeypatch, caplog):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LK_BACKBONES_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(_tuning.Path, "home", homeless)
    made = tuner(None, Clock(native=1.0))
    assert made.look_up(problem()) is None
    choice = made.measure(problem(), candidates(native=RESULT), ["native"])
    assert made.look_up(problem()) == choice
    assert len(caplog.records) == 1
