"""/health-check of Cog's real server: UNHEALTHY once predictions cannot succeed any more, READY otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cog_server import CogServer, running

pytestmark = pytest.mark.slow
SMALL = {"prompt": "a", "candidates": 1, "seed": 0}


@pytest.fixture
def server(root: Path, tiny_weights: Path, tmp_path: Path) -> Iterator[CogServer]:
    """A server whose predictor has the faults that files in its folder, `tmp_path`, ask for."""
    (tmp_path / "faulty.py").symlink_to(root / "tests" / "helpers" / "faulty.py")
    stub = {"COG_PREDICT_TYPE_STUB": "faulty.py:Predictor", "CLIPGEN_WEIGHTS": str(tiny_weights)}
    with running(tmp_path, schema=False, **stub) as server:
        yield server


def test_server_stays_ready_after_a_transient_cuda_error_only(server: CogServer, tmp_path: Path) -> None:
    assert server.predict(**SMALL)["status"] == "succeeded" and server.health()["status"] == "READY"
    (tmp_path / "step_fails").touch()
    assert server.predict(**SMALL)["status"] == "failed"
    assert server.health()["status"] == "READY" and server.predict(**SMALL)["status"] == "succeeded"
    (tmp_path / "gpu_is_lost").touch()
    (tmp_path / "step_fails").touch()
    assert server.predict(**SMALL)["status"] == "failed"
    health = server.health()
    assert health["status"] == "UNHEALTHY" and "user_healthcheck_error" in health
    assert "the GPU no longer answers" in server.log.read_text()


def test_dead_compute_thread_makes_the_server_unhealthy(server: CogServer, tmp_path: Path) -> None:
    (tmp_path / "thread_dies").touch()
    server.http.put("/predictions/last", json={"input": SMALL}, headers={"Prefer": "respond-async"})
    deadline = time.monotonic() + 600
    while server.health()["status"] in ("READY", "BUSY") and time.monotonic() < deadline:
        time.sleep(0.1)
    health = server.health()
    assert health["status"] == "UNHEALTHY" and "user_healthcheck_error" in health
