"""What can be looked at inside a model: its feature levels, the output of any module, its own output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lk_backbones.weights.errors import nearest

__all__ = [
    "Level",
    "feature_maps",
    "find_map",
    "is_detector",
    "normalized_input",
    "normalizes",
    "tensors_in",
    "trunk_of",
]

#: A feature level by its number, a module by its path, or ``"output"``.
Level = int | str


class _Reached(BaseException):
    """The module that is looked at has been called: nothing after it need be computed."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def trunk_of(model: nn.Module) -> nn.Module:
    """Return the part whose maps are a model's feature levels: its encoder or backbone, or the model itself.

    Args:
        model: Any module. A task of ours and an smp model have an ``encoder``, torchvision's detectors and segmentation
            networks a ``backbone``.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return trunk_of(model.module)
    encoder, backbone = getattr(model, "encoder", None), getattr(model, "backbone", None)
    # transformers' models have an "encoder" too, which takes tokens
    if isinstance(encoder, nn.Module) and (hasattr(encoder, "out_channels") or _has_intermediates(encoder)):
        return encoder
    return backbone if isinstance(backbone, nn.Module) else model


def is_detector(model: nn.Module) -> bool:
    """Return whether a model, or the network of a task, is a detector of torchvision's kind: boxes, and no map."""
    return any(
        isinstance(getattr(part, "transform", None), GeneralizedRCNNTransform)
        for part in (model, getattr(model, "model", None))
    )


