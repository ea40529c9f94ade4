"""The models' part of ``gpu.py``: whole networks in turn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from gpu_device import OUT_OF_MEMORY, explain_failure, free_memory
from torch import nn

import lk_backbones
from lk_backbones.analysis.speed import inference_run, training_run

METHOD_VARIABLE = "LK_BACKBONES_DEPTHWISE"


@dataclass(frozen=True)
class Contestant:
    """A model as it is run.

    Attributes:
        model: Its name in timm.
        channels_last: Whether weights and images are laid out in channels_last.
        method: How depthwise convolutions are computed, of those of the operator.
        compiled: Whether ``torch.compile`` is applied.
    """

    model: str
    channels_last: bool = False
    method: str = "auto"
    compiled: bool = False

    @property
    def label(self) -> str:
        notes = [
            "channels_last" if self.channels_last else "",
            {"auto": "", "native": "PyTorch's convolutions"}.get(self.method, f"method {self.method}"),
            "compiled" if self.compiled else "",
        ]
        return ", ".join([self.model, *filter(None, notes)])


@dataclass(frozen=True)
class Group:
    """Models that take turns.

    Attributes:
        kind: ``"training"`` (forward and backward, no optimiser) or ``"inference"`` (folded).
        size: Height and width of the images.
        batch: Images in a batch.
        contestants: The models.
        seconds: For building, tuning and compiling it all, about; rather too many, as nothing can stop it.
    """

    kind: str
    size: int
    batch: int
    contestants: tuple[Contestant, ...]
    seconds: float

    @property
    def compiled(self) -> bool:
        """Whether ``torch.compile`` is applied to any of them."""
        return any(contestant.compiled for contestant in self.contestants)

    @property
    def label(self) -> str:
        names = ", ".join(dict.fromkeys(contestant.model for contestant in self.contestants))
        compiled = " compiled" if self.compiled else ""
        return f"{self.kind} {self.size} px batch {self.batch}{compiled}: {names}"


@contextmanager
def method(name: str) -> Iterator[None]:
    """Let every depthwise convolution be computed by a method."""
    before = os.environ.get(METHOD_VARIABLE)
    os.environ[METHOD_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[METHOD_VARIABLE]
        else:
            os.environ[METHOD_VARIABLE] = before


def build(contestant: Contestant, group: Group, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that runs a model once and waits for the device."""
    torch.manual_seed(0)
    name, size = contestant.model, group.size
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name}")
    arguments = {"img_size": size} if name.startswith("swin") else {}
    model: nn.Module = timm.create_model(name, **arguments)
    ours = type(model).__module__.startswith("lk_backbones")
    if group.kind == "inference":
        model = (lk_backbones.reparameterize(model, inplace=True) if ours else model.eval()).to(dtype)
    format = torch.channels_last if contestant.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=format)
    if contestant.compiled:
        model = torch.compile(model, backend="inductor" if device.type == "cuda" else "eager")
    images = torch.randn(group.batch, 3, size, size, device=device).contiguous(memory_format=format)
    if group.kind == "inference":
        run = inference_run(model, images.to(dtype))
    else:
        run = training_run(model, images, dtype if dtype != torch.float32 else None)

    def step() -> object:
        with method(contestant.method):
            return run()

    return step


