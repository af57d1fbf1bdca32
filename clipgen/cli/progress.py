"""Progress of long work: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from clipgen.cli.common import console, log

if TYPE_CHECKING:
    from rich.progress import TextColumn

    from clipgen.weights.cache import Report as DownloadReport
    from clipgen.weights.catalog import File

SECONDS = 5.0
"""Time between two lines of a log."""
MAX_BAR = 40

Report = Callable[[int, int], None]


@contextmanager
def progress(doing: str, done: str) -> Iterator[Report]:
    """Show the progress of one task.

    Args:
        doing: what is being done, shown beside the bar: "drawing 2 of 3 prompts".
        done: what to log at the end, followed by the seconds it took: "drew 2 of 3 prompts".

    Yields:
        A callback for the steps that are done and their number.
    """
    started = time.perf_counter()
    with (_bar if _draws_bars() else _lines)(doing) as report:
        yield report
    log(f"{done} in {time.perf_counter() - started:.1f} s")


@contextmanager
def _bar(doing: str) -> Iterator[Report]:
    """A bar in one line, however narrow the terminal is. It is gone at the end."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    left = console.width - len(doing) - len(" 100%")
    time_left = [TimeRemainingColumn()] if left >= len(" 0:00:00") else []
    bar = [BarColumn(min(left - len(" 0:00:00 "), MAX_BAR))] if left >= len(" 0:00:00 ----") else []
    doing = doing[: max(0, console.width - len(" 100%"))]
    with Progress(_label(), *bar, TaskProgressColumn(), *time_left, console=console, transient=True) as shown:
        task = shown.add_task(doing, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def _lines(doing: str) -> Iterator[Report]:
    """A line every few seconds: share of the work, and the time that is left at this pace."""
    started = last = time.perf_counter()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if 0 < done < total and now - last >= SECONDS:
            last = now
            log(f"{doing}: {100 * done // total}%, {(now - started) * (total - done) / done:.0f} s left")

    yield report


@contextmanager
def downloads() -> Iterator[DownloadReport]:
    """Yield a callback for downloads: a bar per file on a terminal, a line for every tenth of a file in a log."""
    if not _draws_bars():
        yield milestones(log)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TimeRemainingColumn

    tasks: dict[File, TaskID] = {}
    bar = [BarColumn()] if console.width >= 80 else []
    with Progress(_label(), *bar, DownloadColumn(), TimeRemainingColumn(), console=console) as shown:

        def report(file: File, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = shown.add_task(file.name, total=total)
            shown.update(tasks[file], completed=done, total=total)

        yield report


def milestones(log: Callable[[str], None]) -> DownloadReport:
    """Return a callback that logs every tenth of a file, or every 100 MB when its size is unknown."""
    last: dict[File, int] = {}

    def report(file: File, done: int, total: int | None) -> None:
        step = 10 * done // total if total else done // 100_000_000
        if last.get(file) != step:
            last[file] = step
            log(f"{file.name}: {done / 1e6:,.0f} of {f'{total / 1e6:,.0f}' if total else '?'} MB")

    return report


def _draws_bars() -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _label() -> TextColumn:
    """Make a column of one line, which is cut off in a narrow terminal."""
    from rich.progress import TextColumn
    from rich.table import Column

    return TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
