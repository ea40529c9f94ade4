"""Reading a large JSON file value by value, so that it never stands in memory as a whole."""

import codecs
import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from typing import Any, BinaryIO

#: Bytes that are read at a time.
_WINDOW = 1 << 22

# Characters that may follow a number and belong to it, where the window ends behind them: "e+" and the like.
_LONGEST_REST = 3

_SPACE = re.compile(r"[ \t\n\r]*")


class JsonStream:
    """Read the one value of a JSON file: its members and elements one after the other, with the parser of `json`.

    Args:
        file: The file, in UTF-8, with or without a mark of the byte order.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._before = 0  # characters of the file before the window

    def peek(self) -> str:
        """Return the next character that is no space, and go there; empty at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Return the next value.

        Raises:
            ValueError: If it is not valid JSON.
        """
        self.peek()
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except JSONDecodeError as error:
                if self._more():  # it may only be cut off
                    continue
                raise ValueError(f"{error.msg} at character {self._before + error.pos}") from None
            if end > len(self._text) - _LONGEST_REST and self._more():
                continue
            self._at = end
            return value

    def members(self) -> Iterator[str]:
        """Give the names in the object that comes; whoever takes a name reads its value."""
        self._take("{")
        while self.peek() != "}":
            name = self.value()
            if not isinstance(name, str):
                raise ValueError(f"a name must be text in double quotes, before character {self._position}")
            self._take(":")
            yield name
            if self.peek() != "}":
                self._take(",")
                if self.peek() == "}":
                    raise ValueError(f"a comma before the end of an object at character {self._position}")
        self._take("}")

    def batches(self, size: int) -> Iterator[list[Any]]:
        """Give the elements of the list that comes, in lists of up to ``size``."""
        self._take("[")
        batch: list[Any] = []
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            try:  # this loop takes the time, and the whole element is nearly always in the window
                value, end = self._parse(self._text, self._at)
                mark = self._text[end]
            except (JSONDecodeError, IndexError):
                value, mark = self.value(), self.peek()
            else:
                if mark in ".eE":  # of a number that is cut off
                    value, mark = self.value(), self.peek()
                else:
                    self._at = end
            batch.append(value)
            if mark != ",":
                mark = self.peek()
                if mark == "]":
                    break
                self._take(",")
            else:
                self._at += 1
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if len(batch) == size:
                yield batch
                batch = []
        self._take("]")
        yield batch

    def end(self) -> None:
        """Check that nothing follows.

        Raises:
            ValueError: If something does.
        """
        if self.peek():
            raise ValueError(f"more text after the end of the value, at character {self._position}")

    @property
    def _position(self) -> int:
        return self._before + self._at

    def _take(self, mark: str) -> None:
        if self.peek() != mark:
            raise ValueError(f"{mark!r} is expected at character {self._position}")
        self._at += 1

    def _more(self) -> bool:
        """Move the window on: what is not yet read stays, and at least as much again is read, if there is any."""
        rest = len(self._text) - self._at
        piece = self._file.read(max(_WINDOW, rest))
        text = self._decoder.decode(piece, final=not piece)
        if not piece:
            return False
        self._before += self._at
        self._text, self._at = self._text[self._at :] + text, 0
        return True
