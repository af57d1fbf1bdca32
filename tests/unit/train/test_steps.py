"""Signals of whoever runs a training step by step: the step saves, and ends before it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEP = """
import signal, sys, time
def save(number, frame):
    time.sleep(1)  # longer than subprocess.run waits after Ctrl-C
    open("saved", "w").close()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
open("ready", "w").close()
time.sleep(60)
"""
RECIPE = """
import sys
from train.mini import recipe
recipe.ROOT = recipe.Path.cwd()
recipe.part_command = lambda *_: ["step.py"]
recipe.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_recipe_waits_until_its_part_has_saved(
    number: signal.Signals, code: int, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "step.py").write_text(STEP)
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RECIPE, "--only", "image"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "ready").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if number == signal.SIGINT:  # a terminal sends Ctrl-C to all of its processes
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code and "image ended with exit code" in said and (tmp_path / "saved").exists(), said