def normalized_input(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Return what the first layer of a model is given: a task normalises images by itself, others do not.

    Args:
        model: The model.
        image: ``(N, C, H, W)``, of a task in [0, 1].
    """
    return model.normalize(image) if normalizes(model) else image  # type: ignore[operator]


def normalizes(model: nn.Module) -> bool:
    """Return whether a model takes images in [0, 1] and normalises them by itself, as tasks of ours do."""
    return callable(getattr(model, "normalize", None)) and hasattr(model, "image_mean") and hasattr(model, "image_std")


def _has_intermediates(module: nn.Module) -> bool:
    return callable(getattr(module, "forward_intermediates", None))


def find_map(model: nn.Module, x: torch.Tensor, level: Level) -> tuple[torch.Tensor, str]:
    """Compute one map of a model.

    Args:
        model: Any module.
        x: Images ``(N, C, H, W)`` as `normalized_input` returns them.
        level: The number of a feature level (from the end if negative), the path of a module, ``"output"``, or
            ``"output.<key>"`` of a model that returns several maps.

    Returns:
        The map ``(N, C', h, w)`` and what it is called.

    Raises:
        ValueError: If there is no such level or module, or what it gives is no spatial map; the message lists those
            there are. Also if the model cannot be run on such images.
    """
    try:
        return _find_map(model, x, level)
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        size = " × ".join(map(str, x.shape[2:]))
        raise ValueError(
            f"{type(model).__name__} cannot be run on images of {x.shape[1]} channels and {size} pixels: {error}"
        ) from error


def _find_map(model: nn.Module, x: torch.Tensor, level: Level) -> tuple[torch.Tensor, str]:
    if isinstance(level, bool) or not isinstance(level, int | str):
        raise ValueError(f"level must be a number, the path of a module or 'output', got {level!r}")
    if isinstance(level, int):
        return _feature_level(model, x, level)
    if level == "output" or level.startswith("output."):
        return _output_map(model, x, level)
    return _module_map(model, x, level)


# ---- feature levels ----


def _feature_level(model: nn.Module, x: torch.Tensor, level: int) -> tuple[torch.Tensor, str]:
    trunk = trunk_of(model)
    count = _number_of_levels(trunk)
    if count is not None and -count <= level < count:
        # what follows the level need not be computed
        wanted: Any = trunk
        found = wanted.forward_intermediates(x, indices=[level % count], stop_early=True, intermediates_only=True)
        maps = {str(level % count): found[0]}
        index = 0
    else:
        maps = feature_maps(trunk, x)
        index = level + len(maps) if level < 0 else level
    names = list(maps)
    if not maps or not 0 <= index < len(maps):
        raise ValueError(f"level {level}: {_describe_levels(model, maps, x)}")
    found_map = maps[names[index]]
    if not _is_map(found_map) or found_map.shape[1] == 0:
        raise ValueError(
            f"level {level} of {type(model).__name__} is {_describe(found_map)}, no spatial map (N, C, h, w); "
            f"{_describe_levels(model, maps if count is None else feature_maps(trunk, x), x)}"
        )
    number = level % count if count is not None else index
    return found_map, f"level {number}" + (f", {names[index]}" if names[index] != str(number) else "")


def _number_of_levels(trunk: nn.Module) -> int | None:
    """Return how many maps `forward_intermediates` of a timm model gives; ``None`` of other modules."""
    if not _has_intermediates(trunk):
        return None
    try:
        return len(trunk.feature_info) or None  # type: ignore[arg-type]
    except (AttributeError, TypeError):
        return None


def feature_maps(trunk: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return all feature levels of an encoder, backbone or other module, by name.

    They are those that it offers (timm's ``forward_intermediates``, a list or dictionary that it returns, without the
    image itself); of other modules the last map of each size, in the order that they are computed.
    """
    if _has_intermediates(trunk):
        module: Any = trunk
        return {str(i): m for i, m in enumerate(module.forward_intermediates(x, intermediates_only=True))}
    with _last_maps(trunk, x) as recorded:
        output = trunk(x)
    if not isinstance(output, Mapping | list | tuple):
        return recorded
    found = {name: tensor for name, tensor in tensors_in(output) if _is_level(tensor, x)}
    if isinstance(output, list | tuple):  # numbered as timm does, where an smp encoder's first maps are not counted
        found = {str(i): tensor for i, tensor in enumerate(found.values())}
    return found or recorded


def _is_level(tensor: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether a tensor is a map, neither the image itself nor, as smp has it, one without channels."""
    return _is_map(tensor) and tensor is not x and tensor.shape[1] > 0


@contextmanager
def _last_maps(module: nn.Module, x: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Record the last map of each size while a module runs, by the paths of the modules that gave them."""
    last: dict[tuple[int, ...], tuple[str, torch.Tensor]] = {}
    names = {part: name for name, part in module.named_modules()}
    found: dict[str, torch.Tensor] = {}

    def record(part: nn.Module, _: Any, output: Any) -> None:
        if not _is_map(output) or not output.requires_grad or max(output.shape[2:]) == 1 or output.shape[1] == 0:
            return
        if part is module and any(output is tensor for _, tensor in last.values()):
            return  # the part that computed it tells more
        (height, width), (rows, columns) = x.shape[2:], output.shape[2:]
        if abs(rows * width - columns * height) > max(height, width):
            return  # channels last, or no picture any more
        last.pop((rows, columns), None)  # so that the order is that of the last ones
        last[rows, columns] = (names[part] or "output", output)

    handles = [part.register_forward_hook(record) for part in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    found.update(last.values())


def _describe_levels(model: nn.Module, maps: Mapping[str, torch.Tensor], x: torch.Tensor) -> str:
    """Tell the feature levels of a model, for messages."""
    kind = type(model).__name__
    if not maps:
        return f"{kind} has no spatial maps that depend on the image: it cannot be looked at this way"
    lines = [f"{i} ({' × '.join(map(str, m.shape[2:]))})" for i, m in enumerate(maps.values()) if _is_map(m)]
    size = " × ".join(map(str, x.shape[2:]))
    return f"{kind} has the levels {', '.join(lines)} for images of {size}; or -1 for the last one, -2, …"


# ---- modules by their path ----


def _module_map(model: nn.Module, x: torch.Tensor, path: str) -> tuple[torch.Tensor, str]:
    modules = dict(model.named_modules())
    if path not in modules or not path:
        children = ", ".join(repr(name) for name, _ in model.named_children())
        close = nearest(path, (name for name in modules if name))
        raise ValueError(
            f"level {path!r}: {type(model).__name__} has no module of this path, it consists of {children}. A number "
            f"stands for a feature level, 'output' for what the model returns{close}"
        )
    module, trunk = modules[path], trunk_of(model)
    inside = any(part is module for part in trunk.modules())
    if not inside:
        _refuse_detector(model, f"level {path!r} is outside of the encoder")

    def reach(_: nn.Module, __: Any, output: Any) -> None:
        raise _Reached(output)

    handle = module.register_forward_hook(reach)
    try:
        if inside:
            trunk(x)
        else:
            _whole_model(model)(x)
    except _Reached as reached:
        output = reached.output
    else:
        raise ValueError(f"level {path!r}: {type(model).__name__} does not call this module")
    finally:
        handle.remove()
    return _only_map(output, path, f"level {path!r} of {type(model).__name__}"), path


# ---- the model's own output ----


def _whole_model(model: nn.Module) -> Callable[[torch.Tensor], Any]:
    """Return what runs a model on normalised images: tasks take images in [0, 1], and normalise them once more."""
    if not normalizes(model):
        return model
    return lambda x: model(x * model.image_std + model.image_mean)  # type: ignore[operator]


def _refuse_detector(model: nn.Module, what: str) -> None:
    if is_detector(model):
        raise ValueError(
            f"{what}: of a detector, {type(model).__name__}, only the encoder gives maps of the whole image. "
            f"Choose a feature level by its number (-1 for the last), or a module of the encoder"
        )


def _output_map(model: nn.Module, x: torch.Tensor, level: str) -> tuple[torch.Tensor, str]:
    _refuse_detector(model, f"level {level!r}")
    return _only_map(_whole_model(model)(x), level, f"the output of {type(model).__name__}"), level


def _only_map(output: Any, level: str, what: str) -> torch.Tensor:
    """Take the one map out of what a module returned."""
    tensors = dict(tensors_in(output))
    maps = {key: tensor for key, tensor in tensors.items() if _is_map(tensor) and tensor.shape[1]}
    key = level.removeprefix("output").removeprefix(".") if level.startswith("output") else ""
    if key in maps:
        return maps[key]
    if len(maps) == 1 and not key:
        return next(iter(maps.values()))
    if not maps:
        shapes = ", ".join(_describe(tensor) for tensor in tensors.values()) or type(output).__name__
        raise ValueError(
            f"{what} is {shapes}, no spatial map (N, C, h, w). Choose a feature level by its number (-1 for the last), "
            f"or the path of another module"
        )
    choices = ", ".join(f"'output.{name}'" for name in maps)
    advice = f"choose one of {choices}" if level.startswith("output") else "choose a module inside that gives one"
    raise ValueError(f"{what} holds {len(maps)} maps, {', '.join(map(repr, maps))}: {advice}")


def tensors_in(output: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Give every tensor in nested lists, tuples and dictionaries with its keys, joined by dots."""
    if isinstance(output, torch.Tensor):
        yield "", output
        return
    items: Any = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, Sequence) and not isinstance(output, str):
        items = enumerate(output)
    for key, value in items:
        for rest, tensor in tensors_in(value):
            yield f"{key}.{rest}" if rest else str(key), tensor


def _is_map(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point()


def _describe(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
