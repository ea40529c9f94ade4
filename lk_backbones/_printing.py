"""Text from outside on its way to a terminal: names of files and classes, answers of servers, other libraries' errors.

A terminal obeys what it prints. Escape sequences recolour and retitle it, a carriage return or a newline forges a line,
signs that turn the direction of writing around let one name look like another; rich reads ``[red]`` in what it prints.
So every such text goes through `printable`, and to rich as a `rich.text.Text`, never as markup.
"""

import codecs
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, unquote

__all__ = ["any_text_can_be_printed", "printable", "without_credentials"]

_USER_IN_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]*://)[^\s/?#'\"]*@")
_QUERY_OF_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]*://[^\s?'\"<>]*)\?[^\s'\"<>)]*")
_TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?i:\b(?:bearer|basic)\s+(?=\S*[\d=._-])[\w.~+/=-]{8,})")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_HIDDEN = "***"

# What an encoding such as cp1252 or ASCII lacks of the signs that this package writes by itself; one sign for one:
# the columns of a table are counted before.
_CLOSEST = {"→": ">", "×": "x", "–": "-", "—": "-", "…": "~", "’": "'", "“": '"', "”": '"'}
_ERRORS = "lk_backbones.closest"


def printable(text: object, newlines: bool = False) -> str:
    """Make text from outside harmless to print.

    Args:
        text: Any text; other objects are turned into text first.
        newlines: Whether newlines may stay, for text of several lines. The text must then be one's own but for names
            in it.

    Returns:
        The text, with everything that is not seen as a character of its own (control characters, escape sequences,
        marks of direction, halves of surrogate pairs) written as an escape such as ``\\x1b``, and without credentials.
    """
    kept = "\n" if newlines else ""
    shown = (
        letter if letter.isprintable() or letter in kept else letter.encode("unicode_escape").decode("ascii")
        for letter in without_credentials(str(text))
    )
    return "".join(shown)


def without_credentials(text: str) -> str:
    """Hide user and password of URLs, their queries (signatures of signed URLs), and tokens.

    Args:
        text: Any text, such as another library's error.

    Returns:
        The text with ``***`` in their place.
    """
    for secret in _secrets():
        text = text.replace(secret, _HIDDEN)
    text = _USER_IN_URL.sub(rf"\1{_HIDDEN}@", text)
    text = _QUERY_OF_URL.sub(rf"\1?{_HIDDEN}", text)
    return _TOKENS.sub(_HIDDEN, text)


def _secrets() -> list[str]:
    """Passwords and tokens that this process was given, as they may be spelt in a text; the longest first."""
    secrets = [os.environ.get(variable, "") for variable in _SECRET_VARIABLES]
    user = os.environ.get("HF_ENDPOINT", "").partition("://")[2].rpartition("@")[0]
    secrets += [user, user.partition(":")[2]]
    plain = {text for secret in secrets for text in (secret, unquote(secret))}
    spelt = plain | {quote(text, safe=safe) for text in plain for safe in ("", "/", "!")}
    return sorted((secret for secret in spelt if len(secret) > 3), key=len, reverse=True)


@contextmanager
def any_text_can_be_printed() -> Iterator[None]:
    """Let a command print to streams of any encoding, as Windows' cp1252, and keep its log records harmless too.

    Without it a single arrow ends a command whose output goes to a pipe. What the encoding lacks is written by the
    closest signs that it has, or as an escape.
    """
    codecs.register_error(_ERRORS, _closest)
    before: list[tuple[Any, str]] = []
    for stream in (sys.stdout, sys.stderr):
        # "replace" and "ignore" would be somebody's own choice
        if getattr(stream, "errors", None) in ("strict", "surrogateescape", "backslashreplace"):
            before.append((stream, stream.errors or "strict"))
            stream.reconfigure(errors=_ERRORS)  # type: ignore[union-attr]
    # The client of the Hub writes down each attempt, with the address.
    handlers = [h for h in logging.getLogger("huggingface_hub").handlers if _harmless not in h.filters]
    for handler in handlers:
        handler.addFilter(_harmless)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_harmless)
        for stream, errors in before:
            if not stream.closed:
                stream.reconfigure(errors=errors)


def _closest(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_CLOSEST.get(letter, letter.encode("unicode_escape").decode()) for letter in letters), error.end


def _harmless(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage(), newlines=True), ()
    return True
