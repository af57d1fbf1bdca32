"""Files written completely or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from clipgen.utils.files import sha256, write_text


def test_write_text_replaces_the_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "one")
    write_text(tmp_path / "a.json", "two ä")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "two ä"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_text_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "\ud800")
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_sha256_equals_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 10**6)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 10**6).hexdigest()
