"""The CPU cores that this process may use, and how its threads wait. Needs no PyTorch and may run before its import.

PyTorch's OpenMP (GNU libgomp) counts the cores of the process's affinity, but not a container's CPU quota: limited to 2
CPUs on a host of 64 cores it would start 64 threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from clipgen.errors import ConfigError

CGROUPS = Path("/sys/fs/cgroup")
VARIABLE = "CLIPGEN_THREADS"
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SPINS = 3000
"""Rounds after which a thread of GNU's OpenMP sleeps: 0.08 to 0.11 ms on an AMD EPYC."""


def choose_wait_policy() -> None:
    """Let OpenMP threads sleep after a short wait, unless the environment says otherwise. Call before importing torch.

    By default they spin for long, and on a busy machine a spinning thread takes time from the thread that it waits for.
    Sleeping at once takes twice as long on some idle machines (docs/performance.md).
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(_SPINS)}


def describe_waiting() -> str:
    """The setting of the environment that decides how threads wait, such as "OMP_WAIT_POLICY=PASSIVE"; "" for none."""
    return ", ".join(f"{name}={os.environ[name]}" for name in _WAITING if name in os.environ)


def usable_cores() -> int:
    """Cores that the scheduler may put this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs that the container, or any group above it, may use on average; None without a limit (cgroup v1 and v2)."""
    limits = [limit for folder in cgroups("cpu", root, membership) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def cgroups(controller: str, root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """Folders of this process's groups of a controller, "cpu" or "memory", up to the root of each hierarchy."""
    yield from (root, root / controller, root / "cpu,cpuacct")  # a container's own group
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        bases = [root / controllers, root / controller] if controllers else [root, root / "unified"]
        for base in bases:
            group = base / path.strip("/")
            yield group
            yield from (parent for parent in group.parents if base in parent.parents)


def _limit(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such group, or "max", which is no limit
        return None


def thread_count(default: int) -> int:
    """Number of compute threads, given PyTorch's `default`, which follows OMP_NUM_THREADS and the affinity.

    CLIPGEN_THREADS has precedence, then OMP_NUM_THREADS (which torchrun sets to 1); else the CPU quota can lower it.

    Raises:
        ConfigError: CLIPGEN_THREADS is not a valid number of threads.
    """
    text = os.environ.get(VARIABLE, "")
    if text:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1024:
            raise ConfigError(f"{VARIABLE} is {text!r}; use a number of threads from 1 to 1024, or unset it")
        return int(text)
    quota = None if os.environ.get("OMP_NUM_THREADS") else cpu_quota()
    return default if quota is None else min(max(1, math.ceil(quota)), default)
