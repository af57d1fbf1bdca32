"""Time of a command on an idle machine, beside busy loops, and under a CPU quota, with the ratios to idle.

    python benchmarks/busy.py [--weights weights/mini] [--repeats 3] [--json]

The command generates the best 4 of 16 candidates on the CPU, in a fresh process each time. A busy loop is another
process that never waits. The quota is one CPU, set by a control group, which only root can create; elsewhere that row
is left out. Each turn measures every condition once; medians are shown.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from clipgen.utils.cpu import CGROUPS, describe_waiting, usable_cores
from clipgen.utils.entry_point import entry_point
from train.loop.arguments import at_least

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ["-m", "clipgen", "generate", "a lemon", "--num-outputs", "4", "--candidates", "16", "--seed", "0"]
PERIOD = 100_000
"""Microseconds over which a quota holds."""

Condition = Callable[[], AbstractContextManager[list[str]]]
"""Makes the circumstances; yields what to put before the command."""


@contextmanager
def beside(loops: int) -> Iterator[list[str]]:
    """Run a number of processes that never wait beside the block."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield []
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def under_quota(cpus: float) -> Iterator[list[str]]:
    """Create a control group limited to a number of CPUs; yields arguments that make a command join it.

    Raises:
        OSError: this process cannot create one.
    """
    is_v2 = (CGROUPS / "cgroup.controllers").is_file()
    group = CGROUPS / ("" if is_v2 else "cpu") / f"clipgen-busy-{os.getpid()}"
    group.mkdir()
    try:
        quota = round(cpus * PERIOD)
        if is_v2:
            (group / "cpu.max").write_text(f"{quota} {PERIOD}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        yield ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group)]
    finally:
        group.rmdir()


CONDITIONS: dict[str, Condition] = {
    "idle": lambda: beside(0),
    "beside one busy loop": lambda: beside(1),
    "beside two busy loops": lambda: beside(2),
    "under a quota of one CPU": lambda: under_quota(1),
}


def seconds(condition: Condition, arguments: list[str]) -> float:
    """Seconds of one run of Python with these arguments under a condition.

    Raises:
        OSError: the condition is not possible here.
        subprocess.CalledProcessError: the command failed.
    """
    with condition() as before:
        started = time.perf_counter()
        subprocess.run([*before, sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - started


def measure(arguments: list[str], repeats: int) -> dict[str, list[float]]:
    """Seconds under every condition that is possible here, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in CONDITIONS}
    for _ in range(repeats):
        for name in list(times):
            try:
                times[name].append(seconds(CONDITIONS[name], arguments))
            except OSError as error:
                print(f"left out: {name} ({error})", file=sys.stderr)
                del times[name]
                continue
            print(f"  {name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return times


def to_table(report: dict) -> str:
    """Markdown table of a report."""
    machine, idle = report["machine"], statistics.median(report["seconds"]["idle"])
    lines = [f"{machine['instruction_set']}, {machine['cores']} cores, {machine['waiting']}, {report['repeats']} turns"]
    lines += ["", "| | s | of idle |", "|---|---|---|"]
    for name, times in report["seconds"].items():
        lines.append(f"| {name} | {statistics.median(times):.2f} | {statistics.median(times) / idle:.2f}x |")
    return "\n".join(lines)


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="folder of weights")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="turns; medians are shown")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    from clipgen.models.capabilities import instruction_set

    out = ROOT / "outputs" / "busy"
    arguments = [*COMMAND, "--weights", str(args.weights.resolve()), "--device", "cpu", "--out", str(out)]
    machine = {"instruction_set": instruction_set(), "cores": usable_cores(), "waiting": describe_waiting()}
    report = {"machine": machine, "repeats": args.repeats, "seconds": measure(arguments, args.repeats)}
    print(json.dumps(report) if args.json else to_table(report))


if __name__ == "__main__":
    main()
