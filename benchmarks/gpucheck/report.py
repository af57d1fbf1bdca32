"""Figures of the check, written as they arrive, and their tables."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipgen.utils.files import write_text
from clipgen.utils.text import first_line


@dataclass(frozen=True)
class Figure:
    """One measured number, and whether it meets its goal."""

    name: str
    value: Any
    unit: str = ""
    goal: str = ""
    met: bool | None = None
    """None where there is no goal."""


@dataclass(frozen=True)
class Bench:
    """Device, sizes and folder that a stage uses."""

    device: torch.device
    tiny: bool
    """Sizes for a CPU: the stage's code is checked, not the machine."""
    out: Path
    root: Path

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def environment(self) -> dict[str, str]:
        """Environment for child processes: with the checkout on their import path, and only this device visible."""
        path = os.pathsep.join(filter(None, (str(self.root), os.environ.get("PYTHONPATH"))))
        return os.environ | {"PYTHONPATH": path} | ({} if self.is_cuda else {"CUDA_VISIBLE_DEVICES": ""})


class Skipped(Exception):
    """Raised by a stage that cannot run here; the message says what it needs."""


Stage = Callable[[Bench], Iterator[Figure]]


@dataclass
class Outcome:
    """Result of one stage."""

    stage: str
    state: str = "ok"
    """ok, short (a goal was missed), skipped or failed."""
    figures: list[Figure] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""


def run_stage(name: str, stage: Stage, bench: Bench) -> Outcome:
    """Run a stage and keep its figures, even if it fails."""
    outcome, start = Outcome(name), time.perf_counter()
    try:
        for figure in stage(bench):
            outcome.figures.append(figure)
            print(f"    {line(figure)}", flush=True)
    except Skipped as reason:
        outcome.state, outcome.note = "skipped", str(reason)
    except Exception as error:  # one stage's failure must not end the others
        reason = first_line(error)
        outcome.state, outcome.note = "failed", f"{type(error).__name__}: {reason}"
    if outcome.state == "ok" and any(figure.met is False for figure in outcome.figures):
        outcome.state = "short"
    outcome.seconds = time.perf_counter() - start
    return outcome


def line(figure: Figure) -> str:
    """One line of text for a figure."""
    value = f"{figure.value:.4g}" if isinstance(figure.value, float) else str(figure.value)
    goal = f" (goal {figure.goal})" if figure.goal else ""
    verdict = "" if figure.met is None else (", met" if figure.met else ", MISSED")
    return f"{figure.name}: {value} {figure.unit}".rstrip() + goal + verdict


def append(out: Path, outcome: Outcome) -> None:
    """Add an outcome to results.jsonl, so that a crash of a later stage loses nothing."""
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome), default=str) + "\n")


def read(out: Path) -> list[Outcome]:
    """The outcomes written so far."""
    path = out / "results.jsonl"
    records = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return [Outcome(**record | {"figures": [Figure(**f) for f in record["figures"]]}) for record in records]


def write_report(out: Path, outcomes: list[Outcome], title: str) -> None:
    """Write results.json and results.md."""
    write_text(
        out / "results.json", json.dumps([asdict(outcome) for outcome in outcomes], indent=1, default=str) + "\n"
    )
    rows = [f"# {title}", "", "| stage | figure | measured | goal | |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        rows.append(f"| **{outcome.stage}** | {outcome.note} | {outcome.seconds:.1f} s | | {outcome.state} |")
        for f in outcome.figures:
            value = f"{f.value:.4g}" if isinstance(f.value, float) else str(f.value)
            verdict = "" if f.met is None else ("met" if f.met else "**missed**")
            rows.append(f"| | {f.name} | {value} {f.unit} | {f.goal} | {verdict} |")
    write_text(out / "results.md", "\n".join(rows) + "\n")
