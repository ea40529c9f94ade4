"""The one gate for keyword arguments that came from outside: a downloaded ``config.json`` or checkpoint.

Such a file describes a model; it must not fetch, read or run anything. So its arguments are plain values, and none is
one of those that tell timm or smp where weights lie.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lk_backbones.weights.errors import WeightsError, nearest, shorten

__all__ = [
    "check_architecture",
    "check_buildable",
    "check_model_arguments",
    "check_size",
    "not_buildable",
    "plain_copy",
    "weight_arguments",
]

# What timm and smp take beside the model's own parameters: places of weights, and settings of their loading.
_WEIGHT_ARGUMENTS = {
    "cache_dir", "custom_load", "encoder_weights", "feature_cfg", "file", "kwargs_filter", "load_pretrained",
    "model_cfg", "source", "state_dict", "url", "weights", "weights_only",
}  # fmt: skip
_WEIGHT_PREFIXES = ("checkpoint_", "hf_hub", "pretrained")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODEL_NAME = re.compile(r"\w+(\.[\w-]+)?", re.ASCII)
# More values than any constructor takes: lists that are multiples of each other would never end.
_DEEPEST, _MOST_VALUES, _LONGEST_TEXT, _LARGEST = 8, 100_000, 10_000, 1_000_000


def weight_arguments(names: Iterable[str]) -> list[str]:
    """Those of some argument names that say where weights lie or how they are loaded, rather than what a model is.

    Args:
        names: Names of keyword arguments for `timm.create_model`.

    Returns:
        The names, sorted.
    """
    return sorted(n for n in names if n in _WEIGHT_ARGUMENTS or n.startswith(_WEIGHT_PREFIXES))


def plain_copy(value: Any, where: str, largest: float = math.inf) -> Any:
    """Copy ``None``, truth values, finite numbers, texts, and lists and dictionaries of these; refuse anything else.

    Args:
        value: The value. A short tensor of one dimension, such as class weights, counts as a list.
        where: What to call it in the error, with the file and the key.
        largest: Largest number that makes sense.

    Returns:
        The same in new containers; those of a file may hold each other.

    Raises:
        WeightsError: With the key and the value.
    """
    return _plain_copy(value, where, largest, 0, [_MOST_VALUES])


def _plain_copy(value: Any, where: str, largest: float, depth: int, budget: list[int]) -> Any:
    budget[0] -= 1
    if budget[0] < 0:
        raise WeightsError(f"{where} holds more values than any argument has")
    if depth > _DEEPEST:
        raise WeightsError(f"{where} is nested more than {_DEEPEST} levels deep")
    if isinstance(value, torch.Tensor) and value.ndim == 1 and value.layout is torch.strided and value.numel() <= 1000:
        value = value.tolist()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise WeightsError(f"{where} has the key {shorten(key)}, which is no text but a {type(key).__name__}")
        return {
            key: _plain_copy(inner, f"{where}[{shorten(key)}]", largest, depth + 1, budget)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        items = [_plain_copy(inner, f"{where}[{i}]", largest, depth + 1, budget) for i, inner in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            raise WeightsError(f"{where} is a text of {len(value)} letters: {shorten(value)}")
    elif isinstance(value, int | float):
        if not abs(value) <= largest or (isinstance(value, float) and not math.isfinite(value)):
            limit = f", at most {largest:.0f}" if largest < math.inf else ""
            raise WeightsError(f"{where} must be a finite number{limit}, not {shorten(value)}")
    elif value is not None:
        raise WeightsError(
            f"{where} is a {type(value).__name__}; a file that describes a model may hold plain values only: numbers, "
            f"texts, lists and dictionaries"
        )
    return value


def check_model_arguments(arguments: Any, where: str) -> dict[str, Any]:
    """Vet keyword arguments of a model that a file names.

    Args:
        arguments: What the file holds.
        where: What to call it in the error, with the file and the key.

    Returns:
        The arguments, without those of loading that ask for nothing (``pretrained: false``).

    Raises:
        WeightsError: If they are no plain values by name, or one says where weights lie.
    """
    if not isinstance(arguments, Mapping):
        raise WeightsError(f"{where} must be a dictionary of keyword arguments, not {shorten(arguments)}")
    for key in arguments:
        if not isinstance(key, str) or not _NAME.fullmatch(key):
            raise WeightsError(f"{where} has the key {shorten(key)}, which is no name of an argument")
    arguments = plain_copy(arguments, where, _LARGEST)
    loading = weight_arguments(arguments)
    asking = [name for name in loading if arguments[name] not in (None, False)]
    if asking:
        raise WeightsError(
            f"{where} sets {', '.join(repr(name) for name in asking)}. A file that describes a model may not say where "
            f"weights are fetched or read from: remove it there, or do not use the file"
        )
    return {key: value for key, value in arguments.items() if key not in loading}


def check_architecture(name: Any, where: str) -> str:
    """Vet the name of a timm model that a file names; a Hub repository or path in its place would be fetched or read.

    Args:
        name: What the file holds.
        where: What to call it in the error, with the file and the key.

    Returns:
        The name.

    Raises:
        WeightsError: If timm has no such model.
    """
    if not (isinstance(name, str) and _MODEL_NAME.fullmatch(name) and timm.is_model(name.partition(".")[0])):
        raise WeightsError(
            f"{where} names the architecture {shorten(name)}, which neither timm nor this version of lk_backbones "
            f"knows{nearest(str(name)[:80], timm.list_models())}; a newer version may"
        )
    return name


# Numbers beside the parameters: two confusion matrices of 5000 classes are half of it.
_MOST_STATES = 100_000_000


def check_buildable(
    make: Callable[[], Any], where: str, most_numbers: float = 4e9, most_tensors: float = 20_000
) -> None:
    """Build a model that a file describes without memory for its values, and give up as soon as it grows too large.

    Args:
        make: Builds it.
        where: What to call the file in the error.
        most_numbers: How many numbers its parameters may hold. Buffers and states of metrics, which grow with the
            square of the number of classes, have a limit of their own.
        most_tensors: How many parameters it may have.

    Raises:
        WeightsError: If it is larger, or cannot be built.
    """
    numbers = count = 0

    def limit(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal numbers, count
        count += 1
        numbers += 0 if parameter is None else parameter.numel()
        if numbers > most_numbers or count > most_tensors:
            raise WeightsError(f"{where} describes a model that is far larger than its weights can be")

    hook = register_module_parameter_registration_hook(limit)
    try:
        try:
            with torch.device("meta"):
                model = make()
            states = sum(value.numel() for module in model.modules() for value in _states(module))
            if states > _MOST_STATES:
                raise WeightsError(
                    f"{where} describes a model with {states} numbers beside its weights, as for far too many classes"
                )
        except Exception as error:
            if not _computes(error):
                raise
            numbers = count = 0  # with memory, then: a parameter that is too large is refused before it is filled
            make()
    except WeightsError:
        raise
    except Exception as error:  # whatever a constructor makes of arguments that it does not expect
        raise not_buildable(where, error) from error
    finally:
        hook.remove()


def _states(module: nn.Module) -> list[torch.Tensor]:
    """Return what a module keeps beside its parameters: buffers, and the states of a metric."""
    return [value for value in (*module.buffers(recurse=False), *vars(module).values()) if torch.is_tensor(value)]


def check_size(make: Callable[[], Any], tensors: Iterable[Any], where: str) -> None:
    """`check_buildable` of a model whose weights lie beside its description: it may not be much larger than these.

    Args:
        make: Builds the model.
        tensors: Its weights; what is no tensor does not count, nor do numbers that a file repeats without holding them.
        where: What to call the file in the error.

    Raises:
        WeightsError: As there.
    """
    held = [value for value in tensors if isinstance(value, torch.Tensor) and value.layout is torch.strided]
    numbers = sum(min(value.numel(), value.untyped_storage().nbytes() // value.element_size()) for value in held)
    check_buildable(make, where, 2 * numbers + 10_000_000, 2 * len(held) + 10_000)


def _computes(error: BaseException) -> bool:
    """Return whether a model could not be built without memory because its constructor computes with its tensors."""
    if isinstance(error, WeightsError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, NotImplementedError) or (not isinstance(error, WeightsError) and "meta" in str(error))


def not_buildable(where: str, error: Exception) -> WeightsError:
    """Return the error to raise where a model cannot be built that a file describes."""
    reason = shorten(str(error), 500)
    return WeightsError(f"{where} describes a model that cannot be built here: {reason} ({type(error).__name__})")
