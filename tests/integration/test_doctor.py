"""`clipgen doctor`: one line for each check; exit code 1 if something is wrong, else 0."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner
from typer.testing import Result as RunResult

from clipgen.cli.doctor import check_packages, time_images
from clipgen.cli.main import app
from clipgen.weights.model_dir import PARTS
from clipgen.weights.tensor_file import load_tensors


def run(weights: Path, *args: str) -> RunResult:
    return CliRunner().invoke(
        app, ["doctor", "--weights", str(weights), "--device", "cpu", "--dtype", "float32", *args]
    )


def test_healthy_installation_passes_every_check(tiny_weights: Path) -> None:
    result = run(tiny_weights)
    assert result.exit_code == 0, result.output
    names = [line.split()[1] for line in result.stdout.splitlines()[:-1]]
    assert names == ["python", "packages", "memory", "cpu", "threads", "weights", "coverage", "device", "time"]
    assert "an image takes" in result.stdout and result.stdout.endswith("everything works\n")


def test_json_holds_every_finding(tiny_weights: Path) -> None:
    record = json.loads(run(tiny_weights, "--json").stdout)
    findings = {finding["name"]: finding for finding in record["findings"]}
    assert record["ok"] and findings["time"]["figure"] > 0 and "tiny" in findings["weights"]["text"]


def test_parameters_are_counted_in_the_files_whose_weights_are_packed_once_loaded(root: Path) -> None:
    weights = root / "weights" / "mini"
    total = sum(tensor.numel() for part in PARTS for tensor in load_tensors(weights / f"{part}.safetensors").values())
    assert f"mini, {total / 1e6:.1f} M parameters" in run(weights).stdout


@pytest.mark.parametrize("damage", ["missing", "flipped", "none"])
def test_damaged_or_missing_weights_are_reported(tiny_weights: Path, tmp_path: Path, damage: str) -> None:
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


def test_unknown_device_is_reported(tiny_weights: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--weights", str(tiny_weights), "--device", "quantum"])
    assert result.exit_code == 1 and "quantum" in result.stdout


def test_packages_are_compared_with_pins(tmp_path: Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text(f"# why\npillow=={version('pillow')}  # a comment\ntorch=={version('torch').split('+')[0]}\n")
    assert check_packages(pins).state == "ok"
    pins.write_text("pillow==0.1\n")
    found = check_packages(pins)
    assert found.state == "warning" and version("pillow") in found.text and "0.1" in found.text
    pins.write_text("no-such-package-here==1.0\n")
    found = check_packages(pins)
    assert found.state == "wrong" and "no-such-package-here 1.0" in found.text
    assert check_packages(tmp_path / "none.txt").state == "ok"


def test_missing_package_is_reported_by_name(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> None:
    monkeypatch.setitem(sys.modules, "clipgen.pipeline", None)
    result = run(tiny_weights, "--json")
    *_, last = json.loads(result.stdout)["findings"]
    assert result.exit_code == 1 and last["state"] == "wrong"
    assert "clipgen.pipeline" in last["text"] and "make setup" in last["text"]


def test_failed_generation_is_reported() -> None:
    def draw() -> None:
        raise RuntimeError("out of memory")

    found = time_images(draw)
    assert found.state == "wrong" and "out of memory" in found.text


def test_gpu_that_cuda_cannot_start_is_a_note_with_the_remedy(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "nvidia0"
    node.touch()
    monkeypatch.setattr("clipgen.weights.precision.GPU_NODE", node)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail_to_start)
    record = json.loads(run(tiny_weights, "--json").stdout)
    [found] = [finding for finding in record["findings"] if finding["name"] == "device"]
    assert record["ok"] and found["state"] == "warning"
    assert (
        "driver on your system is too old" in found["text"]
        and "580" in found["text"]
        and "as pytorch.org describes" in found["text"]
    )


def fail_to_start() -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).")
