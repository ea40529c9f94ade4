"""Checkpoints that lie: truncated, foreign, or made to run something when a command reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.conftest import Refused

BROKEN = {"empty": b"", "text": b"not a checkpoint", "truncated": b"PK\x03\x04" + bytes(200)}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_broken_file_is_named(command: str, content: bytes, workspace: Path, refused: Refused) -> None:
    (workspace / "broken.ckpt").write_bytes(content)
    refused([command, "--ckpt_path", "broken.ckpt"], "broken.ckpt")
