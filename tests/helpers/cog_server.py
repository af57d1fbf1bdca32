"""Cog's real server on a free port of the loopback interface: with the input schema, as in an image, or without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from clipgen.utils.listening import usable_address
from serve import openapi

Answer = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent.parent


class _Retrying(httpx.HTTPTransport):
    """Sends a refused request again, as docs/serving.md advises.

    Cog answers "At capacity" to one of two requests that arrive in the same instant, even if nothing is running: it
    gives up at once when another request holds its pool of slots. And it frees a slot a moment after its answer.
    """

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        for wait in (0.02, 0.1, 0.5):
            response = super().handle_request(request)
            if response.status_code != 409:
                return response
            response.close()
            time.sleep(wait)
        return super().handle_request(request)


class CogServer:
    """A running server and the processes behind it."""

    def __init__(self, folder: Path, schema: bool = True, **environment: str) -> None:
        """Start it in `folder`, which becomes its working folder.

        Args:
            folder: gets links to the sources; the log is its file `log`.
            schema: run serve.py, which writes the input schema, as `cog build` does; else Cog's module alone.
            environment: added to the environment.
        """
        host, self.port = usable_address("127.0.0.1", 0)
        # A connection for each request: Cog closes one on which it has refused a request unread.
        transport = _Retrying(limits=httpx.Limits(max_keepalive_connections=0))
        self.http = httpx.Client(base_url=f"http://{host}:{self.port}", timeout=600, transport=transport)
        for name in ("predict.py", "serve.py", "weights"):
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)
        variables = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # its worker starts `python`
            "PORT": str(self.port),
            "PYTHONPATH": str(ROOT),
            "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
            "COG_MAX_CONCURRENCY": "8",
            "CLIPGEN_DEVICE": "cpu",
            "CLIPGEN_DTYPE": "float32",
            "OMP_NUM_THREADS": "1",
        }
        command = ["serve.py", "--port", str(self.port)] if schema else ["-m", "cog.server.http", "--host", "127.0.0.1"]
        self.log = folder / "log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env={**os.environ, **variables, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self, seconds: float = 600) -> Answer:
        """Body of the health check once setup has ended, successfully or not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            health = self.health()
            if health["status"] not in ("UNKNOWN", "STARTING"):
                return health
            time.sleep(0.1)
        raise AssertionError(f"no answer from the server:\n{self.log.read_text()[-3000:]}")

    def health(self) -> Answer:
        """Body of the health check; its status is UNKNOWN if there is no answer."""
        try:
            return self.http.get("/health-check").json()
        except httpx.TransportError:
            return {"status": "UNKNOWN"}

    def predict(self, **inputs: Any) -> Answer:
        """Request a prediction and wait for its end."""
        return self.http.post("/predictions", json={"input": inputs}).json()

    def stream(self, **inputs: Any) -> list[tuple[str, Answer]]:
        """Request a prediction as server-sent events; returns their names and data."""
        headers = {"Accept": "text/event-stream"}
        with self.http.stream("POST", "/predictions", json={"input": inputs}, headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            blocks = "".join(answer.iter_text()).strip().split("\n\n")
        pairs = [dict(line.split(": ", 1) for line in block.splitlines() if ": " in line) for block in blocks]
        return [(pair["event"], json.loads(pair["data"])) for pair in pairs if "event" in pair]

    def stop(self) -> None:
        """Stop the server, by force after ten seconds."""
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def processes(self) -> list[int]:
        """Process ids of the server and its workers."""
        return [self.process.pid, *_children(self.process.pid)]

    def memory(self) -> float:
        """Memory of all its processes, megabytes."""
        pages = 0
        for pid in self.processes():
            with suppress(OSError):  # it has ended meanwhile
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def running(folder: Path, schema: bool = True, **environment: str) -> Iterator[CogServer]:
    """Run a server until the block ends; yields it when it is ready."""
    server = CogServer(folder, schema, **environment)
    try:
        assert server.wait()["status"] == "READY", server.log.read_text()
        yield server
    finally:
        server.stop()


def input_schema() -> dict[str, Any]:
    """JSON schema of each input of predict.py, by name."""
    schemas = openapi((ROOT / "predict.py").read_text())["components"]["schemas"]
    fields = {name: field | schemas.get(name, {}) for name, field in schemas["Input"]["properties"].items()}
    for field in fields.values():  # a choice refers to its enumeration
        field.pop("allOf", None)
    return fields


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended meanwhile
            found += map(int, task.read_text().split())
    return found + [grandchild for child in found for grandchild in _children(child)]
