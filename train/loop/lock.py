"""Locks on folders that are being written."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from clipgen.errors import OutputError
from clipgen.utils.files import write_text

LOCK = ".writing.lock"
HOLDER = ".writing.json"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into `folder`, which is created if needed, while the context lasts.

    The operating system releases the lock when the process ends, however it ends, so a killed process leaves nothing
    to clean up. Of several processes that share one output (torchrun), only the first should take the lock.

    Raises:
        OutputError: another process holds the lock, which the message names; or the folder cannot be written.
    """
    holder = folder / HOLDER
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OutputError(f"{folder} is being written by {_describe_holder(holder)}; wait, or stop it") from None
    except (OSError, NotImplementedError) as error:  # the latter where there are no file locks
        raise OutputError(f"{folder} cannot be locked: {getattr(error, 'strerror', None) or error}") from error
    try:
        write_text(holder, json.dumps(_this_process()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _this_process() -> dict[str, str | int]:
    command = shlex.join([os.path.basename(sys.executable), *sys.argv])
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "command": command.encode(errors="backslashreplace").decode()[:200],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _describe_holder(path: Path) -> str:
    """The process that `lock_folder` noted; a lock taken a moment ago may have no note yet."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} ({holder['command']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
