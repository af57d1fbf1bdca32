"""The engine generates the tokens of many callers' images in shared steps of one GPT (Yu et al., "Orca", OSDI 2022).

`Engine.generate` hands a group of sequences to the scheduler and waits. The compute thread runs one round after the
other for as long as there is work: admit sequences, decode one token of each, hand over what is finished. Each round
queues the next one behind whatever else was submitted to the thread meanwhile, such as decoding pixels.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipgen.engine.batch import Batch
from clipgen.engine.cuda_graphs import CUDAGraphRunner, build_graphs
from clipgen.engine.scheduler import FAIR_SHARE, RequestGroup, Scheduler
from clipgen.engine.sequence import Sequence
from clipgen.errors import Cancelled, EngineError, InsufficientMemoryError
from clipgen.models.gpt import GPT
from clipgen.utils.compute_thread import ComputeThread
from clipgen.utils.memory import MAX_NUM_SEQS, halve, is_out_of_memory, max_batch_size, token_bytes
from clipgen.utils.text import first_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOutput:
    """Tokens and queueing delay of one `generate` call."""

    tokens: Tensor
    """(n, T) int64, on the GPT's device."""
    queue_time: float
    """Seconds until its first sequence started."""


class Engine:
    """Generates tokens for any number of threads at once.

    Args:
        gpt: the network, in eval mode; only read.
        max_num_seqs: sequences under guidance that one call can have running at once, if memory allows.
        compute: the thread that runs the steps.
    """

    def __init__(self, gpt: GPT, max_num_seqs: int = MAX_NUM_SEQS, compute: ComputeThread | None = None) -> None:
        self.gpt = gpt
        self.max_num_rows = 2 * max_num_seqs * (FAIR_SHARE + 1) // FAIR_SHARE
        self._compute = compute or ComputeThread()
        self._lock = threading.Lock()  # guards the scheduler and what follows
        self.scheduler = Scheduler()
        self._is_active = False  # whether a round is queued or running
        # Only used on the compute thread. Graphs are captured now, while nothing else uses the device.
        self.graphs: CUDAGraphRunner | None = self._compute.run(self._build_graphs)
        self.batch = Batch(gpt, self.graphs)

    def generate(
        self,
        sequences: Collection[Sequence],
        progress: Callable[[int, int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
        every: int = 0,
    ) -> EngineOutput:
        """Generate the tokens of sequences and wait for them; any number of threads may call this.

        Args:
            sequences: n of them.
            progress: called in the caller's own thread with (tokens done, tokens in all) after each step.
            is_cancelled: called before each step, on the compute thread: it must be quick, since everyone waits for it.
            on_tokens: called in the caller's own thread with the tokens so far (n, T), -1 where there is none yet,
                after every `every` steps until all are there.

        Raises:
            Cancelled: `is_cancelled` returned True; the rows were free before the next step.
            InsufficientMemoryError: not even one image fits.
            EngineError: a step failed otherwise.
        """
        own = [replace(seq) for seq in sequences]  # identified by identity, in this call only
        if not own:
            return EngineOutput(torch.empty(0, self.gpt.config.block_size, dtype=torch.long), 0.0)
        group = RequestGroup(own, is_cancelled, bool(progress or on_tokens), every if on_tokens else 0)
        self._submit(group)
        most, total = 0, len(own) * self.gpt.config.block_size
        try:
            while (update := group.updates.get()) is not None:
                done, snapshot = update
                if progress is not None and done > most:  # it never goes back, even where sequences had to start again
                    most = done
                    progress(done, total)
                if on_tokens is not None and snapshot is not None:
                    on_tokens(snapshot)
        except BaseException:  # Ctrl-C, or a callback failed: the next round drops the group
            group.error = group.error or Cancelled()
            raise
        if group.error is not None:
            raise group.error
        assert group.started is not None
        tokens = torch.stack([group.tokens[seq] for seq in own])
        return EngineOutput(tokens, group.started - group.submitted)

    def _submit(self, group: RequestGroup) -> None:
        with self._lock:
            self.scheduler.groups.append(group)
            if not self._is_active:
                self._is_active = True
                self._compute.submit(self._round)

    # --- on the compute thread ---

    def _round(self) -> None:
        """Run one step and queue the next round while there is work."""
        try:
            failure = self._try_step()
            # Here the exception is gone, and with its traceback the tensors that the failed step held.
            if failure is not None:
                self._recover(*failure)
        except Exception as error:  # the device is gone: nobody may wait for it
            log.exception("the engine could not recover")
            self._end_with_error(list(self.scheduler.groups), EngineError(f"the engine failed: {first_line(error)}"))
        finally:
            with self._lock:
                self._is_active = bool(self.scheduler.groups)
                if self._is_active:
                    self._compute.submit(self._round)

    def _try_step(self) -> tuple[str, BaseException | None] | None:
        """Run one step. Returns None, or the reason of a failure and its cause, None for a lack of memory."""
        try:
            self._step()
        except Exception as error:
            self._compute.check_device(error)
            return first_line(error), None if is_out_of_memory(error) else error
        return None

    def _step(self) -> None:
        """Drop cancelled groups, admit sequences, decode a token of each, hand over what is finished."""
        groups = list(self.scheduler.groups)
        for group in groups:
            group.check_cancelled()
        self._end({group for group in groups if group.error is not None})
        with self._lock:
            if not self.scheduler.max_num_rows:
                self._set_limits()
            admitted = self.scheduler.schedule()
        self.batch.add(admitted, self.scheduler.max_num_rows)
        if not self.batch.sequences:
            return
        self.batch.step()
        self._report()
        finished = self.batch.finished()
        if not finished:
            return
        bad = {self.scheduler.running[seq] for seq in self.batch.non_finite(finished)}
        for group in bad:
            group.error = EngineError("the GPT's logits are not finite: damaged weights, or an overflow of this dtype")
        with self._lock:
            ended = {self.scheduler.finish(seq, tokens) for seq, tokens in finished.items()}
        self.batch.remove(set(finished))
        self._end(bad | {group for group in ended if group.is_finished})

    def _set_limits(self) -> None:
        """Set the row limits from the memory that is free now. Call only while no cache is allocated."""
        rows = self.graphs.max_num_rows if self.graphs else self._fitting_rows()
        self.scheduler.max_num_rows = rows
        self.scheduler.max_num_seqs = self.scheduler.max_num_seqs or rows

    def _fitting_rows(self, share: int = 1) -> int:
        """Number of cache rows that fit into 1 / `share` of the usable memory."""
        row = token_bytes(self.gpt.config, self.gpt.allocate(0).data.dtype, guided=False)
        return max(2, max_batch_size(share * row, self.gpt.head.weight.device, self.max_num_rows))

    def _build_graphs(self) -> CUDAGraphRunner | None:
        return build_graphs(self.gpt, self._fitting_rows(share=2))  # half: the graphs keep their cache

    def _report(self) -> None:
        """Tell each group its progress and, where asked for, its tokens so far."""
        length, running = self.batch.length, self.scheduler.running
        done: Counter[RequestGroup] = Counter()
        for seq, count in zip(self.batch.sequences, self.batch.num_tokens, strict=True):
            done[running[seq]] += count
        for group, count in done.items():
            group.num_steps += 1
            total = length * len(group.sequences)
            count += length * len(group.tokens)
            is_due = count < total and group.snapshot_every and group.num_steps % group.snapshot_every == 0
            if group.reports:
                group.updates.put((count, self._snapshot(group) if is_due else None))

    def _snapshot(self, group: RequestGroup) -> Tensor:
        """All tokens of a group so far, (n, T), -1 where there is none yet."""
        batch = self.batch
        running = dict(
            zip(batch.sequences, zip(batch.tokens.cpu(), batch.num_tokens, strict=True), strict=True),
        )
        snapshot = torch.full((len(group.sequences), batch.length), -1)
        for row, seq in zip(snapshot, group.sequences, strict=True):
            if seq in group.tokens:
                row[:] = group.tokens[seq]
            elif seq in running:
                tokens, count = running[seq]
                row[:count] = tokens[:count]
        return snapshot

    def _end(self, groups: Collection[RequestGroup]) -> None:
        """End groups, finished or not, free their rows and wake their callers."""
        if not groups:
            return
        with self._lock:
            dropped = self.scheduler.remove(groups)
            is_idle = not self.scheduler.groups
            if is_idle:
                self.scheduler.max_num_rows = self.scheduler.max_num_seqs = 0  # measured anew for the next request
        for group in groups:
            group.updates.put(None)
        if is_idle:  # give the cache back
            self.batch = Batch(self.gpt, self.graphs)
        else:
            self.batch.remove(set(dropped))

    def _recover(self, reason: str, cause: BaseException | None) -> None:
        """After a failed step: its groups fail, or, when memory ran out, all unfinished sequences start again."""
        with self._lock:
            count = len(self.scheduler.running)
            groups = set(self.scheduler.running.values()) or set(self.scheduler.groups)
            self.scheduler.restart()
            self.scheduler.max_num_rows = 0
        self.batch = Batch(self.gpt, self.graphs)
        if cause is None:
            try:
                self.scheduler.max_num_seqs = halve(count, "decoding tokens", reason)
            except InsufficientMemoryError as error:
                self._end_with_error(groups, error)
        else:
            failure = EngineError(f"decoding tokens failed: {reason}")
            failure.__cause__ = cause
            self._end_with_error(groups, failure)

    def _end_with_error(self, groups: Collection[RequestGroup], error: BaseException) -> None:
        for group in groups:
            group.error = error
        self._end(groups)
