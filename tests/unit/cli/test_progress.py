"""Progress: one line on a terminal of any width, plain lines in a log."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from clipgen.cli import common, progress
from clipgen.weights.catalog import CATALOG

DOING = "drawing 12 of 300 prompts"


def shown(monkeypatch: pytest.MonkeyPatch, console: Console) -> str:
    """What a task of four steps writes to this console."""
    for module in (common, progress):
        monkeypatch.setattr(module, "console", console)
    with progress.progress(DOING, "drew 12 of 300 prompts") as report:
        for step in range(1, 5):
            report(step, 4)
            time.sleep(0.15)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [8, 12, 20, 26, 30, 40, 41, 50, 80, 200])
def test_progress_bar_stays_in_one_line_of_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    written = shown(monkeypatch, console)
    assert "\n" not in written[: written.rindex("100%")]
    frames = [frame for frame in re.split(r"\r|\n|\x1b\[[0-9;?]*[A-Za-z]", written) if "%" in frame]
    assert frames and all(len(frame) <= width and frame.startswith(DOING[: width - 5]) for frame in frames)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_in_a_log_has_no_control_characters(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.2)
    monkeypatch.setenv("TERM", "dumb")
    lines = shown(monkeypatch, Console(file=io.StringIO(), force_terminal=terminal, width=30)).splitlines()
    assert lines[:-1] and all(re.match(rf"{DOING}: (25|50|75)%", line) for line in lines[:-1])
    assert re.fullmatch(r"drew 12 of 300 prompts in \d\.\d s", lines[-1])
    assert all(line.isprintable() for line in lines)


def test_progress_of_quick_work_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(shown(monkeypatch, Console(file=io.StringIO(), width=80)).splitlines()) == 1


def test_downloads_are_one_task_a_file_whether_resumed_or_of_unknown_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = Console(file=io.StringIO(), width=80)
    for module in (common, progress):
        monkeypatch.setattr(module, "console", console)
    monkeypatch.setattr(progress, "SECONDS", 0.1)
    whole, resumed = CATALOG["coco"].files[:2]
    with progress.downloads() as report:
        for done in range(4):
            report(whole, done, None)
        for done in (70, 80, 90, 100):
            report(resumed, done, 100)
            time.sleep(0.2)
    assert isinstance(console.file, io.StringIO)
    first, *shares, last = console.file.getvalue().splitlines()
    assert first.startswith(f"fetched {whole.name} in") and last.startswith(f"fetched {resumed.name} in")
    assert [share.split(",")[0] for share in shares] == [f"fetching {resumed.name}: {n}%" for n in (80, 90)]


def test_quiet_progress_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Console(file=io.StringIO(), force_terminal=True, quiet=True)) == ""
