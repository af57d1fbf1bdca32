"""Progress of long work: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from clipgen.cli.common import console, log

if TYPE_CHECKING:
    from clipgen.weights.cache import Report as DownloadReport
    from clipgen.weights.catalog import File

SECONDS = 5.0
"""Time between two lines of a log."""
MAX_BAR = 40

Report = Callable[[int, int | None], None]
"""Called with the steps done and their number (None while unknown)."""


@contextmanager
def progress(doing: str, done: str) -> Iterator[Report]:
    """Show the progress of one task: "drawing 2 of 3 prompts", in the end "drew 2 of 3 prompts in 3.1 s"."""
    started = time.perf_counter()
    draws_bars = console.is_terminal and not console.is_dumb_terminal
    with (_bar if draws_bars else _lines)(doing) as report:
        yield report
    log(f"{done} in {time.perf_counter() - started:.1f} s")


@contextmanager
def _bar(doing: str) -> Iterator[Report]:
    """A bar in one line, however narrow the terminal is. It is gone at the end."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    left = console.width - len(doing) - len(" 100%")
    time_left = [TimeRemainingColumn()] if left >= len(" 0:00:00") else []
    bar = [BarColumn(min(left - len(" 0:00:00 "), MAX_BAR))] if left >= len(" 0:00:00 ----") else []
    doing = doing[: max(0, console.width - len(" 100%"))]
    with Progress(
        TextColumn("{task.description}"), *bar, TaskProgressColumn(), *time_left, console=console, transient=True
    ) as shown:
        task = shown.add_task(doing, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def _lines(doing: str) -> Iterator[Report]:
    """A line every few seconds: share of the work, and the time that is left at this pace."""
    last = time.perf_counter()
    first: tuple[int, float] | None = None  # steps and time: a download that is resumed does not begin at 0

    def report(done: int, total: int | None) -> None:
        nonlocal first, last
        now = time.perf_counter()
        before, since = first = first or (done, now)
        if total and before < done < total and now - last >= SECONDS:
            last = now
            left = (now - since) * (total - done) / (done - before)
            log(f"{doing}: {100 * done // total}%, {left:.0f} s left")

    yield report


@contextmanager
def downloads() -> Iterator[DownloadReport]:
    """Yield a callback for downloads, which come one after the other: each file is a task of its own."""
    reports: dict[File, Report] = {}
    with ExitStack() as current:

        def report(file: File, done: int, total: int | None) -> None:
            if file not in reports:
                current.close()
                reports[file] = current.enter_context(progress(f"fetching {file.name}", f"fetched {file.name}"))
            reports[file](done, total)

        yield report
