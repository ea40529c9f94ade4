"""Names of ImageNet's classes."""

from collections import Counter
from functools import lru_cache

from timm.data import ImageNetInfo

__all__ = ["imagenet_names"]


@lru_cache
def _names(subset: str) -> tuple[str, ...]:
    info = ImageNetInfo(subset)
    names = list(info.label_descriptions())
    repeated = {name for name, count in Counter(names).items() if count > 1}
    return tuple(
        f"{name} ({synset})" if name in repeated else name
        for name, synset in zip(names, info.label_names(), strict=True)
    )


def imagenet_names(subset: str = "imagenet-1k") -> list[str]:
    """Return timm's names of the classes, each of which is there once.

    Some names stand for several synsets (crane, the bird and the machine): these have the synset's id behind them.

    Args:
        subset: Which classes, as timm calls them.
    """
    return list(_names(subset))
