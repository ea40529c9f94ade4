"""What was measured on CUDA devices: which path of the depthwise convolution is fastest for which class of problems."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from lk_backbones.ops import _cuda, _paths
from lk_backbones.ops._plan import resolve_method
from lk_backbones.ops._tuning import Choice

__all__ = ["Choice", "choices_file", "is_measured", "measure_again", "measured_choices", "recorded_choices"]


def measured_choices() -> dict[str, Choice]:
    """Return everything that is known on this machine, by class of problems.

    A class is told in words, with semicolons between: the device, PyTorch's release, which result, dtype, memory
    format, about how many images, how many channels, about which map, which kernel.
    """
    return _cuda.tuner.entries()


def choices_file() -> Path:
    """Return where choices are kept."""
    return _cuda.tuner.file


def is_measured(input: Tensor) -> bool:
    """Return whether a convolution of this input that is not known yet would be measured.

    That is so on CUDA devices unless ``LK_BACKBONES_DEPTHWISE`` says otherwise, a graph is captured, or PyTorch was
    asked for deterministic algorithms.
    """
    on_cuda = _paths.device_type(input) == "cuda"
    measures = _cuda.may_measure() and not _cuda.must_follow_rule()
    return on_cuda and measures and resolve_method("auto") == "auto"


def measure_again() -> None:
    """Let everything that is known be measured once more when it comes up in this process."""
    _cuda.tuner.measure_again()


@contextmanager
def recorded_choices() -> Iterator[dict[str, Choice]]:
    """Collect what decides about the convolutions within a block; complete after it."""
    choices: dict[str, Choice] = {}
    with _cuda.tuner.recorded() as problems:
        yield choices
    choices.update({_cuda.tuner.key(problem): choice for problem, choice in problems.items()})
