"""What became of every tensor: loaded, adapted, skipped and why, or left as it was; by the names in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lk_backbones._printing import printable
from lk_backbones.weights.errors import WeightMismatchError, WeightsError

__all__ = ["LoadReport", "Mode", "check_values", "follow", "load_state"]

# strict: every tensor of the model must be in the file, and the reverse.
# lenient: a few missing or unknown tensors are reported; a wrong shape is an error.
# partial: what fits is loaded, if that is at least half of the model.
Mode = Literal["strict", "lenient", "partial"]


@dataclass
class LoadReport:
    """The result of loading weights; printing it gives a summary.

    Attributes:
        source: Where the weights came from, with the commit if it is a Hub repository.
        loaded: Keys of the model that were loaded.
        adapted: What was changed to fit, such as the first convolution for other input channels.
        skipped: Reason to the file's keys that were not used.
        missing: Keys of the model that the file lacks; they keep their values.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def skip(self, reason: str, keys: Iterable[str]) -> None:
        """Note keys of the file that are not used."""
        keys = list(keys)
        if keys:
            self.skipped.setdefault(reason, []).extend(keys)

    def __str__(self) -> str:
        """One line for what was loaded, one for each thing that deserves a look."""
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        lines += [f"  adapted: {text}" for text in self.adapted]
        lines += [f"  skipped: {_some(keys)}: {reason}" for reason, keys in self.skipped.items()]
        if self.missing:
            lines.append(f"  not in the file, left as they were: {_some(self.missing)}")
        return "\n".join(lines)


def _some(keys: list[str]) -> str:
    keys = sorted(keys, key=lambda key: key.endswith("num_batches_tracked"))  # what matters first
    return printable(", ".join(keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def check_values(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse tensors that would leave a model useless: of another kind of numbers than its own, or not finite.

    Other precisions of the same kind are cast, as always. Batch counters are not looked at.

    Args:
        state: Tensors by the model's names; those that it lacks are not looked at.
        own: The model's tensors.
        source: What to call the weights in the error.

    Raises:
        WeightsError: With the first such keys, and what is wrong with them.
    """
    problems = []
    for key, value in state.items():
        mine = own.get(key)
        if mine is None or key.endswith("num_batches_tracked") or value.is_meta or mine.is_meta:
            continue
        if mine.is_floating_point():
            if value.dtype not in _FLOATING:
                problems.append(f"{key} holds numbers of type {_name(value.dtype)} instead of {_name(mine.dtype)}")
            elif not _finite(value.to(mine.dtype)) and _finite(mine):  # masks hold infinity rightly
                what = "NaN or infinity" if not _finite(value) else f"numbers that {_name(mine.dtype)} cannot hold"
                problems.append(f"{key} holds {what}")
        elif value.is_complex() != mine.is_complex():
            problems.append(f"{key} holds numbers of type {_name(value.dtype)} instead of {_name(mine.dtype)}")
        elif value.is_floating_point() and not torch.equal(value, value.round()):
            problems.append(f"{key} holds fractions instead of {_name(mine.dtype)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(f"{source} holds no usable weights: {'; '.join(problems[:3])}{more}")


_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_state(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    report: LoadReport,
    mode: Mode,
    what: str,
    hint: Any = None,
    keep: Iterable[str] = (),
) -> None:
    """Load tensors that already have the module's names, and account for every one.

    Args:
        module: What to load into.
        state: Tensors by the module's names.
        report: Gets ``loaded``, ``skipped`` and ``missing``.
        mode: How much may be missing.
        what: The model's name, for the error.
        hint: Called without arguments for the end of the error message.
        keep: Keys that keep their values without being counted as missing, such as those of a new classifier.

    Raises:
        WeightMismatchError: If the weights are another model's, with the first missing, unexpected and wrongly shaped
            keys.
        WeightsError: If they are no usable numbers, see `check_values`.
    """
    own, keep = module.state_dict(), set(keep)
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    wanted = [key for key in own if key not in counters and key not in keep]
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in own and not key.endswith("num_batches_tracked")]
    misshapen = [key for key in own if key in state and state[key].shape != own[key].shape]

    fits = len(wanted) - len(missing) - len(misshapen)
    refused = misshapen and mode != "partial"
    refused = refused or ((missing or unexpected) and mode == "strict") or 2 * fits < len(wanted)
    if refused:
        parts = {
            "missing in the file": missing,
            "unexpected": unexpected,
            "of another shape": [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in misshapen],
        }
        listed = "; ".join(f"{len(keys)} {kind}, first {keys[:5]}" for kind, keys in parts.items() if keys)
        raise WeightMismatchError(
            f"'{report.source}' does not hold weights of {what}: {listed}{hint() if hint is not None else ''}"
        )

    usable = {key: value for key, value in state.items() if key in own and key not in misshapen}
    check_values(usable, own, f"'{report.source}'")
    nn.Module.load_state_dict(module, usable, strict=False)  # the keys are final: no renaming of a subclass
    report.loaded += usable
    report.missing += missing
    report.skip("unknown to the model", unexpected)
    report.skip("of another shape than in the model, which keeps its own", misshapen)
    report.skip(
        "a batch counter that the model has no use for",
        [key for key in state if key not in own and key.endswith("num_batches_tracked")],
    )


# ---- accounting ----


class _Followed(torch.Tensor):
    """A tensor that knows which keys it was computed from; so does everything that is computed from it.

    Families of models rewrite a published state dict before it is loaded. Which of its tensors then are in use cannot
    be told from names alone, nor from the tensors' identity: some pass as they are, some as new ones.
    """

    origins: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        origins = frozenset().union(*(tensor.origins for tensor in _followed([args, kwargs])))
        changed = args[:1] if getattr(func, "__name__", "") == "__setitem__" else ()
        for tensor in _followed([out, changed]):
            tensor.origins = tensor.origins | origins
        return out


def _followed(value: Any) -> list[_Followed]:
    if isinstance(value, _Followed):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for inner in value for tensor in _followed(inner)]


def follow(
    rename: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]], state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, frozenset[str]]]:
    """Apply a function to a state dict, and tell of which of its tensors each result was made.

    Args:
        rename: The function.
        state: Tensors by key.

    Returns:
        What the function returns; and for every key of it the keys of ``state`` that went into it, none for a tensor
        that the function made up.
    """
    followed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        tensor = value.as_subclass(_Followed)
        tensor.origins = frozenset([key])
        followed[key] = tensor
    renamed = rename(followed)
    origins = {key: frozenset().union(*(t.origins for t in _followed(value))) for key, value in renamed.items()}
    return {key: value.as_subclass(torch.Tensor) for key, value in renamed.items()}, origins
