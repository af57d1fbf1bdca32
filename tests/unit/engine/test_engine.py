"""The engine: sequences of many callers share steps, which changes none of their tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from engine_kit import SAMPLINGS, SMALL, alone, make_sequences, uncached
from torch import Tensor

from clipgen.engine.batch import Batch
from clipgen.engine.engine import Engine
from clipgen.errors import Cancelled
from clipgen.models.gpt import GPT
from clipgen.request import SamplingParams
from clipgen.utils import memory
from clipgen.utils.memory import HEADROOM, token_bytes

# --- many callers ---


def test_concurrent_calls_share_steps_and_get_their_own_tokens(
    gpt: GPT, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: steps.append(len(batch.sequences)) or step(batch))
    calls = [make_sequences(1 + i % 3, SAMPLINGS[i % 4], first=10 * i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        output = list(pool.map(engine.generate, calls))
    assert len(steps) < 8 * SMALL.block_size / 2
    for sequences, result in zip(calls, output, strict=True):
        assert torch.equal(result.tokens, torch.stack([alone(gpt, seq) for seq in sequences]))
        assert result.queue_time >= 0


def test_generate_without_sequences_returns_no_tokens(engine: Engine) -> None:
    assert engine.generate([]).tokens.shape == (0, SMALL.block_size)


def test_more_sequences_than_rows_are_returned_in_order(gpt: GPT) -> None:
    engine = Engine(gpt, max_num_seqs=2)
    sequences = make_sequences(9, SAMPLINGS[1])
    output = engine.generate(sequences).tokens
    assert torch.equal(output, torch.stack([alone(gpt, seq) for seq in sequences]))


class Gate:
    """Holds back the steps of an engine until `let` or `open` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = threading.Semaphore(0)
        self.steps: list[list[int]] = []  # seeds in each
        step = Batch.step

        def held(batch: Batch) -> None:
            assert self.passes.acquire(timeout=60)
            self.steps.append([seq.seed for seq in batch.sequences])
            step(batch)

        monkeypatch.setattr(Batch, "step", held)

    def let(self, count: int) -> None:
        """Let a number of steps start, and wait until they have."""
        expected = len(self.steps) + count
        for _ in range(count):
            self.passes.release()
        until(lambda: len(self.steps) >= expected)

    def open(self) -> None:
        """Let all steps start from now on."""
        self.passes.release(10**6)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def test_small_request_starts_at_once_beside_a_large_one(gpt: GPT, gate: Gate) -> None:
    engine = Engine(gpt, max_num_seqs=16)
    with ThreadPoolExecutor() as pool:
        many = pool.submit(engine.generate, make_sequences(64))
        gate.let(3)
        assert len(gate.steps[-1]) == 16  # four fifths of 20 places
        one = pool.submit(engine.generate, make_sequences(1, first=1000))
        until(lambda: len(engine.scheduler.groups) == 2)
        gate.let(2)
        assert 1000 in gate.steps[-1]
        gate.let(SMALL.block_size)
        assert one.result(30).tokens.shape == (1, SMALL.block_size) and not many.done()
        gate.open()
        assert len(many.result(30).tokens) == 64
    assert len(gate.steps) == 4 * SMALL.block_size  # the single one ran in shared steps only


def test_waiting_requests_start_in_order_of_arrival(gpt: GPT, gate: Gate) -> None:
    engine = Engine(gpt, max_num_seqs=1)  # two rows: one sequence at a time
    with ThreadPoolExecutor() as pool:
        futures = []
        for i in range(4):
            futures.append(pool.submit(engine.generate, make_sequences(1, first=i)))
            until(lambda i=i: len(engine.scheduler.groups) == i + 1)
        gate.open()
        for future in futures:
            future.result(30)
    assert list(gate.steps[:: SMALL.block_size]) == [[0], [1], [2], [3]]


def test_cancelled_request_frees_its_rows_before_the_next_step(gpt: GPT, gate: Gate) -> None:
    engine = Engine(gpt)
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(engine.generate, make_sequences(5), is_cancelled=stop.is_set)
        going = pool.submit(engine.generate, make_sequences(2, first=50))
        until(lambda: len(engine.scheduler.groups) == 2)
        gate.let(4)
        assert len(gate.steps[-1]) in (5, 7)
        stop.set()
        gate.let(2)  # one may have started before
        assert gate.steps[-1] == [50, 51]
        with pytest.raises(Cancelled):
            stopped.result(30)
        gate.open()
        assert torch.equal(going.result(30).tokens[0], uncached(gpt, make_sequences(1, first=50)[0]))


