"""Read a ``config.json``, which anybody may have written: every key that is used later has its type and its bounds."""

import json
from pathlib import Path
from typing import Any

from lk_backbones.weights.arguments import check_architecture, check_model_arguments, plain_copy
from lk_backbones.weights.errors import WeightsError, shorten

__all__ = ["LARGEST_SIDE", "check_picture_settings", "read_config"]

_LARGEST_FILE = 10_000_000  # bytes
#: Longest side of pictures, in pixels, that a file may ask for: more is no model's, but fills any memory.
LARGEST_SIDE = 2**13
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")


def read_config(file: Path) -> dict[str, Any]:
    """Read and check a ``config.json`` of timm, smp or this package.

    Args:
        file: The file.

    Returns:
        Its content. Keys that nothing here reads are left as they are.

    Raises:
        WeightsError: If it is no JSON object, or a key that is used has a value of another type; names file and key.
    """
    config = _parse(file)

    def at(*keys: str) -> str:
        return f"'{file}': " + "".join(f"'{keys[0]}'" if i == 0 else f"['{key}']" for i, key in enumerate(keys))

    if config.get("architecture") is not None:
        check_architecture(config["architecture"], f"'{file}'")
    if config.get("model_args") is not None:
        config["model_args"] = check_model_arguments(config["model_args"], at("model_args"))
    classes = config.get("num_classes")
    if classes is not None and (type(classes) is not int or not 0 <= classes <= 1_000_000):
        raise WeightsError(f"{at('num_classes')} must be a number of classes, not {shorten(classes)}")
    _check_type(config.get("_model_class"), str, at("_model_class"))
    _check_preprocessing(config, at)
    for key in ("pretrained_cfg", "_lk_backbones"):
        if config.get(key) is None:
            config.pop(key, None)
            continue
        _check_type(config[key], dict, at(key))
        _check_preprocessing(config[key], at, key)
    check_picture_settings(config.get("pretrained_cfg") or {}, f"'{file}': 'pretrained_cfg'")
    _check_type(config.get("pretrained_cfg", {}).get("tag"), str, at("pretrained_cfg", "tag"))
    own = config.get("_lk_backbones", {})
    for key, kind in {"class": str, "hyper_parameters": dict, "extra": bool}.items():
        _check_type(own.get(key), kind, at("_lk_backbones", key))
    plain_copy(own.get("hyper_parameters"), at("_lk_backbones", "hyper_parameters"))
    return config


def _parse(file: Path) -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise WeightsError(f"'{file}' cannot be read as a file: {error.strerror}") from error
    if len(content) > _LARGEST_FILE:
        raise WeightsError(f"'{file}' has {len(content)} bytes, which no description of a model has")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise WeightsError(f"'{file}' has the key {shorten(key)} twice: which of them holds is not said")
            found[key] = value
        return found

    try:
        # An integer of more digits than Python reads is infinite, and refused where it is used.
        config = json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=once,
            parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits),
        )
    except WeightsError:
        raise
    except UnicodeDecodeError as error:
        raise WeightsError(f"'{file}' is not JSON in UTF-8 ({error})") from error
    except ValueError as error:
        raise WeightsError(f"'{file}' is not JSON ({error})") from error
    except RecursionError as error:
        raise WeightsError(f"'{file}' is nested too deeply to be read") from error
    if not isinstance(config, dict):
        raise WeightsError(f"'{file}' must hold a JSON object, not a {type(config).__name__}")
    return config


def _check_type(value: Any, kind: type, where: str) -> None:
    if value is not None and not isinstance(value, kind):
        names = {str: "a text", dict: "a JSON object", bool: "true or false"}
        raise WeightsError(f"{where} must be {names[kind]}, not {shorten(value)}")


def _check_preprocessing(values: dict[str, Any], at: Any, *section: str) -> None:
    """Mean and standard deviation: a list of numbers each, one for every channel."""
    for key in ("mean", "std"):
        value = values.get(key)
        if value is None:
            continue
        where = at(*section, key)
        if not isinstance(value, list) or not all(type(v) in (int, float) for v in value):
            raise WeightsError(f"{where} must be a list of numbers, one per channel, not {shorten(value)}")
        plain_copy(value, where, 1e6)
        if key == "std" and not all(v > 0 for v in value):
            raise WeightsError(f"{where} must be positive, not {shorten(value)}")
    mean, std = values.get("mean"), values.get("std")
    if mean is not None and std is not None and len(mean) != len(std):
        raise WeightsError(f"{at(*section, 'std')} has {len(std)} numbers, but 'mean' has {len(mean)}")


def check_picture_settings(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Check what a timm configuration says of the pictures that a model was evaluated on.

    Args:
        values: The configuration.
        where: What to call it in the error.

    Returns:
        Those of its entries that say so, apart from mean and standard deviation.

    Raises:
        WeightsError: If one has an impossible value, with its name.
    """
    kinds: dict[str, tuple[Any, str]] = {
        "input_size": (_is_size, f"channels, height and width, each from 1 to {LARGEST_SIDE}"),
        "crop_pct": (_is_share, "a number above 0 and up to 1"),
        "interpolation": (_INTERPOLATIONS.__contains__, f"one of {', '.join(_INTERPOLATIONS)}"),
        "crop_mode": (_CROP_MODES.__contains__, f"one of {', '.join(_CROP_MODES)}"),
    }
    kinds |= {f"test_{key}": kinds[key] for key in ("input_size", "crop_pct")}
    given = {key: values[key] for key in kinds if values.get(key) not in (None, "")}
    for key, value in given.items():
        fits, expected = kinds[key]
        if not (isinstance(value, str | int | float | list | tuple) and fits(value)):
            raise WeightsError(f"{where}['{key}'] must be {expected}, not {shorten(value)}")
    return given


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) else ()
    return len(sides) == 3 and all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1
