"""docs/serving.md: its programs draw, its commands work, its Kubernetes probes tell the states of a server apart."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from cog_server import CogServer
from PIL import Image

from clipgen.outputs.metadata import Receipt

pytestmark = pytest.mark.slow


def blocks(root: Path, language: str, word: str = "") -> list[str]:
    """The code blocks of a language that hold a word."""
    found = re.findall(rf"```{language}\n(.*?)```", (root / "docs" / "serving.md").read_text(encoding="utf-8"), re.S)
    return [block for block in found if word in block]


@pytest.fixture(scope="module")
def server(root: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    folder = tmp_path_factory.mktemp("documented")
    server = CogServer(folder, CLIPGEN_WEIGHTS=str(tiny_weights))
    try:
        assert server.wait()["status"] == "READY"
        yield server
    finally:
        server.stop()


def run(server: CogServer, folder: Path, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program of the page in a folder."""
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def here(server: CogServer, text: str) -> str:
    return text.replace("localhost:5000", f"127.0.0.1:{server.port}")


def drawn(folder: Path, prompt: str) -> int:
    """How many pictures of a prompt are there."""
    files = list(folder.glob("*.png"))
    assert all(Image.open(file).size == (32, 32) and Receipt.from_file(file).text == prompt for file in files)
    return len(files)


def test_the_python_client(root: Path, server: CogServer, tmp_path: Path) -> None:
    [program] = blocks(root, "python")
    run(server, tmp_path, sys.executable, "-c", here(server, program))
    assert drawn(tmp_path, "a red heart") == 2
    wrong = program.replace("num_outputs=2", "num_outputs=99")
    done = subprocess.run([sys.executable, "-c", here(server, wrong)], cwd=tmp_path, capture_output=True, text=True)
    assert "num_outputs is 99; it must be a whole number from 1 to 8" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_the_javascript_client(root: Path, server: CogServer, tmp_path: Path) -> None:
    [program] = blocks(root, "js")
    (tmp_path / "client.mjs").write_text(here(server, program))
    run(server, tmp_path, "node", "client.mjs")
    assert drawn(tmp_path, "a cat") == 2


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_commands(root: Path, server: CogServer, tmp_path: Path) -> None:
    [ask] = blocks(root, "sh", "answer.json")
    run(server, tmp_path, "bash", "-e", text=here(server, ask))
    assert drawn(tmp_path, "a lemon") == 2
    [webhook] = blocks(root, "sh", "webhook")
    answer = run(server, tmp_path, "bash", "-e", text=here(server, webhook)).stdout
    assert json.loads(answer)["status"] == "starting"
    [cancel] = blocks(root, "sh", "canceled.json")
    run(server, tmp_path, "bash", "-e", text=here(server, cancel.replace("sleep 1", "sleep 0.01")))
    assert json.loads((tmp_path / "canceled.json").read_text())["status"] in ("canceled", "succeeded")


def probes(root: Path) -> dict[str, Any]:
    [manifest] = blocks(root, "yaml")
    deployment, service = yaml.safe_load_all(manifest)
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    return {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}


def ask(server: CogServer, probe: dict[str, Any]) -> bool:
    """Whether a probe succeeds."""
    command = [part.replace("127.0.0.1:5000", f"127.0.0.1:{server.port}") for part in probe["exec"]["command"]]
    assert command[0] == "python"
    done = subprocess.run([sys.executable, *command[1:]], timeout=probe["timeoutSeconds"] * 3, capture_output=True)
    return done.returncode == 0


def test_the_probes_in_every_state(root: Path, tiny_weights: Path, tmp_path: Path) -> None:
    startup, readiness, liveness = probes(root).values()
    server = CogServer(tmp_path, CLIPGEN_WEIGHTS=str(tiny_weights))
    try:
        assert not ask(server, startup), "nobody listens yet, or it is cold"
        assert server.wait()["status"] == "READY"
        assert ask(server, startup) and ask(server, readiness) and ask(server, liveness)
        for worker in server.processes()[1:]:
            os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while ask(server, liveness) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert httpx.get(f"http://127.0.0.1:{server.port}/health-check").status_code == 200
        assert not ask(server, liveness) and not ask(server, readiness) and ask(server, startup)
    finally:
        server.stop()
    server = CogServer(tmp_path, CLIPGEN_WEIGHTS=str(tmp_path / "nowhere"))
    try:
        assert server.wait()["status"] == "SETUP_FAILED"
        assert ask(server, startup) and not ask(server, readiness) and not ask(server, liveness)
    finally:
        server.stop()
