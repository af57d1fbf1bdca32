"""Number of threads, by environment and CPU quota, and their wait policy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipgen.errors import ConfigError
from clipgen.utils import cpu
from clipgen.utils.compute_thread import ComputeThread

SETTINGS = ("CLIPGEN_THREADS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("contents", "membership", "expected"),
    [
        ({}, "", None),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"cpu.max": "250000 100000\n"}, "0::/\n", 2.5),
        ({"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 1.5),
        ({"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "100000 50000\n"}, "0::/a/b\n", 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "1:cpu:/\n", None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "1:cpu:/\n", 0.5),
        (
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            "4:memory:/a\n1:cpu,cpuacct:/a\n",
            3.0,
        ),
        ({"cpu.max": "nonsense\n"}, "0::/\n", None),
    ],
)
def test_cpu_quota_is_the_lowest_of_all_cgroups(
    tmp_path: Path, contents: dict[str, str], membership: str, expected: float | None
) -> None:
    root = files(tmp_path / "cgroup", contents)
    file = tmp_path / "membership"
    file.write_text(membership)
    assert cpu.cpu_quota(root, file) == expected


def test_cpu_quota_without_cgroups_is_unlimited(tmp_path: Path) -> None:
    assert cpu.cpu_quota(tmp_path / "none", tmp_path / "none") is None


@pytest.mark.parametrize(
    ("environment", "quota", "default", "expected"),
    [
        ({}, None, 64, 64),
        ({}, 2.0, 64, 2),
        ({}, 1.5, 64, 2),
        ({}, 0.25, 64, 1),
        ({}, 8.0, 2, 2),
        ({"OMP_NUM_THREADS": "1"}, 4.0, 1, 1),
        ({"OMP_NUM_THREADS": "16"}, 4.0, 16, 16),
        ({"CLIPGEN_THREADS": "3"}, 2.0, 64, 3),
        ({"CLIPGEN_THREADS": "3", "OMP_NUM_THREADS": "1"}, None, 1, 3),
    ],
)
def test_threads_follow_the_environment_then_the_quota(
    environment: dict[str, str], quota: float | None, default: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "cpu_quota", lambda: quota)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cpu.thread_count(default) == expected


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "100000", "\u0661"])
def test_impossible_numbers_of_threads_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPGEN_THREADS", text)
    with pytest.raises(ConfigError, match=r"CLIPGEN_THREADS is .*; use a number of threads from 1 to 1024"):
        cpu.thread_count(4)


def test_compute_thread_keeps_to_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        monkeypatch.setattr(cpu, "cpu_quota", lambda: 2.0)
        assert ComputeThread().run(torch.get_num_threads) == 2
        monkeypatch.setenv("CLIPGEN_THREADS", "3")
        assert ComputeThread().run(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", cpu._WAITING)
def test_wait_policy_set_by_the_user_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "ACTIVE")
    cpu.choose_wait_policy()
    assert cpu.describe_waiting() == f"{name}=ACTIVE"


@pytest.mark.parametrize(
    "program",
    [
        "runpy.run_path('predict.py')",
        "runpy.run_path('train/stage1.py', run_name='__main__')",
        "runpy.run_path('benchmarks/roofline.py', run_name='__main__')",
        "runpy.run_module('clipgen', run_name='__main__')",
    ],
)
def test_programs_choose_the_wait_policy_before_pytorch_is_imported(program: str, root: Path, tmp_path: Path) -> None:
    """In a fresh process, in which importing PyTorch records the environment variable and exits."""
    record = f"""
import os, runpy, sys
class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            waits = [os.environ.get(name, "none") for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")]
            open({str(tmp_path / "policy")!r}, "w").write(" ".join(waits))
            os._exit(0)
sys.meta_path.insert(0, Recorder())
sys.argv = ["clipgen", "doctor", "--weights", "nowhere"]
"""
    subprocess.run([sys.executable, "-c", record + program], cwd=root, capture_output=True, timeout=600)
    assert (tmp_path / "policy").read_text() == "PASSIVE 3000"
