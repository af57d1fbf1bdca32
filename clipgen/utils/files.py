"""Files that are written completely or not at all, and hashes of files."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name; what is written there takes the place of `path` when the block ends without an error."""
    # Not tempfile: it makes files that only their owner can read. Same folder, so that the rename is atomic.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all.

    File names in the text that are not UTF-8 (`os.fsdecode`) are written as the bytes that they are.

    Raises:
        OSError: the file cannot be written; what was there before is unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in lower-case hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
