"""What choosing by measuring costs, for ``gpu.py``: seconds for a network, microseconds for a call that knows its path.

As a program of its own it tunes a network from whatever the cache folders that the environment names hold::

    python benchmarks/gpu_tuning.py --device 0
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from gpu_device import explain_failure, start_helper
from torch import nn

import lk_backbones  # noqa: F401, registers its encoders
from lk_backbones.layers import DepthwiseConv2d
from lk_backbones.ops import _paths, depthwise_conv2d, explain


def probe_tuning(device: torch.device) -> dict[str, Any]:
    """Take three training steps of RepLKNet-31B in this process, and tell how long the tuner measured.

    Whether it knows anything beforehand depends on the cache folders that the environment names.
    """
    spent: list[float] = []
    measure = _paths._measure  # with the import of Triton, which is part of it

    def watched(*arguments: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        choice = measure(*arguments)
        spent.append(time.perf_counter() - begin)
        return choice

    _paths._measure = watched
    if device.type == "cuda":
        model: nn.Module = timm.create_model("replknet_31b").to(device)
        images = torch.randn(64, 3, 224, 224, device=device)
    else:
        model, images = DepthwiseConv2d(1, 1, 7, padding=3, groups=1), torch.randn(1, 1, 8, 8, requires_grad=True)
    steps = []
    for _ in range(3):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = model(images)
        output.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        steps.append(time.perf_counter() - begin)
    return {"tuning_seconds": sum(spent), "measured_classes": len(spent), "step_seconds": steps}


def measure_look_up(device: torch.device) -> dict[str, Any]:
    """Microseconds of Python for choosing a path that is known, and of whole calls with and without a look-up."""
    repeats, rounds = (2000, 7) if device.type == "cuda" else (2, 1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    channels = 8 if device.type == "cuda" else 1
    input = torch.randn(2, channels, 8, 8, device=device, dtype=dtype)
    weight = torch.randn(channels, 1, 7, 7, device=device, dtype=dtype)
    with torch.no_grad():
        depthwise_conv2d(input, weight)
        chosen = explain(input, weight).forward
        forced = chosen if chosen in ("fft", "triton", "cudnn", "aten") else "triton"
        operands = (input, weight, None)

        def choose(name: str) -> object:
            return _paths.choose_path("forward", never, operands, input, weight, (1, 1), name)

        def never(*arguments: object) -> torch.Tensor:
            raise AssertionError("this problem is known")

        contestants: dict[str, Callable[[], object]] = {
            "choosing, with a look-up": functools.partial(choose, "auto"),
            "choosing, by rule": functools.partial(choose, "rule"),
            f"a call, method {forced}": lambda: depthwise_conv2d(input, weight, method=forced),  # type: ignore[arg-type]
            f"a call, method auto ({chosen})": lambda: depthwise_conv2d(input, weight),
            "a call of F.conv2d": lambda: torch.nn.functional.conv2d(input, weight, padding=3, groups=channels),
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for run in contestants.values():
            run()
        for _ in range(rounds):
            for name, run in contestants.items():
                # Fewer calls of what the device must do: else they wait for each other in its queue.
                calls = repeats if name.startswith("choosing") else min(repeats, 100)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(calls):
                    run()
                times[name].append((time.perf_counter() - begin) / calls * 1e6)
                if device.type == "cuda":
                    torch.cuda.synchronize()
    medians = {name: statistics.median(own) for name, own in times.items()}
    return {
        "microseconds_median": medians,
        "microseconds_best": {name: min(own) for name, own in times.items()},
        "look_up_microseconds": medians["choosing, with a look-up"],
        "added_microseconds": medians["choosing, with a look-up"] - medians["choosing, by rule"],
    }


def main() -> None:
    device = start_helper()
    try:
        found = probe_tuning(device)
    except Exception as error:
        found = {"failed": explain_failure(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
