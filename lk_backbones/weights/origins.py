"""Follow tensors through a function that renames, reshapes, splits and joins them: which came of which.

Families of models rewrite a published state dict before it is loaded. Which of its tensors then are in use cannot be
told from names, nor from the tensors' identity: some pass as they are, some as new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

__all__ = ["follow"]


class _Followed(torch.Tensor):
    """A tensor that knows which keys it was computed from; so does everything that is computed from it."""

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
