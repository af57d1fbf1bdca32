"""The engine: what many callers want drawn, in the same steps of one GPT (Yu et al., "Orca", OSDI 2022).

Who is next: first come, first served, but a call may take another row only while it holds less than SHARE times the
rows that are free (dynamic thresholds: Choudhury & Hahne 1998). Alone it gets four fifths of the rows, the next one
four fifths of the rest: however many candidates the first has, the next one hardly ever waits, and never longer than
the pictures under way take.

One of the waiting callers orders the steps for all until its own call is done, then the next one does. The worker
(`clipgen.utils.compute_thread`) takes them, one after the other, and between two of them what else callers have for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from clipgen.engine.batch import Batch, Picture
from clipgen.engine.cuda_graphs import Graphs, build_graphs
from clipgen.errors import Cancelled, EngineError, InsufficientMemoryError, UnavailableError
from clipgen.models.gpt import GPT
from clipgen.utils.compute_thread import ComputeThread
from clipgen.utils.memory import MOST_ROWS, fitting, halve, is_out_of_memory, reason_of, token_bytes

SHARE = 4
BACKLOG = 1024
"""Pictures that may wait for a row before further calls are refused."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """What a call gets."""

    tokens: Tensor
    """(n, T) int64, on the GPT's device."""
    waited: float
    """Seconds until the first of its pictures was begun."""


@dataclass(eq=False)
class _Call:
    """What one caller wants. Once it is submitted, only who drives changes it, but for `stopped` and `error`."""

    pictures: list[Picture]
    progress: Callable[[int, int], None] | None
    is_cancelled: Callable[[], bool] | None
    every: int
    context: Context = field(default_factory=copy_context)
    submitted: float = field(default_factory=time.perf_counter)
    begun: float | None = None
    waiting: deque[Picture] = field(default_factory=deque)
    held: int = 0  # rows of the cache
    steps: int = 0
    told: int = 0
    tokens: dict[Picture, Tensor] = field(default_factory=dict)
    stopped: bool = False
    over: bool = False
    error: BaseException | None = None
    news: deque[Tensor] = field(default_factory=deque)  # snapshots of the tokens

    def ask(self) -> None:
        """Whether to go on, in the caller's context; what its callback raises is the caller's."""
        try:
            if self.error is None and self.is_cancelled is not None and self.context.run(self.is_cancelled):
                self.stopped = True
        except BaseException as error:
            self.error = error
        if self.stopped and self.error is None:
            self.error = Cancelled()

    def tell(self, done: int, total: int) -> None:
        """Report progress, which never goes back, even where pictures had to start again."""
        try:
            if self.progress is not None and done > self.told:
                self.told = done
                self.context.run(self.progress, done, total)
        except BaseException as error:
            self.error = error


