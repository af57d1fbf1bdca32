"""Cog's real server from start to stop: cold and warm, and what happens to running predictions at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cog_server import Answer, CogServer
from tracebacks import has_traceback

pytestmark = pytest.mark.slow
SHORT = {"prompt": "a lemon", "candidates": 1, "seed": 1}
LONG = SHORT | {"candidates": 64}
"""Takes some seconds with the mini model on one thread."""
LATER = [f"later-{i}" for i in range(5)]


def logged(log: Path) -> list[dict[str, Any]]:
    """Lines of Cog's log: JSON objects."""
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def said_of(log: Path, prediction: str) -> list[str]:
    """Log messages of one prediction."""
    return [line["fields"]["message"] for line in logged(log) if line["fields"].get("prediction_id") == prediction]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """A server with the mini model; the last test stops it."""
    server = CogServer(tmp_path_factory.mktemp("mini"))
    yield server
    server.stop()


def test_server_is_cold_until_an_image_was_drawn_then_warm(mini: CogServer) -> None:
    while (health := mini.health())["status"] == "UNKNOWN":
        time.sleep(0.05)
    assert health["status"] == "STARTING" and "completed_at" not in health["setup"]
    refused = mini.http.post("/predictions", json={"input": {"prompt": "a"}})
    assert refused.status_code == 503 and "Setup has not finished" in refused.text
    health = mini.wait()
    assert health["status"] == "READY" and health["setup"]["status"] == "succeeded"
    (ready,) = [json.loads(line["fields"]["message"]) for line in logged(mini.log) if '"ready"' in str(line)]
    assert ready["event"] == "ready" and ready["model"] == "mini" and ready["load"] < ready["wall"]
    times = [mini.predict(prompt="a lemon", candidates=1)["metrics"]["seconds"]["total"] for _ in range(4)]
    assert times[0] < 3 * min(times[1:]) + 0.3, "the first one had to warm something up"


def test_sigterm_answers_waiting_clients_and_logs_lost_predictions(mini: CogServer) -> None:
    answers: dict[str, Answer] = {}

    def wait_for(name: str, inputs: dict[str, Any]) -> None:
        answers[name] = mini.http.put(f"/predictions/{name}", json={"input": inputs}).json()

    assert mini.wait()["status"] == "READY"
    waiting = [threading.Thread(target=wait_for, args=(name, SHORT)) for name in ("one", "two")]
    for thread in waiting:
        thread.start()
    for name in LATER:  # more than can be drawn at once
        asked = {"json": {"input": LONG}, "headers": {"Prefer": "respond-async"}}
        assert mini.http.put(f"/predictions/{name}", **asked).status_code == 202
    deadline = time.monotonic() + 60
    while not all(said_of(mini.log, name) for name in ("one", "two", *LATER)) and time.monotonic() < deadline:
        time.sleep(0.05)
    mini.process.terminate()
    while mini.health()["status"] != "UNKNOWN" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert mini.health()["status"] == "UNKNOWN" and mini.process.poll() is None, "it should go on, but not listen"
    for thread in waiting:
        thread.join()
    assert mini.process.wait(30) == 0, "Cog gives what nobody waits for ten seconds more"
    for name in ("one", "two"):
        assert answers[name]["status"] == "succeeded", (answers[name], mini.log.read_text()[-3000:])
        assert len(answers[name]["output"]) == 1
        assert any('"event": "succeeded"' in said for said in said_of(mini.log, name))
    ended = {name: said_of(mini.log, name) for name in LATER}
    lost = [name for name, said in ended.items() if "Prediction worker completed" not in said]
    assert lost, "Cog has learnt to finish these: say so in docs/serving.md"
    assert all("Slot dropped while InUse with non-terminal prediction" in ended[name] for name in lost)
    assert not has_traceback(mini.log.read_text())


def test_ctrl_c_stops_make_serve_at_once(root: Path, tiny_weights: Path, tmp_path: Path) -> None:
    # 0.2 s; a worker that does not end with it is killed after ten.
    seconds = stop_with_ctrl_c(root, tiny_weights, tmp_path / "log")
    assert seconds < 6, f"Cog waited {seconds} seconds for a worker that hangs"


def stop_with_ctrl_c(root: Path, weights: Path, log: Path) -> float:
    """Seconds that `make serve` takes to stop."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stamp = f"{sys.prefix}/.run"  # -o: do not update this environment
    command = ["make", "-o", stamp, f"VENV={sys.prefix}", f"PORT={port}", "serve"]
    environment = {**os.environ, "CLIPGEN_WEIGHTS": str(weights), "CLIPGEN_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + 600
    status = ""
    while status != "READY" and server.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        with contextlib.suppress(httpx.TransportError):
            status = httpx.get(f"http://127.0.0.1:{port}/health-check").json()["status"]
    assert status == "READY", log.read_text()
    os.killpg(server.pid, signal.SIGINT)  # as a terminal does: make, Cog and Cog's worker
    begun = time.monotonic()
    server.wait(60)
    said = log.read_text()
    assert "Server shutdown complete" in said and not has_traceback(said), said
    return time.monotonic() - begun
