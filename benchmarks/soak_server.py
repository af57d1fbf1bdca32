"""Cog's server under a supervisor that restarts it as an orchestrator would; its memory and its log."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib import request as http

from serving import start_server

from clipgen.errors import UnavailableError
from clipgen.utils.listening import usable_address

PROBE = 1.0
"""Seconds between two health checks, which also sample the memory."""
FAILURES = 3
"""Failed health checks in a row before the server is restarted."""
SOUND = {"READY", "BUSY", "STARTING"}
FINAL = {"Prediction worker completed", "Prediction cancelled", "Prediction failed"}
"""Cog's log messages when a prediction has ended."""
CRASH = "Failing prediction due to worker crash"
"""Logged without the prediction's id when its worker has died."""


class Supervised:
    """The server: started, watched, and restarted when /health-check reports that it is unhealthy."""

    def __init__(self, weights: Path, folder: Path) -> None:
        host, self.port = usable_address("127.0.0.1", 0)
        self.address = f"http://{host}:{self.port}"
        self.weights, self.folder = weights.resolve(), folder
        self.starts: list[float] = []
        self.history: list[tuple[float, str]] = []
        """Times and values of health changes; BUSY counts as READY."""
        self.memory: list[tuple[int, float, float]] = []
        """Number of the start, time, megabytes."""
        self.ended = threading.Event()
        self.process = self._start()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts.append(time.monotonic())
        with (self.folder / "log").open("ab") as log:
            return start_server(self.port, self.weights, log, TMPDIR=str(self.folder))

    def health(self) -> str:
        """The status in /health-check; "NONE" when there is no answer."""
        try:
            with http.urlopen(f"{self.address}/health-check", timeout=5) as answer:
                return json.load(answer)["status"]
        except OSError:
            return "NONE"

    def wait(self, seconds: float = 300) -> None:
        """Wait until the server is ready.

        Raises:
            UnavailableError: setup failed, or took too long.
        """
        end = time.monotonic() + seconds
        while (status := self.health()) != "READY":
            if status == "SETUP_FAILED" or self.process.poll() is not None or time.monotonic() > end:
                sys.stderr.write(self.log()[-2000:])
                raise UnavailableError(f"the server did not get ready ({status})")
            time.sleep(0.1)

    def _watch(self) -> None:
        bad = 0
        while not self.ended.wait(PROBE):
            status = self.health()
            now = time.monotonic()
            shown = "READY" if status == "BUSY" else status
            if not self.history or self.history[-1][1] != shown:
                self.history.append((now, shown))
            if status in ("READY", "BUSY"):
                self.memory.append((len(self.starts), now, sum(map(_megabytes, self.processes()))))
            bad = 0 if status in SOUND else bad + 1
            if bad >= FAILURES and now - self.starts[-1] > 20:  # a starting server does not answer yet
                self.stop_process()
                self.process, bad = self._start(), 0

    def processes(self) -> list[int]:
        """Process ids of the server and of its worker."""
        return [self.process.pid, *_children(self.process.pid)]

    def kill_worker(self) -> float:
        """Send the worker SIGKILL, as the system's out-of-memory killer does; returns the time."""
        os.kill(self.processes()[-1], signal.SIGKILL)
        return time.monotonic()

    def stop_process(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()
        self.stop_process()

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def endings(self) -> Counter[str]:
        """Count the endings in Cog's log by prediction id; 0 for a prediction that began and did not end."""
        found: Counter[str] = Counter()
        for line in self.log().splitlines():
            try:
                fields = json.loads(line)["fields"]
            except (ValueError, KeyError, TypeError):
                continue
            if name := fields.get("prediction_id"):
                found[name] += fields.get("message") in FINAL
        return found


def slope(memory: list[tuple[int, float, float]], warm: float) -> list[dict[str, Any]]:
    """For each start: seconds, peak and per-minute median megabytes, and their least-squares slope.

    Args:
        memory: as `Supervised.memory`.
        warm: seconds after the first sample to leave out.
    """
    rows = []
    for start in sorted({sample[0] for sample in memory}):
        own = [(when, size) for number, when, size in memory if number == start]
        kept = [(when - own[0][0], size) for when, size in own if when - own[0][0] >= warm]
        if len(kept) < 10:
            continue
        mean_x, mean_y = (sum(column) / len(kept) for column in zip(*kept, strict=True))
        square = sum((x - mean_x) ** 2 for x, _ in kept)
        rise = sum((x - mean_x) * (y - mean_y) for x, y in kept) / square
        minutes = [[size for x, size in kept if (x - kept[0][0]) // 60 == n] for n in range(int(kept[-1][0] // 60) + 1)]
        medians = [round(statistics.median(sizes)) for sizes in minutes if len(sizes) > 10]
        row = {"seconds": kept[-1][0] - kept[0][0], "most": max(size for _, size in kept), "by_minute": medians}
        rows.append(row | {"per_minute": rise * 60})
    return rows


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:  # it has just exited
            continue
    return found


def _megabytes(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0
