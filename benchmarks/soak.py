"""Load test: many clients for many minutes, some of them badly behaved, and a worker killed half-way.

    python benchmarks/soak.py [--weights weights/mini] [--clients 16] [--minutes 10] [--json]

First the latency of well-behaved clients against their number. Then the soak: clients ask for images, cancel, hang up,
use a webhook or send wrong inputs; refusals (409) are retried as `soak_client.backoff` says. Half-way the server's
worker gets a SIGKILL. Every image that comes back must carry the receipt of its request, every webhook must be called
once, and the log must show one end of each prediction. The exit status is 1 when anything was lost, swapped, answered
twice or answered wrongly.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from end_to_end import ROOT, describe_machine
from soak_client import Client, Soak, receive
from soak_server import CRASH, Supervised, slope

from clipgen.utils.entry_point import entry_point
from train.loop.arguments import at_least


def drive(soak: Soak, clients: int, seconds: float, kinds: dict[str, int], first: int = 0) -> None:
    """Run clients concurrently for some seconds; requests in flight then are awaited."""
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda number: Client(soak, first + number).run(end, kinds), range(1, clients + 1)))


def percentiles(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
    return {"requests": len(times), "p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "most": max(times)}


def ladder(address: str, clients: int, seconds: float) -> dict[str, dict[str, float]]:
    """Latency of well-behaved clients, waiting after refusals included, by their number."""
    rows = {}
    for step, number in enumerate(sorted({1, 4, 8, clients})):
        soak = Soak(address)
        drive(soak, number, seconds, {"plain": 1}, first=100 * (step + 1))
        if soak.problems:
            sys.exit(f"error: {soak.problems[0]}")
        tries = {"refusals": soak.counts["409, tried again"], "most_tries": max(soak.tries)}
        rows[str(number)] = percentiles(soak.times["plain"]) | tries
    return rows


KINDS = {"plain": 50, "bad": 15, "cancel": 12, "hang up": 12, "webhook": 11}


def measure(weights: Path, clients: int, minutes: float) -> dict[str, Any]:
    """The ladder, then the soak with the worker killed in the middle."""
    with tempfile.TemporaryDirectory() as folder:
        server = Supervised(weights, Path(folder))
        soak = Soak(server.address)
        hooks = receive(soak)
        try:
            server.wait()
            rows = ladder(server.address, clients, minutes * 1.5)
            started = time.monotonic()
            deaths: list[float] = []
            fault = threading.Timer(minutes * 30, lambda: deaths.append(server.kill_worker()))
            fault.start()
            drive(soak, clients, minutes * 60, KINDS)
            lasted = time.monotonic() - started
            time.sleep(2)  # for webhooks that are called twice
        finally:
            server.stop()
            hooks.shutdown()
        predictions = account(soak, server)
        left = [path.name for path in Path(folder).iterdir() if path.name != "log"]
        back = [(when - deaths[0], status) for when, status in server.history if when > deaths[0] - 1]
        return {
            "ladder": rows,
            "seconds": lasted,
            "counts": dict(soak.counts),
            "plain": percentiles(soak.times["plain"]),
            "tries": dict(sorted(Counter(soak.tries).items())),
            "predictions": predictions,
            "memory": slope(server.memory, warm=min(60.0, minutes * 10)),
            "after_the_kill": [{"seconds": round(when, 1), "health": status} for when, status in back],
            "starts": len(server.starts),
            "left_in_tmp": len(left),
            "tracebacks": server.log().count("Traceback"),
            "problems": soak.problems,
        }


def account(soak: Soak, server: Supervised) -> dict[str, int]:
    """Count endings in the server's log; every prediction not cut off by the crash must have exactly one."""
    endings = server.endings()
    cut = [name for name, count in endings.items() if count == 0]
    crashed = server.log().count(CRASH)
    if len(cut) != crashed:
        soak.problem(f"{len(cut)} predictions have no end in the log, {crashed} were cut off by the crash: {cut}")
    if twice := [name for name, count in endings.items() if count > 1]:
        soak.problem(f"ended more than once: {twice}")
    if uneven := [name for name, calls in soak.hooks.items() if len(calls) != 1]:
        soak.problem(f"webhooks called more than once: {uneven}")
    return {"begun": len(endings), "ended_once": len(endings) - len(cut), "cut_off_by_the_crash": crashed}


def to_text(report: dict[str, Any]) -> str:
    """A report as Markdown."""
    lines = [
        f"machine: {json.dumps(report['machine'])}",
        "",
        "| clients | requests | p50 s | p95 s | p99 s | 409s | most tries |",
    ]
    lines.append("|---" * 7 + "|")
    for clients, row in report["ladder"].items():
        latency = f"{row['p50']:.2f} | {row['p95']:.2f} | {row['p99']:.2f}"
        lines.append(f"| {clients} | {row['requests']} | {latency} | {row['refusals']} | {row['most_tries']} |")
    lines += ["", f"soak: {report['seconds']:.0f} s"]
    lines += [f"- {what}: {count}" for what, count in sorted(report["counts"].items())]
    shown = set(report) - {"machine", "ladder", "seconds", "counts"}
    lines += [f"- {name}: {json.dumps(value)}" for name, value in report.items() if name in shown]
    return "\n".join(lines)


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="folder of weights")
    parser.add_argument("--clients", type=at_least(1), default=16, help="side by side; Cog takes 8 at once")
    parser.add_argument("--minutes", type=float, default=10, help="of the soak, at least 1")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.minutes < 1:
        parser.error(f"--minutes is {args.minutes:g}; it must be at least 1")
    report = {"machine": describe_machine()} | measure(args.weights, args.clients, args.minutes)
    print(json.dumps(report) if args.json else to_text(report))
    if report["problems"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