class Engine:
    """Draws the tokens of pictures for any number of threads at once.

    Args:
        gpt: the network, in eval mode; it is only read.
        most: pictures under guidance that one call can have under way at once, if memory allows.
        worker: the thread that takes the steps.
    """

    def __init__(self, gpt: GPT, most: int = MOST_ROWS, worker: ComputeThread | None = None) -> None:
        self.gpt = gpt
        self._worker = worker or ComputeThread()
        self.most = 2 * most * (SHARE + 1) // SHARE  # rows
        self._news = threading.Condition()  # guards what follows
        self._calls: list[_Call] = []  # as they came
        self._driver: _Call | None = None
        self._closed = False
        # What follows belongs to the driver.
        self._batch = Batch(gpt)
        self._of: dict[Picture, _Call] = {}  # whose the pictures in the batch are
        self._room = self._limit = 0  # rows; pictures, less after memory ran out
        self._graphs: Graphs | None = None

    def draw(
        self,
        pictures: Sequence[Picture],
        progress: Callable[[int, int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        watch: Callable[[Tensor], None] | None = None,
        every: int = 0,
    ) -> Drawn:
        """Draw pictures and wait for them; any number of threads may do so.

        Args:
            pictures: n of them.
            progress: called with (tokens done, tokens in all) after each step, in the caller's context but on the
                worker's thread: it must be quick, for everyone waits.
            is_cancelled: asked before each step, likewise.
            watch: called in the caller's own thread with the tokens so far (n, T), -1 for those not drawn, after every
                `every` steps until all are drawn; while it runs, steps may have to wait.

        Raises:
            Cancelled: `is_cancelled` said so; the rows were free before the next step.
            UnavailableError: BACKLOG pictures wait already.
            UnavailableError: the engine was closed.
            InsufficientMemoryError: not even one picture fits.
            EngineError: a step failed otherwise.
        """
        own = [replace(picture) for picture in pictures]  # each is known by its identity, here only
        call = _Call(own, progress, is_cancelled, every if watch else 0, waiting=deque(own))
        if not own:
            return Drawn(torch.empty(0, self.gpt.config.block_size, dtype=torch.long), 0.0)
        self._submit(call)
        try:
            while self._wait_or_drive(call):
                while call.news and watch is not None:
                    watch(call.news.popleft())
        except BaseException:  # Ctrl-C, or `watch` failed
            call.stopped = True
            raise
        finally:
            with self._news:
                if self._driver is call:
                    self._driver = None
                self._news.notify_all()
        if call.error is not None:
            raise call.error
        assert call.begun is not None
        return Drawn(torch.stack([call.tokens[picture] for picture in own]), call.begun - call.submitted)

    def close(self, seconds: float | None = None) -> tuple[int, int]:
        """Refuse new calls and wait for those under way; after `seconds` the rest fail with UnavailableError.

        Returns:
            How many finished, and how many did not.
        """
        with self._news:
            self._closed = True
            calls = list(self._calls)
            self._news.wait_for(lambda: not self._calls, seconds)
            for call in self._calls:
                call.error = call.error or UnavailableError("the engine was closed while this was drawn; ask elsewhere")
            self._news.wait_for(lambda: not self._calls)
        failed = sum(call.error is not None for call in calls)
        if calls:
            log.info("closed: %d calls finished, %d did not", len(calls) - failed, failed)
        return len(calls) - failed, failed

    def _submit(self, call: _Call) -> None:
        with self._news:
            waiting = sum(len(other.waiting) for other in self._calls)
            if self._closed:
                raise UnavailableError("the engine is closed; nothing more is drawn by it")
            if waiting >= BACKLOG:
                raise UnavailableError(f"{waiting} pictures are waiting to be drawn already; try again in a moment")
            self._calls.append(call)

    def _wait_or_drive(self, call: _Call) -> bool:
        """Until there is news for a call; False when it is over."""
        with self._news:
            self._news.wait_for(lambda: call.over or call.news or self._driver in (None, call))
            if call.over or call.news:
                return not call.over
            self._driver = call
        while not call.over and not call.news:  # others' work has its turn between rounds
            self._worker.run(self._drive)
        return not call.over

    # --- by the driver ---

    def _drive(self) -> None:
        """One round, whatever happens in it."""
        if not self._of:
            self._plan()
        try:
            self._round()
            return
        except Exception as error:
            reason, cause = reason_of(error), None if is_out_of_memory(error) else error
        except BaseException:  # the others start again
            self._restart(set(self._of.values()))
            raise
        # Here the exception is gone, and with its traceback the tensors that the failed step held.
        self._recover(reason, cause)

    def _plan(self) -> None:
        """Before the first picture of several: rows for the memory that is free now, or those of the graphs."""
        device, first = self.gpt.head.weight.device, not self._room
        each = token_bytes(self.gpt.config, self._batch.cache.data.dtype, guided=False)
        if first and device.type == "cuda":
            # Their cache stays, so it gets half of what would be taken otherwise.
            self._graphs = build_graphs(self.gpt, max(2, fitting(2 * each, device, self.most)))
            self._batch = Batch(self.gpt, self._graphs)
        self._room = len(self._graphs.x) if self._graphs else max(2, fitting(each, device, self.most))
        self._limit = self._limit or self._room

    def _round(self) -> None:
        """One step: ask who still wants theirs, let pictures in, draw a token of each, hand over what is finished."""
        calls = list(self._calls)
        for call in calls:
            call.ask()
        self._dismiss({call for call in calls if call.error is not None})
        self._batch.join(list(self._next()), self._room)
        if not self._batch.pictures:
            return
        self._batch.step()
        self._tell()
        finished = self._batch.finished()
        for picture, tokens in finished.items():
            self._of[picture].tokens[picture] = tokens
        done = {self._of[picture] for picture in finished}
        self._leave(set(finished))
        self._dismiss({call for call in done if len(call.tokens) == len(call.pictures)})

    def _next(self) -> Iterator[Picture]:
        """Pictures that may begin, taken out of their calls' queues."""
        free = self._room - len(self._batch.rows)
        for call in list(self._calls):
            while call.waiting and free >= call.waiting[0].width and call.held < SHARE * free:
                if len(self._of) == self._limit:
                    return
                picture = call.waiting.popleft()
                free -= picture.width
                call.held += picture.width
                call.begun = call.begun or time.perf_counter()
                self._of[picture] = call
                yield picture

    def _tell(self) -> None:
        length = self._batch.length
        done: Counter[_Call] = Counter()
        for picture, tokens in zip(self._batch.pictures, self._batch.done, strict=True):
            done[self._of[picture]] += tokens
        for call, tokens in done.items():
            call.steps += 1
            call.tell(length * len(call.tokens) + tokens, length * len(call.pictures))
            if call.every and call.steps % call.every == 0:
                call.news.append(self._snapshot(call))
                with self._news:
                    self._news.notify_all()

    def _snapshot(self, call: _Call) -> Tensor:
        """All tokens of a call so far, (n, T), -1 for those not drawn."""
        drawn = dict(
            zip(self._batch.pictures, zip(self._batch.tokens.cpu(), self._batch.done, strict=True), strict=True)
        )
        snapshot = torch.full((len(call.pictures), self._batch.length), -1)
        for row, picture in zip(snapshot, call.pictures, strict=True):
            if picture in call.tokens:
                row[:] = call.tokens[picture]
            elif picture in drawn:
                tokens, done = drawn[picture]
                row[:done] = tokens[:done]
        return snapshot

    def _leave(self, pictures: AbstractSet[Picture]) -> None:
        self._batch.leave(pictures)
        for picture in pictures:
            self._of.pop(picture).held -= picture.width

    def _dismiss(self, calls: AbstractSet[_Call]) -> None:
        """End calls, finished or not; their rows are free."""
        if not calls:
            return
        self._leave({picture for picture, call in self._of.items() if call in calls})
        with self._news:
            self._calls = [call for call in self._calls if call not in calls]
            if not self._calls:  # let go of the cache
                self._batch, self._limit = Batch(self.gpt, self._graphs), 0
            for call in calls:
                call.over = True
            self._news.notify_all()

    def _recover(self, reason: str, cause: BaseException | None) -> None:
        """After a step that failed: its calls fail too, or, when memory ran out, start what is not finished again."""
        pictures, calls = len(self._of), set(self._of.values()) or set(self._calls)
        self._restart(calls)
        if cause is None:
            try:
                self._limit = halve(pictures, "decoding tokens", reason)
                return
            except InsufficientMemoryError as error:
                failures: dict[_Call, BaseException] = dict.fromkeys(calls, error)
        else:
            failures = {call: EngineError(f"decoding tokens failed: {reason}") for call in calls}
        for call, failure in failures.items():
            failure.__cause__ = cause
            call.error = failure
        self._dismiss(calls)

    def _restart(self, calls: AbstractSet[_Call]) -> None:
        """Forget what is under way: what these calls still lack starts again."""
        self._batch, self._of = Batch(self.gpt, self._graphs), {}
        for call in calls:
            call.waiting = deque(picture for picture in call.pictures if picture not in call.tokens)
            call.held = 0
