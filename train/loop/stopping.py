"""On Ctrl-C or SIGTERM, finish the current step and save it."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

_BUDGET = 1000
"""Recorded in place of a signal when the budget is spent."""


class Stop:
    """Context that only records the first SIGINT or SIGTERM; in a single process, a second Ctrl-C interrupts at once.

    The end of a budget of minutes is recorded in the same way. A signal may reach processes at different times, or
    only one of them, so they synchronise after every step.
    """

    def __init__(self, minutes: float | None = None) -> None:
        """Args: minutes: budget, counted from now; None trains to the last step."""
        self.signal = 0
        self._minutes, self._deadline = minutes, None if minutes is None else time.monotonic() + 60 * minutes
        self._previous: dict[int, Any] = {}
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        # Gloo, whatever backend the training uses: it does not wait for the accelerator, and NCCL times out after ten
        # minutes, too short to fetch shards.
        self._group = None if alone else dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # handlers can be set only there
            self._previous = {s: signal.signal(s, self._record) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number and self._group is None:
            raise KeyboardInterrupt
        self.signal = number

    def wait_for_others(self) -> None:
        """Wait for all processes without a time limit; signals are handled in the meantime."""
        if self._group is not None:
            arrived = dist.barrier(self._group, async_op=True)
            while not arrived.is_completed():
                time.sleep(0.05)
            arrived.wait()  # raises if another process has ended

    def requested(self) -> bool:
        """Whether any process was asked to stop. All processes call this, once a step."""
        if not self.signal and self._deadline is not None and time.monotonic() > self._deadline:
            self.signal = _BUDGET
        if self._group is None:
            return self.signal != 0
        agreed = torch.tensor(self.signal)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._group)
        # A signal that arrived during the reduction was not part of it; it counts at the next step.
        self.signal = max(self.signal, int(agreed))
        return int(agreed) != 0

    def leave_unsaved(self, out: Path) -> NoReturn:
        """Exit as `leave` does, when the data for the next step does not arrive."""
        self.leave(f"the data for the next step did not arrive; what is saved in {out} is the newest checkpoint")

    def leave(self, saved: str) -> NoReturn:
        """Exit with 128 + signal, or 0 at the end of the budget, after one line about what was saved.

        Raises:
            SystemExit: always.
        """
        if int(os.environ.get("RANK", "0")) == 0:
            if self.signal == _BUDGET:
                name = f"its budget of {self._minutes:g} minutes"
            else:
                name = "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name
            print(f"stopped by {name}: {saved}; the same command continues from there", flush=True)
        raise SystemExit(0 if self.signal == _BUDGET else 128 + self.signal)
