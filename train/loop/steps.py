"""Steps of a training, scripts that run one after the other."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_step(
    name: str, arguments: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> None:
    """Run one script to its end. SIGTERM is passed on; Ctrl-C reaches the script by itself.

    Args:
        name: of the step, for the message.
        arguments: of Python.
        folder: where the script runs; by default here.
        environment: of the script; by default this process's.

    Raises:
        SystemExit: it failed or was stopped, with its exit code.
    """
    process = subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment)
    handlers = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
    }
    try:
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code:
        print(f"{name} ended with exit code {code}; the same command continues from there", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)
