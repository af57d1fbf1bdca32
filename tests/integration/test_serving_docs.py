"""docs/serving.md and docs/model-page.md: their programs, commands, probes, examples and workflow work as printed."""

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
from model_page import predict, read_examples, to_request
from PIL import Image

from clipgen.outputs.metadata import Receipt
from clipgen.serving import DEFAULT_PROMPT
from clipgen.weights.catalog import CATALOG

pytestmark = pytest.mark.slow


def blocks(root: Path, language: str, word: str = "") -> list[str]:
    """The code blocks of a language that contain a word."""
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
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def here(server: CogServer, text: str) -> str:
    return text.replace("localhost:5000", f"127.0.0.1:{server.port}")


def drawn(folder: Path, prompt: str) -> int:
    """The number of images in a folder, which must all be of a prompt."""
    files = list(folder.glob("*.png"))
    assert all(Image.open(file).size == (32, 32) and Receipt.from_file(file).text == prompt for file in files)
    return len(files)


def test_python_client_writes_images_and_names_a_wrong_input(root: Path, server: CogServer, tmp_path: Path) -> None:
    [program] = blocks(root, "python")
    run(server, tmp_path, sys.executable, "-c", here(server, program))
    assert drawn(tmp_path, "a red heart") == 2
    wrong = program.replace("num_outputs=2", "num_outputs=99")
    done = subprocess.run([sys.executable, "-c", here(server, wrong)], cwd=tmp_path, capture_output=True, text=True)
    assert "num_outputs" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_javascript_client_writes_images(root: Path, server: CogServer, tmp_path: Path) -> None:
    [program] = blocks(root, "js")
    (tmp_path / "client.mjs").write_text(here(server, program))
    run(server, tmp_path, "node", "client.mjs")
    assert drawn(tmp_path, "a cat") == 2


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_commands_generate_stream_cancel_and_call_webhooks(root: Path, server: CogServer, tmp_path: Path) -> None:
    [ask] = blocks(root, "sh", "answer.json")
    run(server, tmp_path, "bash", "-e", text=here(server, ask))
    assert drawn(tmp_path, "a lemon") == 2
    [variation] = blocks(root, "sh", "variation.json")
    run(server, tmp_path, "bash", "-e", text=here(server, variation))
    assert json.loads((tmp_path / "variation.json").read_text())["status"] == "succeeded"
    [stream] = blocks(root, "sh", "events.txt")
    run(server, tmp_path, "bash", "-e", text=here(server, stream))
    events = (tmp_path / "events.txt").read_text()
    assert events.count("event: output") == 2 and '"name":"preview"' in events and "event: completed" in events
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


def test_probes_distinguish_the_states_of_a_server(root: Path, tiny_weights: Path, tmp_path: Path) -> None:
    startup, readiness, liveness = probes(root).values()
    server = CogServer(tmp_path, CLIPGEN_WEIGHTS=str(tiny_weights))
    try:
        assert not ask(server, startup), "not listening yet, or cold"
        assert server.wait()["status"] == "READY"
        assert ask(server, startup) and ask(server, readiness) and ask(server, liveness)
        for worker in server.processes()[1:]:
            os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + 600
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


def test_examples_of_the_model_page_are_valid_inputs(root: Path, server: CogServer) -> None:
    page = root / "docs" / "model-page.md"
    examples = read_examples(page)
    assert "the-defaults" in examples and len(examples) >= 3
    for inputs in examples.values():
        assert len(predict(f"http://127.0.0.1:{server.port}", to_request(inputs, page.parent))) == (
            inputs.get("num_outputs", 1)
        )


def test_images_of_the_model_page_come_from_its_examples(root: Path) -> None:
    page = root / "docs" / "model-page.md"
    linked = set(re.findall(r"\]\((model-page/.*?)\)", page.read_text(encoding="utf-8")))
    assert linked == {f"model-page/{path.name}" for path in page.with_suffix("").iterdir()}
    for name, inputs in read_examples(page).items():
        files = sorted(page.with_suffix("").glob(f"{name}-*.webp"))
        assert len(files) == inputs.get("num_outputs", 1)
        for index, file in enumerate(files):
            receipt = Receipt.from_file(file)
            assert (receipt.seed, receipt.index, receipt.candidates) == (inputs["seed"], index, 16)
            assert receipt.text == inputs.get("prompt", "an image" if "image" in inputs else DEFAULT_PROMPT)


def test_workflow_pushes_with_the_cog_of_the_container(root: Path) -> None:
    workflow = yaml.safe_load((root / ".github" / "workflows" / "push.yml").read_text())
    config = yaml.safe_load((root / "cog.yaml").read_text())
    steps = workflow["jobs"]["push"]["steps"]
    [cog] = [step["with"] for step in steps if step.get("uses", "").startswith("replicate/setup-cog@")]
    assert cog["cog-version"] == f"v{config['build']['sdk_version']}"
    assert steps[-1]["run"] == 'cog push "r8.im/$MODEL" --separate-weights'
    options = workflow[True]["workflow_dispatch"]["inputs"]["weights"]["options"]  # YAML 1.1 reads `on` as True
    assert options == ["mini", "coco"] and all(option in (*CATALOG, "mini") for option in options)
    assert "${{" not in "".join(step.get("run", "") for step in steps), "inputs reach the shell as variables only"
