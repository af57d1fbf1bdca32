"""`make gpu-check` on a CPU: its stages run, and one that fails does not end the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpucheck.report import Bench, Figure, Skipped, run_stage


def bench(root: Path, out: Path) -> Bench:
    return Bench(torch.device("cpu"), tiny=True, out=out, root=root)


def test_failing_stage_keeps_its_figures_and_names_its_error(root: Path, tmp_path: Path) -> None:
    def stage(_: Bench) -> Iterator[Figure]:
        yield Figure("first", 1.0)
        raise RuntimeError("CUDA error: boom\nsecond line")

    outcome = run_stage("stage", stage, bench(root, tmp_path))
    assert (outcome.state, outcome.note) == ("failed", "RuntimeError: CUDA error: boom")
    assert [figure.name for figure in outcome.figures] == ["first"]


def test_missed_goal_and_missing_package_are_reported_differently(root: Path, tmp_path: Path) -> None:
    def short(_: Bench) -> Iterator[Figure]:
        yield Figure("speed", 2.0, "s", "at most 1 s", False)

    def skipped(_: Bench) -> Iterator[Figure]:
        raise Skipped("needs transformers")
        yield

    assert run_stage("short", short, bench(root, tmp_path)).state == "short"
    assert run_stage("skipped", skipped, bench(root, tmp_path)).note == "needs transformers"


@pytest.mark.slow
def test_stages_run_on_a_cpu_and_write_their_tables(root: Path, tmp_path: Path) -> None:
    stages = ["attention", "graphs", "no sync", "tokens", "nan", "encoding"]
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--out", tmp_path, "--stages", *stages]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    states = {outcome["stage"]: outcome["state"] for outcome in json.loads((tmp_path / "results.json").read_text())}
    assert states == dict.fromkeys(stages, "ok") | {"attention": "skipped", "graphs": "skipped"}
    assert "| **tokens** |" in (tmp_path / "results.md").read_text()