def measure_group(
    group: Group, device: torch.device, seconds: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Time the models of a group in turn.

    Args:
        group: What is timed; if its first model does not fit into memory, with half the images.
        device: Where.
        seconds: For the timed rounds of each model, about.
        progress: Told what comes next.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    entries: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for contestant in group.contestants:
        label = contestant.label
        progress(f"building {label}")
        begin = time.perf_counter()
        try:
            held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            run = build(contestant, group, device, dtype)
            own = (torch.cuda.memory_allocated() if device.type == "cuda" else 0) - held
            for _ in range(2):  # tunes, compiles, plans
                run()
            entries[label] = {"seconds_until_warm": time.perf_counter() - begin, "weights_and_images_mb": own / 1e6}
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                run()
                # The parameters, what a step holds beside them, and no other model of the group.
                entries[label]["peak_memory_mb"] = (torch.cuda.max_memory_allocated() - held) / 1e6
            runs[label] = run
        except Exception as error:
            run = None  # type: ignore[assignment]
            entries[label] = {"failed": explain_failure(error)}
            if entries[label]["failed"] == OUT_OF_MEMORY and not runs and group.batch > 1:
                smaller = Group(group.kind, group.size, group.batch // 2, group.contestants, group.seconds)
                progress(f"out of memory at batch {group.batch}")
                break
        free_memory()
    else:
        times = _take_turns(runs, entries, seconds)
        for label, calls in times.items():
            median = statistics.median(calls)
            entries[label] |= {
                "ms_median": median,
                "ms_best": min(calls),
                "samples": len(calls),
                "images_per_second": 1e3 * group.batch / median,
            }
        runs.clear()
        free_memory()
        return {
            "kind": group.kind,
            "size": group.size,
            "batch": group.batch,
            "label": group.label,
            "dtype": str(dtype).removeprefix("torch."),
            "compiled": group.compiled,
            "models": entries,
        }
    free_memory()
    return measure_group(smaller, device, seconds, progress)


def _take_turns(
    runs: dict[str, Callable[[], object]], entries: dict[str, dict[str, Any]], seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of each run, on the wall: each waits for the device."""
    times: dict[str, list[float]] = {label: [] for label in runs}
    begin = time.perf_counter()
    for number in range(20):
        if number >= 2 and time.perf_counter() - begin > seconds * len(runs):
            break
        for label, run in list(runs.items()):
            if number >= 3 and min(times[label]) > 1e3 * seconds / 3:  # a slow one has had its share
                continue
            start = time.perf_counter()
            try:
                run()
            except Exception as error:
                entries[label]["failed"] = explain_failure(error)
                del runs[label], times[label]
                continue
            times[label].append((time.perf_counter() - start) * 1e3)
    return {label: calls for label, calls in times.items() if calls}


# -------------------------------------------------------------------------------------------------------- which models

BASE = (
    Contestant("replknet_31b"),
    Contestant("swin_base_patch4_window7_224"),
    Contestant("convnext_base", channels_last=True),
    Contestant("replknet_31b", channels_last=True),
    Contestant("convnext_base"),
    Contestant("replknet_31b", method="native"),
)
OTHERS = tuple(
    Contestant(name, channels_last=name.startswith("convnext"))
    for name in ("unireplknet_s", "slak_tiny", "pelk_tiny", "replknet_31l", "convnext_small", "convnext_tiny")
)
COMPILED = ("replknet_31b", "convnext_base", "swin_base_patch4_window7_224", "unireplknet_s", "slak_tiny", "pelk_tiny")


def groups() -> list[Group]:
    """Return the groups that most is asked about."""
    return [
        Group("training", 224, 64, BASE, 40),
        Group("inference", 224, 64, BASE, 25),
        *(Group(kind, 224, 64, OTHERS[:4], 40) for kind in ("training", "inference")),
    ]


def more_groups() -> list[Group]:
    """Return larger images, compiled models (each with itself, uncompiled), and neighbours of the smaller ones."""
    found = [Group(kind, 512, 16, BASE[:3], 30) for kind in ("training", "inference")]
    for name in COMPILED:
        last = name.startswith("convnext")
        pair = Contestant(name, last), Contestant(name, last, compiled=True)
        found += [Group(kind, 224, 64, pair, seconds) for kind, seconds in (("inference", 100), ("training", 140))]
    found += [Group(kind, 512, 16, OTHERS[:4], 40) for kind in ("training", "inference")]
    found += [Group(kind, 224, 64, OTHERS[4:], 15) for kind in ("training", "inference")]
    found += [
        Group(kind, 224, 64, (Contestant("replknet_31l"), Contestant("replknet_31l", compiled=True)), 150)
        for kind in ("inference", "training")
    ]
    return found


def pretended_groups(section: str) -> list[Group]:
    """Tiny models, by the rule: through the interpreter a measured choice would take minutes."""
    ours = Contestant("slak_n", method="rule")
    if section == "models":
        missing = Contestant("no_such_model")
        return [Group("training", 32, 2, (ours, Contestant("convnext_atto", True), missing), 1)]
    return [Group("inference", 32, 2, (ours, Contestant("slak_n", method="rule", compiled=True)), 1)]
