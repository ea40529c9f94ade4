"""The stream gives what json gives, wherever the file is cut into windows."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lk_backbones.data import json_stream
from lk_backbones.data.json_stream import JsonStream

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def read(text: str) -> dict[str, Any]:
    stream = JsonStream(io.BytesIO(text.encode()))
    found: dict[str, Any] = {}
    for name in stream.members():
        if stream.peek() == "[":
            batches = list(stream.batches(2))
            assert all(len(batch) == 2 for batch in batches[:-1])
            found[name] = [value for batch in batches for value in batch]
        else:
            found[name] = stream.value()
    stream.end()
    return found


@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=5), st.integers(1, 9), st.sampled_from([None, 1, "\t"]))
@settings(max_examples=200, deadline=None)
def test_it_reads_what_json_reads(content: dict[str, Any], window: int, indent: Any) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_WINDOW", window)
        assert read("\ufeff" * (window % 2) + text) == content


@pytest.mark.parametrize("window", [1, 3, 1000])
def test_no_cut_off_file_is_read(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_WINDOW", window)
    text = '{"a": [1, {"b": [2.5, "ü"]}, 3], "c": 12, "d": {}}'
    assert read(text) == json.loads(text)
    for end in range(len(text)):
        with pytest.raises(ValueError, match="character"):
            read(text[:end])
    for place in range(len(text)):
        changed = text[:place] + "?" + text[place + 1 :]
        try:
            expected = json.loads(changed)
        except ValueError:
            with pytest.raises(ValueError, match="character"):
                read(changed)
        else:
            assert read(changed) == expected
