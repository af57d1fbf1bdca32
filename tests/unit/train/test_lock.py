"""Locks on folders that are being written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipgen.errors import OutputError
from train.loop.lock import HOLDER, LOCK, lock_folder

HOLD = """
import sys, time
from pathlib import Path
from train.loop.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of tmp_path/out."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_locked_folder_refuses_a_second_writer_and_names_the_first(
    other_process: subprocess.Popen[str], tmp_path: Path
) -> None:
    try:
        holder = rf"out is being written by process {other_process.pid} on .*python"
        with pytest.raises(OutputError, match=holder), lock_folder(tmp_path / "out"):
            pytest.fail("locked twice")
    finally:
        other_process.kill()
        other_process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_lock_of_an_ended_process_is_free(
    other_process: subprocess.Popen[str], tmp_path: Path, how: signal.Signals
) -> None:
    other_process.send_signal(how)
    other_process.wait()
    with lock_folder(tmp_path / "out"):
        assert str(os.getpid()) in (tmp_path / "out" / HOLDER).read_text()


def test_lock_is_not_reentrant_and_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_folder(tmp_path):
        with pytest.raises(OutputError, match=f"process {os.getpid()}"), lock_folder(tmp_path):
            pass
        raise KeyError
    with lock_folder(tmp_path):
        pass
    assert set(os.listdir(tmp_path)) <= {LOCK}


def test_lock_without_a_readable_holder_names_another_process(
    other_process: subprocess.Popen[str], tmp_path: Path
) -> None:
    try:
        for note in ("", "[]", '{"pid": 1}'):
            (tmp_path / "out" / HOLDER).write_text(note)
            with pytest.raises(OutputError, match="written by another process"), lock_folder(tmp_path / "out"):
                pass
    finally:
        other_process.kill()
        other_process.wait()


def test_folder_that_cannot_be_created_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match=r"file/out cannot be locked: Not a directory"),
        lock_folder(tmp_path / "file" / "out"),
    ):
        pass
    with pytest.raises(OutputError, match=r"file cannot be locked: File exists"), lock_folder(tmp_path / "file"):
        pass
