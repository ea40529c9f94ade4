"""Take a private part of a library, or say clearly that it is gone."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any

__all__ = ["borrow"]


def borrow(distribution: str, module: str, name: str) -> Any:
    """Import a private part of a library.

    Args:
        distribution: What the library is installed as, such as ``"torchvision"``.
        module: Where the part is.
        name: Its name there; with a dot, a class and what it has.

    Returns:
        The part.

    Raises:
        ImportError: If the installed release does not have it there.
    """
    try:
        return attrgetter(name)(import_module(module))
    except (ImportError, AttributeError) as error:
        try:
            release = f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            release = f"the installed {distribution}"
        raise ImportError(
            f"lk_backbones needs {module}.{name}, which is not public and which {release} no longer has. Install an "
            f"earlier {distribution}, or a later lk-backbones"
        ) from error
