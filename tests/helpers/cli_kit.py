"""The command line in this process: its results as JSON, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

Run = Callable[..., Result]
QUICK = ("--num-outputs", "2", "--candidates", "4", "--seed", "7", "--device", "cpu", "--dtype", "float32")


def records(result: Result) -> list[dict]:
    """The JSON lines on the stdout of a command that succeeded."""
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2, one line on stderr that holds `words`, nothing on stdout and nothing written."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("clipgen: "), result.stderr
    for word in words:
        assert word in lines[0]
    assert result.stdout == ""
    assert not Path("outputs").exists()
