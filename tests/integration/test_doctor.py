"""`clipgen doctor`: says what is wrong in one line and with exit code 1, and that all is well with 0."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner
from typer.testing import Result as RunResult

from clipgen.cli import examine as doctor
from clipgen.cli.main import app


def run(weights: Path, *args: str) -> RunResult:
    return CliRunner().invoke(
        app, ["doctor", "--weights", str(weights), "--device", "cpu", "--dtype", "float32", *args]
    )


def test_all_is_well(tiny_weights: Path) -> None:
    result = run(tiny_weights)
    assert result.exit_code == 0, result.output
    names = [line.split()[1] for line in result.stdout.splitlines()[:-1]]
    assert names == ["python", "packages", "memory", "threads", "weights", "coverage", "device", "time"]
    assert "a picture takes" in result.stdout and result.stdout.endswith("everything works\n")


def test_json(tiny_weights: Path) -> None:
    record = json.loads(run(tiny_weights, "--json").stdout)
    findings = {finding["name"]: finding for finding in record["findings"]}
    assert record["ok"] and findings["time"]["figure"] > 0 and "tiny" in findings["weights"]["text"]


@pytest.mark.parametrize("damage", ["missing", "flipped", "none"])
def test_weights_that_are_not_right(tiny_weights: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    if damage != "none":
        shutil.copytree(tiny_weights, folder)
    if damage == "missing":
        (folder / "gpt.safetensors").unlink()
    if damage == "flipped":
        data = bytearray((folder / "gpt.safetensors").read_bytes())
        data[-5] ^= 1
        (folder / "gpt.safetensors").write_bytes(data)
    result = run(folder)
    assert result.exit_code == 1 and "WRONG  weights" in result.stdout and "1 wrong" in result.stdout
    assert not json.loads(run(folder, "--json").stdout)["ok"]


def test_a_device_that_is_not_here(tiny_weights: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--weights", str(tiny_weights), "--device", "quantum"])
    assert result.exit_code == 1 and "quantum" in result.stdout


def test_packages(tmp_path: Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text(f"# why\npillow=={version('pillow')}  # a comment\ntorch=={version('torch').split('+')[0]}\n")
    assert doctor._packages(pins).state == "ok"
    pins.write_text("pillow==0.1\n")
    found = doctor._packages(pins)
    assert found.state == "warning" and version("pillow") in found.text and "0.1" in found.text
    pins.write_text("no-such-package-here==1.0\n")
    found = doctor._packages(pins)
    assert found.state == "wrong" and "no-such-package-here 1.0" in found.text
    assert doctor._packages(tmp_path / "none.txt").state == "ok"


def test_drawing_that_fails() -> None:
    def draw() -> None:
        raise RuntimeError("out of memory")

    found = doctor._time(draw)
    assert found.state == "wrong" and "out of memory" in found.text
