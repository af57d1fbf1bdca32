"""torchrun as the training scripts start it: exit codes, and no traceback of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tracebacks import has_traceback

FAILING = "import os, sys; sys.exit(3 if os.environ['RANK'] == '1' else 0)"
WAITING = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
open(f"ready{os.environ['RANK']}", "w").close()
time.sleep(60)
"""


def launch(script: str, root: Path, folder: Path) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "train.loop.launch", "--nproc-per-node", "2", "script.py"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def test_exit_code_is_that_of_the_process_that_failed(root: Path, tmp_path: Path) -> None:
    process = launch(FAILING, root, tmp_path)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 3 and not has_traceback(said)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_all_processes_without_a_traceback(
    number: signal.Signals, code: int, root: Path, tmp_path: Path
) -> None:
    process = launch(WAITING, root, tmp_path)
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code and not has_traceback(said)


ENDING = """
import sys
from clipgen.errors import ConfigError
from train.loop import script


class Held:
    def __del__(self):
        print("freed", flush=True)


script.leave_group = lambda: print("left", flush=True)


@script.command
def main():
    held = Held()
    {end}


main()
"""


@pytest.mark.parametrize(("end", "code"), [("return", 0), ("sys.exit(0)", 0), ("sys.exit(143)", 143)])
def test_process_leaves_its_group_when_nothing_uses_it_any_more(
    end: str, code: int, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(ENDING.format(end=end))
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (code, ["freed", "left"]), done.stderr


def test_process_that_fails_leaves_its_group_to_its_end(root: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ENDING.format(end="raise ConfigError('a mistake')"))
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "left" not in done.stdout and done.stderr == "error: a mistake\n"
