"""What can go wrong with weights, each as one error that says what would be right."""

import difflib
from collections.abc import Iterable

__all__ = ["DownloadError", "WeightMismatchError", "WeightsError", "nearest", "shorten"]


class WeightsError(ValueError):
    """A weight file or source that cannot be used; the message names it and says what to do."""


class DownloadError(WeightsError):
    """A file that could not be fetched, or not whole."""


class WeightMismatchError(WeightsError, RuntimeError):
    """Weights of another model; also a `RuntimeError`, as torch raises for the same reason."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return the end of an error message: names that resemble a wrong one."""
    close = difflib.get_close_matches(name.lower(), list(candidates), n=4, cutoff=0.5)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""


def shorten(value: object, length: int = 80) -> str:
    """Return a value as an error message shows it: as Python writes it, cut to a length."""
    try:
        text = repr(value)
    except Exception:  # of an integer of too many digits, of too deep a value, of an odd tensor
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else f"{text[:length]}…"
