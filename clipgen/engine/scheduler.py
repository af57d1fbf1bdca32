"""Which sequences run next: first come, first served, with a fair share of the cache's rows (Yu et al., "Orca").

A request may take another row only while it holds fewer than FAIR_SHARE times the free rows (dynamic thresholds:
Choudhury & Hahne 1998). Alone it gets four fifths of the rows, the next one four fifths of the rest: however many
candidates the first request has, the next one rarely waits, and never longer than the running sequences take.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from queue import SimpleQueue

from torch import Tensor

from clipgen.engine.sequence import Sequence
from clipgen.errors import Cancelled

FAIR_SHARE = 4


@dataclass(eq=False)
class RequestGroup:
    """Sequences of one `Engine.generate` call and its callbacks."""

    sequences: list[Sequence]
    is_cancelled: Callable[[], bool] | None = None
    reports: bool = False
    """Whether the caller wants updates."""
    snapshot_every: int = 0
    """Steps from one snapshot of the tokens to the next; 0 for none."""
    waiting: deque[Sequence] = field(default_factory=deque)
    num_rows: int = 0
    """Rows of the cache that its running sequences hold."""
    num_steps: int = 0
    tokens: dict[Sequence, Tensor] = field(default_factory=dict)
    """Of the finished sequences."""
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    error: BaseException | None = None
    updates: SimpleQueue[tuple[int, Tensor | None] | None] = field(default_factory=SimpleQueue)
    """For the caller's thread: the number of tokens so far, and now and then a snapshot of them; None at the end."""

    def __post_init__(self) -> None:
        self.waiting.extend(self.sequences)

    @property
    def is_finished(self) -> bool:
        """Whether all of its sequences have their tokens."""
        return len(self.tokens) == len(self.sequences)

    def check_cancelled(self) -> None:
        """Ask the caller whether to go on; an exception of the callback ends the group."""
        try:
            if self.error is None and self.is_cancelled is not None and self.is_cancelled():
                self.error = Cancelled()
        except BaseException as error:
            self.error = error


class Scheduler:
    """Waiting and running sequences of all groups. Not thread-safe: the engine guards it."""

    def __init__(self) -> None:
        self.max_num_rows = 0
        self.max_num_seqs = 0
        self.groups: list[RequestGroup] = []  # in order of arrival
        self.running: dict[Sequence, RequestGroup] = {}

    @property
    def num_rows(self) -> int:
        """Rows that the running sequences hold."""
        return sum(group.num_rows for group in self.groups)

    def schedule(self) -> list[Sequence]:
        """Move the sequences that may start now from waiting to running."""
        admitted: list[Sequence] = []
        free = self.max_num_rows - self.num_rows
        for group in self.groups:
            while group.waiting and group.num_rows < FAIR_SHARE * free:
                # A guided sequence waits for its second row: the first one is kept free for it.
                if len(self.running) == self.max_num_seqs or free < group.waiting[0].num_rows:
                    return admitted
                seq = group.waiting.popleft()
                free -= seq.num_rows
                group.num_rows += seq.num_rows
                group.started = group.started or time.perf_counter()
                self.running[seq] = group
                admitted.append(seq)
        return admitted

    def finish(self, seq: Sequence, tokens: Tensor) -> RequestGroup:
        """Keep the tokens of a running sequence and free its rows; returns its group."""
        group = self.running.pop(seq)
        group.num_rows -= seq.num_rows
        group.tokens[seq] = tokens
        return group

    def remove(self, groups: Collection[RequestGroup]) -> list[Sequence]:
        """Remove groups, finished or not. Returns their running sequences, whose rows are now free."""
        dropped = [seq for seq, group in self.running.items() if group in groups]
        for seq in dropped:
            del self.running[seq]
        self.groups = [group for group in self.groups if group not in groups]
        return dropped

    def restart(self) -> None:
        """Put all running sequences back in front of those that wait: they start from their first token."""
        self.running = {}
        for group in self.groups:
            group.waiting = deque(seq for seq in group.sequences if seq not in group.tokens)
            group.num_rows = 0
