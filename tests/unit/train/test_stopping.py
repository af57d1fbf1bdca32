"""What ends a training before its last step."""

from __future__ import annotations

from typing import Any

import pytest

from train.loop.stopping import Stop


def test_budget_of_minutes_stops_a_training_with_exit_code_0(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
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
