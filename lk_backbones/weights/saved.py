"""Checkpoints of a training, read as data: they name no class to build and run nothing.

What a checkpoint says of its model and its data are a name and arguments. The name is looked up among our own classes,
never imported; the arguments are plain values of the types that the constructor asks for, and go to it directly, past
every instantiator, which would build whatever a nested ``class_path`` names.
"""

import inspect
import math
import os
import types
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import fsspec
import numpy as np
import torch

from lk_backbones.weights.arguments import check_model_arguments, plain_copy
from lk_backbones.weights.config import LARGEST_SIDE
from lk_backbones.weights.errors import WeightsError, nearest, shorten
from lk_backbones.weights.files import check_stream

__all__ = [
    "build_saved",
    "checked_arguments",
    "constructor_parameters",
    "find_class",
    "fits",
    "own_classes",
    "read_training_checkpoint",
    "require_finite",
]

T = TypeVar("T")

_DEEPEST = 16
# Arguments that are keyword arguments of a model themselves.
_OF_MODELS = ("encoder_kwargs", "architecture_kwargs")
# How much of the machine a file may ask for; whoever needs more says so on the command line or in Python.
_LARGEST = {
    **dict.fromkeys(
        (
            "image_size",
            "crop_size",
            "base_size",
            "test_size",
            "min_size",
            "max_size",
            "sizes",
            "input_size",
            "train_size",
        ),
        LARGEST_SIDE,
    ),
    **dict.fromkeys(("train_images", "val_images", "test_images"), 2**20),
    "batch_size": 2**16,
    "val_batch_size": 2**10,
    "num_workers": 2**8,
}


# ---- the file ----


