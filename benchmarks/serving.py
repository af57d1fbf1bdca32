"""Throughput and latency of Cog's server by number of clients.

    python benchmarks/serving.py [--weights weights/mini] [--clients 1 2 4 8] [--seconds 6] [--json]

Each client sends its next request when it has its answer. There are two kinds: 1 image of 1 candidate, and 4 of 16. A
request that fails ends the benchmark. Cog frees a slot shortly after it has answered, so with 8 clients some requests
are refused with 409 at first. They are sent again, which counts as waiting time, and the refusals are counted.
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
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib import request as http
from urllib.error import HTTPError

from end_to_end import ROOT, describe_machine

from clipgen.errors import UnavailableError
from clipgen.utils.entry_point import entry_point
from clipgen.utils.listening import usable_address

KINDS = {"1 of 1": {"num_outputs": 1, "candidates": 1}, "4 of 16": {"num_outputs": 4, "candidates": 16}}
TIMEOUT = 300


@contextmanager
def serve(weights: Path) -> Iterator[str]:
    """Run the server on a free port of the loopback interface; yields its address when it is ready.

    Raises:
        UnavailableError: setup failed.
    """
    host, port = usable_address("127.0.0.1", 0)
    with tempfile.TemporaryFile() as log:
        process = start_server(port, weights, log)
        try:
            _wait(f"http://{host}:{port}", process)
            yield f"http://{host}:{port}"
        except UnavailableError:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-2000:])
            raise
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def start_server(port: int, weights: Path, log: IO[bytes], **environment: str) -> subprocess.Popen[bytes]:
    """Start serve.py, on the CPU unless CLIPGEN_DEVICE says otherwise."""
    device = os.environ.get("CLIPGEN_DEVICE", "cpu")
    variables = {"CLIPGEN_WEIGHTS": str(weights.resolve()), "CLIPGEN_DEVICE": device, **environment}
    command = [sys.executable, str(ROOT / "serve.py"), "--port", str(port)]
    return subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)


def _wait(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with http.urlopen(f"{address}/health-check", timeout=5) as answer:
                status = json.load(answer)["status"]
        except OSError:
            status = "UNKNOWN"
        if status == "READY":
            return
        if status == "SETUP_FAILED":
            break
        time.sleep(0.1)
    raise UnavailableError("the server did not get ready")


def ask(address: str, seed: int, kind: dict[str, int]) -> tuple[float, int]:
    """Send one prediction; return its seconds, and how often it was refused with 409 before.

    Raises:
        UnavailableError: the prediction failed.
    """
    body = json.dumps({"input": {"prompt": "a lemon", "seed": seed, **kind}}).encode()
    start = time.perf_counter()
    asked = http.Request(f"{address}/predictions", body, {"Content-Type": "application/json"})
    refused = 0
    while True:
        try:
            with http.urlopen(asked, timeout=TIMEOUT) as answer:
                found = json.load(answer)
            break
        except HTTPError as error:
            if error.code != 409:
                raise
            refused += 1
            time.sleep(0.01)
    if found["status"] != "succeeded" or len(found["output"]) != kind["num_outputs"]:
        raise UnavailableError(f"a prediction {found['status']}: {found.get('error')}")
    return time.perf_counter() - start, refused


def load(address: str, clients: int, seconds: float, kind: dict[str, int]) -> dict[str, float]:
    """Run `clients` for some seconds; requests that still run then are awaited and counted."""
    taken: list[tuple[float, float, int]] = []  # when it ended, how long it took, refusals
    errors: list[Exception] = []
    start = time.perf_counter()

    def client(number: int) -> None:
        try:
            sent = 0
            while time.perf_counter() - start < seconds:
                took, refused = ask(address, 1000 * number + sent, kind)
                taken.append((time.perf_counter() - start, took, refused))
                sent += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise UnavailableError(f"{len(errors)} of {clients} clients failed: {errors[0]}")
    # From the start to the last answer: all clients were busy except at the very end.
    wall = max(ended for ended, _, _ in taken)
    times = sorted(took for _, took, _ in taken)
    cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
    latency = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}
    refusals = sum(refused for _, _, refused in taken)
    return {"requests": len(times), "per_second": len(times) / wall, **latency, "refusals": refusals}


def measure(weights: Path, clients: list[int], seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """Measure throughput and latency, by kind and number of clients."""
    with serve(weights) as address:
        for kind in KINDS.values():
            ask(address, 0, kind)
        return {name: {str(n): load(address, n, seconds, kind) for n in clients} for name, kind in KINDS.items()}


def to_table(report: dict) -> str:
    """Markdown table of a report."""
    lines = [f"machine: {json.dumps(report['machine'])}", ""]
    lines += [
        "| images | clients | requests / s | times one client | p50 s | p95 s | p99 s | 409s |",
        "|---" * 8 + "|",
    ]
    for kind, rows in report["kinds"].items():
        one = rows.get("1")
        for n, row in rows.items():
            ratio = f"{row['per_second'] / one['per_second']:.1f}" if one else ""
            rates = f"{row['per_second']:.2f} | {ratio}"
            latency = f"{row['p50']:.2f} | {row['p95']:.2f} | {row['p99']:.2f}"
            lines.append(f"| {kind} | {n} | {rates} | {latency} | {row['refusals']} |")
    return "\n".join(lines)


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="folder of weights")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of clients, 1 to 8")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="kinds of request")
    parser.add_argument("--seconds", type=float, default=6, help="for each number of clients and kind")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if not all(1 <= n <= 8 for n in args.clients):
        parser.error(f"--clients {args.clients}: Cog answers 409 to more than 8 at once; give numbers from 1 to 8")
    for name in set(KINDS) - set(args.kinds):
        del KINDS[name]
    report = {"kinds": measure(args.weights, args.clients, args.seconds), "machine": describe_machine()}
    print(json.dumps(report) if args.json else to_table(report))


if __name__ == "__main__":
    main()
