"""Signals, budgets and waiting processes that stop a training before its last step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clipgen.utils.listening import usable_address
from train.loop.stopping import Stop


def test_budget_of_minutes_stops_training_with_exit_code_0(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    now = [100.0]
    monkeypatch.setattr("train.loop.stopping.time.monotonic", lambda: now[0])
    with Stop(minutes=2) as stop:
        now[0] += 119
        assert not stop.requested()
        now[0] += 2
        assert stop.requested()
        with pytest.raises(SystemExit) as ended:
            stop.leave("step 5 of 9 is saved")
    assert ended.value.code == 0
    assert "stopped by its budget of 2 minutes: step 5 of 9 is saved" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
@pytest.mark.parametrize("minutes", [None, 5.0])
def test_signal_is_named_and_exits_with_its_number(number: int, name: str, minutes: float | None, capsys: Any) -> None:
    with Stop(minutes) as stop:
        os.kill(os.getpid(), number)
        assert stop.requested()
        with pytest.raises(SystemExit) as ended:
            stop.leave("step 5 of 9 is saved")
    assert ended.value.code == 128 + number
    assert f"stopped by {name}: step 5 of 9 is saved" in capsys.readouterr().out


_WAIT = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from train.loop.stopping import Stop
host, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(sys.argv[1])
store = dist.TCPStore(host, port, 2, rank == 0, timeout=timedelta(seconds=120))  # until the other has started
dist.init_process_group("gloo", store=store, timeout=timedelta(seconds=1), rank=rank, world_size=2)
stop = Stop()
time.sleep(4 * int(sys.argv[1]))
stop.wait_for_others()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_wait_for_each_other_beyond_the_timeout_of_their_group(root: Path) -> None:
    host, port = usable_address("127.0.0.1", 0)
    environment = os.environ | {"PYTHONPATH": str(root), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", _WAIT]
    both = [subprocess.Popen([*command, rank], env=environment) for rank in "01"]
    assert [process.wait(120) for process in both] == [0, 0]
