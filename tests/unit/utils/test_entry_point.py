"""The boundary around every program: one line and an exit code instead of a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tracebacks import has_traceback

from clipgen.utils.ctrl_c import heed_ctrl_c

FULL = "cannot write: No space left on device; make room or write elsewhere"
HEADER = """
import errno, os, sys, time
from clipgen.errors import *
from clipgen.utils.ctrl_c import end_at_ctrl_c
from clipgen.utils.entry_point import entry_point
"""


def program(folder: Path, body: str, decorator: str = "entry_point()") -> list[str]:
    """Write a program whose main function has this body."""
    path = folder / "program.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    path.write_text(f"{HEADER}\n@{decorator}\ndef main():\n{lines}\n\nmain()\n")
    return [sys.executable, str(path)]


def run(command: list[str], **streams: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": 60, **streams})  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("raise ConfigError('steps is 0; give 1 or more')", "error: steps is 0; give 1 or more"),
        ("raise RequestError('seed', 'is -1')", "error: seed is -1"),
        ("raise OutputError('two\\nlines \\x1b[31m')", "error: two lines  [31m"),
        ("open('/nowhere/file')", "error: /nowhere/file: No such file or directory"),
        ("os.mkdir('/proc')", "error: /proc: File exists"),
        ("os.listdir('/dev/null')", "error: /dev/null: Not a directory"),
        ("raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))", f"error: {FULL}"),
        ("raise TimeoutError('no answer after 10 s')", "error: no answer after 10 s"),
    ],
)
def test_user_error_is_one_line_with_exit_code_2(tmp_path: Path, body: str, line: str) -> None:
    done = run(program(tmp_path, body))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{line}\n")


def test_programming_error_keeps_its_traceback(tmp_path: Path) -> None:
    done = run(program(tmp_path, "raise RuntimeError('a fault')"))
    assert done.returncode == 1 and has_traceback(done.stderr) and "a fault" in done.stderr


def test_result_and_exit_code_of_main_are_kept(tmp_path: Path) -> None:
    assert run(program(tmp_path, "print('done')")).stdout == "done\n"
    assert run(program(tmp_path, "sys.exit(7)")).returncode == 7
    done = run(program(tmp_path, "sys.exit('a message')"))
    assert done.returncode == 1 and done.stderr == "a message\n"


@pytest.mark.parametrize("flush", ["False", "True"])
def test_broken_pipe_ends_the_program_quietly(tmp_path: Path, flush: str) -> None:
    read, write = os.pipe()
    os.close(read)
    body = f"for i in range(100_000): print(i, flush={flush})"
    done = run(program(tmp_path, body), capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)", "print('x'); sys.exit(0)"])
def test_full_disk_behind_stdout_is_named(tmp_path: Path, body: str) -> None:
    with open("/dev/full", "w") as full:
        done = run(program(tmp_path, body), capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, f"error: {FULL}\n")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_program_runs_with_closed_streams(tmp_path: Path, number: int) -> None:
    """No file gets the number of a closed stream, and printing works."""
    body = "sys.stdin.read()\nprint('x'); print('x', file=sys.stderr)\nassert open(__file__).fileno() > 2"
    shell = f"exec '{sys.executable}' {program(tmp_path, body)[1]} {number}{'<' if number == 0 else '>'}&-"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("" if number == 1 else "x\n", "" if number == 2 else "x\n")


def interrupt(command: list[str]) -> tuple[int, str]:
    """Start a program, send it SIGINT once it has said "ready"; its exit code and stderr."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=600), process.communicate()[1]
    finally:
        process.kill()


def test_ctrl_c_is_one_line_with_exit_code_130(tmp_path: Path) -> None:
    body = "print('ready', flush=True)\ntime.sleep(60)"
    command = program(tmp_path, body, "entry_point(stopped='stopped; run it again')")
    assert interrupt(command) == (130, "stopped; run it again\n")


def test_ctrl_c_that_a_library_turns_into_another_error_ends_with_130(tmp_path: Path) -> None:
    body = (
        "print('ready', flush=True)\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise ImportError('half')"
    )
    assert interrupt(program(tmp_path, body)) == (130, "stopped\n")


def test_ctrl_c_during_imports_ends_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "importing.py"
    path.write_text(f"{HEADER}\nend_at_ctrl_c()\nprint('ready', flush=True)\ntime.sleep(60)\n")
    assert interrupt([sys.executable, str(path)]) == (-signal.SIGINT, "")


def test_ignored_interrupts_stay_ignored(tmp_path: Path) -> None:
    path = tmp_path / "ignoring.py"
    body = "end_at_ctrl_c()\n@entry_point()\ndef main():\n    print('ready', flush=True)\n    time.sleep(1)\nmain()\n"
    path.write_text(f"{HEADER}\n{body}")
    assert interrupt(["bash", "-c", f"trap '' INT; exec '{sys.executable}' {path}"]) == (0, "")


SCRIPTS = [
    path
    for folder in ("train", "train/mini", "benchmarks", "clipgen")
    for path in sorted((Path(__file__).parents[3] / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_main_function_is_an_entry_point(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "end_at_ctrl_c()" in text
    assert "\n@entry_point(" in text or "\n@command\n" in text or path.name == "__main__.py"


@pytest.mark.parametrize("before", ["SIG_IGN", "SIG_DFL", "default_int_handler"])
def test_worker_blocked_in_foreign_code_ends_at_ctrl_c_whatever_it_inherited(before: str) -> None:
    # Cog's worker starts with SIGINT ignored or with Python's handler, which runs between two lines of Python only.
    body = f"""
import os, signal, threading
from clipgen.utils.ctrl_c import heed_ctrl_c
signal.signal(signal.SIGINT, signal.{before})
heed_ctrl_c()
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
__import__("ctypes").CDLL(None).sleep(30)
"""
    begun = time.monotonic()
    done = run([sys.executable, "-c", body])
    assert done.returncode == -signal.SIGINT and done.stderr == ""
    assert time.monotonic() - begun < 20


def test_thread_other_than_the_main_one_leaves_ctrl_c_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(heed_ctrl_c).result()  # Python refuses to set a handler there
    assert signal.getsignal(signal.SIGINT) == before