def read_training_checkpoint(
    file: str | os.PathLike[str] | IO[bytes], map_location: Any = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """Read a checkpoint of a Lightning trainer, whole and undamaged, without running anything in it.

    Args:
        file: Path, URL that fsspec understands, or a stream.
        map_location: Where to put tensors, as for `torch.load`. Those of a local file are mapped from the disk, and
            read when they are used.
        weights_only: ``False`` unpickles the file, which runs whatever its writer put into it.

    Returns:
        Its content: tensors and plain containers.

    Raises:
        FileNotFoundError: If there is no such file.
        WeightsError: If it is damaged, holds more than tensors and plain values, or is no checkpoint of a training.
    """
    if isinstance(file, str | os.PathLike):
        if "://" in str(file):
            with fsspec.open(str(file), "rb") as stream:
                return _read(stream, str(file), map_location, weights_only, mmap=False)
        path = Path(file)
        if path.is_dir():
            raise WeightsError(f"{path} {_NO_CHECKPOINT}, but a folder: give the .ckpt file")
        if not path.is_file():
            hint = "; `lk-backbones hub pull` fetches files from the Hub" if str(file).startswith("hf-hub:") else ""
            raise FileNotFoundError(f"there is no checkpoint {file}{hint}")
        with path.open("rb") as stream:
            return _read(stream, str(path), map_location, weights_only, mmap=True)
    return _read(file, str(getattr(file, "name", "the stream")), map_location, weights_only, mmap=False)


_NO_CHECKPOINT = "is not a checkpoint that `lk-backbones fit` or a Lightning trainer wrote"


def _read(stream: IO[bytes], name: str, map_location: Any, weights_only: bool, mmap: bool) -> dict[str, Any]:
    what = f"{name} {_NO_CHECKPOINT}"
    start = stream.read(4)
    stream.seek(0)
    if not start:
        raise WeightsError(f"{what}: it is empty")
    if start != b"PK\x03\x04":
        raise WeightsError(f"{what}: it does not begin as torch's files do")
    try:
        check_stream(stream, name)
    except WeightsError as error:
        raise WeightsError(f"{what}, or no longer: {error}") from error
    try:
        source: Any = name if mmap else stream
        content = torch.load(source, map_location=map_location, weights_only=weights_only, mmap=mmap)
    except Exception as error:
        # torch's own text advises to unpickle the file, which would run what is in it
        raise WeightsError(f"{what}: {_why_unreadable(stream, error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        held = f"the keys {[str(key) for key in content][:5]}" if isinstance(content, dict) else type(content).__name__
        raise WeightsError(f"{what}: it holds {held}, no 'state_dict'")
    wrong = next((key for key, kind in _PARTS.items() if not isinstance(content.get(key, kind()), kind)), None)
    if wrong is not None:
        raise WeightsError(f"{what}: its '{wrong}' is {shorten(content[wrong])}")
    missing = [loop for loop in _LOOPS if not isinstance(content.get("loops", {}).get(loop), dict)]
    if "loops" in content and missing:
        raise WeightsError(f"{what}: its 'loops' lack {', '.join(missing)}")
    return content


# What a trainer writes into every checkpoint.
_PARTS: dict[str, type] = {
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
_LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")


def _why_unreadable(stream: IO[bytes], error: Exception) -> str:
    try:
        stream.seek(0)
        unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(stream))
    except Exception:
        unsafe = []
    if unsafe:
        return (
            f"it asks for {shorten(', '.join(unsafe[:3]), 200)}, and making objects of a file's choice could run any "
            f"code; only tensors and plain values are read"
        )
    return f"its table of contents cannot be read ({type(error).__name__}); it was altered or is of another program"


# ---- what it says ----


def own_classes(package: types.ModuleType, base: type[T]) -> dict[str, type[T]]:
    """Return the classes that a package of ours exports and that can be built, by name.

    Args:
        package: The package, with ``__all__``.
        base: What they derive from.

    Returns:
        Class by name; ``base`` itself and abstract classes are left out.
    """
    exported = {name: getattr(package, name) for name in package.__all__}
    return {
        name: value
        for name, value in exported.items()
        if isinstance(value, type) and issubclass(value, base) and value is not base and not inspect.isabstract(value)
    }


def find_class(cls: type[T], class_path: object, known: Mapping[str, type[T]], where: str, flag: str) -> type[T]:
    """Return the class to build for a checkpoint. Names are looked up among our own classes; nothing is imported.

    Args:
        cls: The class that is asked for: an abstract base, one of ours, or somebody's subclass of it.
        class_path: What the checkpoint names, with or without the module that we export it from or define it in.
        known: Our own classes by name.
        where: What to call the checkpoint in messages.
        flag: The flag by which users name such a class.

    Returns:
        The class of ours that the checkpoint names if it is a ``cls``; else ``cls``, whose caller has named it.

    Raises:
        WeightsError: If the checkpoint is of a class unrelated to ``cls``, or of none of ours where ``cls`` is only a
            base.
    """
    saved = next((own for name, own in known.items() if class_path in _names(name, own)), None)
    if saved is not None and issubclass(saved, cls):
        return saved
    if saved is not None and not issubclass(cls, saved):
        raise WeightsError(f"{where} is of a {saved.__name__}, not of a {cls.__name__}")
    if saved is None and any(issubclass(own, cls) and own is not cls for own in known.values()):
        raise WeightsError(
            f"{where}: _class_path is {shorten(class_path)}, but a file may only name a class that lk_backbones "
            f"exports ({', '.join(known)}); one of your own is named by you, with {flag} or --config"
        )
    return cls


def _names(name: str, cls: type) -> list[str]:
    """Return a class's name alone, and in its module and every package around it: it may lie deeper than its export."""
    modules = list(accumulate(cls.__module__.split("."), "{}.{}".format))
    return [name, *(f"{module}.{name}" for module in modules)]


def constructor_parameters(cls: type, resolve: bool = True) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a class's constructor, those that it passes on to its parents included.

    Args:
        cls: The class.
        resolve: Whether annotations are needed, which has to import what they name.

    Returns:
        Parameters by name, with resolved annotations.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        constructor = base.__dict__.get("__init__")
        if constructor is None:
            continue
        hints = get_type_hints(constructor) if resolve else {}
        own = list(inspect.signature(constructor).parameters.values())[1:]
        for parameter in own:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                keyword = parameter.replace(
                    kind=parameter.KEYWORD_ONLY, annotation=hints.get(parameter.name, parameter.annotation)
                )
                parameters.setdefault(parameter.name, keyword)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    return parameters


def checked_arguments(cls: type, values: object, where: str) -> dict[str, Any]:
    """Check the arguments that a file holds for a class: plain values, which its constructor has, of its types.

    Args:
        cls: The class.
        values: What the file holds; entries that begin with an underscore are Lightning's and are left out.
        where: What to call the file and the place in it in messages.

    Returns:
        Arguments by name, as new plain containers.

    Raises:
        WeightsError: With the argument's name.
    """
    if not isinstance(values, Mapping):
        raise WeightsError(f"{where} must be arguments by name, not a {type(values).__name__}")
    parameters = constructor_parameters(cls)
    arguments = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise WeightsError(f"{where} has the key {shorten(key)}, which is no text")
        if key.startswith("_"):
            continue
        if key not in parameters:
            raise WeightsError(
                f"{where}: {cls.__name__} has no argument {shorten(key)}{nearest(key[:80], parameters)}; the file was "
                f"altered, or written by another version of lk_backbones"
            )
        plain = plain_copy(value, f"{where}: {key}", _LARGEST.get(key, math.inf))
        if not fits(plain, parameters[key].annotation):
            expected = str(inspect.formatannotation(parameters[key].annotation)).replace("typing.", "")
            raise WeightsError(f"{where}: {key}={shorten(plain)} must be {expected}")
        if key in _OF_MODELS and plain is not None:
            plain = check_model_arguments(plain, f"{where}: {key}")
        arguments[key] = plain
    return arguments


def build_saved(cls: type[T], arguments: Mapping[str, Any], where: str, **given: Any) -> T:
    """Build an object from checked arguments by a plain call of its class.

    Args:
        cls: The class.
        arguments: Its keyword arguments in a file.
        where: What to call the file and the place in it in messages.
        **given: Arguments that the user gives instead.

    Returns:
        The object.

    Raises:
        WeightsError: If the constructor refuses the arguments, with its reason.
        FileNotFoundError: If the constructor misses a file.
    """
    try:
        return cls(**(dict(arguments) | given))
    except (OSError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, WeightsError) and str(error).startswith(where):
            raise
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        reason = reason if len(reason) <= 1000 else f"{reason[:1000]}…"  # it may quote a value of any length
        replaced = f" with another {', '.join(given)}" if given else ""
        raise WeightsError(f"{where}{replaced}: no {cls.__name__} can be built: {reason}") from error


def require_finite(arguments: Mapping[str, Any]) -> None:
    """Check that no argument is, or holds, infinity or NaN, of which every comparison with a limit is false.

    Args:
        arguments: A constructor's arguments by name.

    Raises:
        ValueError: If one does, with its name.
    """
    for name, value in arguments.items():
        if not _is_finite(value, 0):
            raise ValueError(f"{name}={shorten(value)} must be finite, neither inf nor nan")


def _is_finite(value: Any, depth: int) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple) and depth < _DEEPEST:
        return all(_is_finite(item, depth + 1) for item in value)
    return True


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a plain value is of a type; lists pass for tuples and the reverse, integers for floats.

    Args:
        value: Plain value.
        annotation: Type, as resolved by `typing.get_type_hints`.

    Returns:
        Whether it fits; ``True`` for types that are not known here, whose owner decides.
    """
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if kind is dict:
        return isinstance(value, dict) and all(fits(item, parts[1]) for item in value.values())
    if kind is tuple and Ellipsis not in parts:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(parts)
            and all(fits(item, part) for item, part in zip(value, parts, strict=True))
        )
    if kind in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, parts[0]) for item in value)
    return True
