"""Private parts of huggingface_hub."""

from collections.abc import Callable
from typing import Any

from huggingface_hub import utils

from lk_backbones._private.borrow import borrow

__all__ = ["CACHED_NO_EXIST", "replace_get_session"]

#: What `try_to_load_from_cache` answers for a file that is known not to exist.
CACHED_NO_EXIST = borrow("huggingface_hub", "huggingface_hub", "_CACHED_NO_EXIST")


def replace_get_session(get_session: Callable[[], Any]) -> None:
    """Have the client ask another function for its session, also where it opens a new one in mid-download.

    `set_client_factory` and `configure_http_backend`, the public ways of releases from and before 1.0, would replace
    the user's own factory.

    Args:
        get_session: The function.

    Raises:
        ImportError: If this release asks for its session elsewhere.
    """
    borrow("huggingface_hub", "huggingface_hub.utils._http", "get_session")
    utils._http.get_session = get_session
