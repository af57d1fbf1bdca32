"""Cog's real server, as `make serve` runs it, on a free port of the loopback interface."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import httpx
from cog import Path as CogPath

from predict import DECLARED

Answer = dict[str, Any]


class CogServer:
    """A running server and the processes behind it."""

    def __init__(self, root: Path, log: Path, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # A connection for each request: Cog closes one on which it has refused a request unread.
        single = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120, limits=single)
        variables = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # its worker starts `python`
            "PORT": str(self.port),
            "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
            "COG_MAX_CONCURRENCY": "8",
            "CLIPGEN_DEVICE": "cpu",
            "CLIPGEN_DTYPE": "float32",
            "OMP_NUM_THREADS": "1",
        }
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"],
                cwd=root,
                env={**os.environ, **variables, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self, seconds: float = 120) -> Answer:
        """The health check's body once set-up has ended, well or not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                health = self.http.get("/health-check").json()
            except httpx.TransportError:
                health = {"status": "UNKNOWN"}
            if health["status"] not in ("UNKNOWN", "STARTING"):
                return health
            time.sleep(0.1)
        raise AssertionError(f"no answer from the server:\n{self.log.read_text()[-3000:]}")

    def predict(self, **inputs: Any) -> Answer:
        """Ask for a prediction and wait for its end."""
        return self.http.post("/predictions", json={"input": inputs}).json()

    def stop(self) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def processes(self) -> list[int]:
        """Its process ids: the server, and its workers."""
        return [self.process.pid, *_children(self.process.pid)]

    def memory(self) -> float:
        """Megabytes of memory in use, by all its processes."""
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.processes())
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def input_schema() -> dict[str, Any]:
    """The inputs as `cog build` writes them down: JSON schema by name."""
    kinds = {str: {"type": "string"}, int: {"type": "integer"}, float: {"type": "number"}}
    kinds[CogPath] = {"type": "string", "format": "uri"}
    found = {}
    for name, parameter in DECLARED.items():
        if name == "self":
            continue
        kind, *others = get_args(parameter.annotation) or [parameter.annotation]
        field = parameter.default
        found[name] = {"title": name, "description": field.description, **kinds[kind]}
        limits = {"minimum": field.ge, "maximum": field.le, "enum": field.choices, "default": field.default}
        found[name] |= {word: value for word, value in limits.items() if value is not None}
        found[name] |= {"nullable": True} if others else {}
    return found


def write_schema(folder: Path) -> None:
    """Put the file that `cog build` makes where the server looks for it: from now on it refuses by itself."""
    operation = {"x-cog-streaming": True, "responses": {"200": {"description": "done"}}}
    schemas = {"Input": {"type": "object", "title": "Input", "properties": input_schema()}}
    schemas["Output"] = {"type": "array", "items": {"type": "string", "format": "uri"}}
    document = {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {"/predictions": {"post": operation}},
        "components": {"schemas": schemas},
    }
    (folder / ".cog").mkdir()
    (folder / ".cog" / "openapi_schema.json").write_text(json.dumps(document))


def _children(pid: int) -> list[int]:
    found = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return found + [grandchild for child in found for grandchild in _children(child)]