def test_waiting_request_can_be_cancelled(gpt: GPT, gate: Gate) -> None:
    engine = Engine(gpt, max_num_seqs=1)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(engine.generate, make_sequences(1))
        until(lambda: engine.scheduler.groups)
        gate.let(1)
        second = pool.submit(engine.generate, make_sequences(1), is_cancelled=lambda: True)
        until(lambda: len(engine.scheduler.groups) == 2)
        gate.let(1)
        with pytest.raises(Cancelled):
            second.result(30)
        gate.open()
        first.result(30)


# --- callbacks ---


def test_progress_is_reported_after_every_step(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    engine.generate(make_sequences(3), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3 * (i + 1), 3 * SMALL.block_size) for i in range(SMALL.block_size)]


def test_is_cancelled_is_called_before_every_step(engine: Engine) -> None:
    asked: list[bool] = []
    engine.generate(make_sequences(1), is_cancelled=lambda: bool(asked.append(True)))
    assert len(asked) == SMALL.block_size


def test_callbacks_run_in_their_callers_context(engine: Engine) -> None:
    who: ContextVar[str] = ContextVar("who")
    seen: dict[str, set[str]] = {"a": set(), "b": set()}

    def call(name: str) -> None:
        who.set(name)
        engine.generate(make_sequences(1), progress=lambda done, total: seen[name].add(who.get()))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(call, "ab"))
    assert seen == {"a": {"a"}, "b": {"b"}}


def test_slow_progress_callback_holds_up_its_own_caller_only(engine: Engine) -> None:
    begun, done = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        begun.set()
        assert done.wait(30), "the other call waits for this callback"

    with ThreadPoolExecutor() as pool:
        first = pool.submit(engine.generate, make_sequences(1), slow)
        assert begun.wait(30)
        pool.submit(engine.generate, make_sequences(1, first=5)).result(20)
        done.set()
        assert len(first.result(30).tokens) == 1


@pytest.mark.parametrize("name", ["progress", "is_cancelled", "on_tokens"])
def test_failing_callback_fails_only_its_own_call(engine: Engine, gpt: GPT, name: str) -> None:
    def broken(*_: object) -> bool:
        raise LookupError("my callback")

    with ThreadPoolExecutor() as pool:
        other = pool.submit(engine.generate, make_sequences(2, first=5))
        with pytest.raises(LookupError, match="my callback"):
            engine.generate(make_sequences(1), **{name: broken}, every=2)  # type: ignore[arg-type]
        assert torch.equal(other.result(30).tokens[0], alone(gpt, make_sequences(1, first=5)[0]))
    until(lambda: not engine.scheduler.groups)


def test_on_tokens_receives_snapshots_in_the_callers_thread(gpt: GPT) -> None:
    engine = Engine(gpt, max_num_seqs=2)
    seen: list[Tensor] = []
    threads: set[int] = set()
    sequences = make_sequences(3)

    def watch(tokens: Tensor) -> None:
        seen.append(tokens)
        threads.add(threading.get_ident())

    final = engine.generate(sequences, on_tokens=watch, every=5).tokens
    assert threads == {threading.get_ident()}
    assert [int((tokens >= 0).sum()) for tokens in seen] == [10, 20, 30, 40, 45, 50, 55]  # the last ones are the result
    for tokens in seen:
        assert torch.equal(tokens[tokens >= 0], final[tokens >= 0])


# --- idle ---


def test_idle_engine_holds_neither_cache_nor_threads(engine: Engine) -> None:
    threads = threading.active_count()
    engine.generate(make_sequences(3))
    until(lambda: engine.batch.cache.data.nbytes == 0)
    assert not engine.scheduler.groups
    assert threading.active_count() <= threads  # threads of earlier tests may have ended meanwhile


def test_sequences_that_wait_get_as_many_rows_as_those_before_them(
    gpt: GPT, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache stays allocated from one wave to the next: it must not count as taken."""
    engine = Engine(gpt)
    room = 8 * token_bytes(SMALL, torch.float32, guided=False) / HEADROOM
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(room) + 1 - engine.batch.cache.data.nbytes)
    gate.open()
    engine.generate(make_sequences(20, SamplingParams(guidance=1.0)))
    assert [len(seeds) for seeds in gate.steps[:: SMALL.block_size]] == [7, 7, 6]  # 7 of 8 rows for one request
