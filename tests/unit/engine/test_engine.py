"""The engine: pictures of many callers in the same steps, and none of them notices."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from engine_kit import SAMPLINGS, SMALL, alone, sharp_gpt, some
from torch import Tensor

from clipgen.config import GPTConfig
from clipgen.engine import engine as engine_module
from clipgen.engine.batch import Batch, Picture
from clipgen.engine.engine import Engine
from clipgen.engine.sampling import generate_tokens
from clipgen.errors import Cancelled, EngineError, InsufficientMemoryError, UnavailableError
from clipgen.models.gpt import GPT
from clipgen.models.kv_cache import KVCache


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return sharp_gpt()


@pytest.fixture
def engine(gpt: GPT) -> Iterator[Engine]:
    engine = Engine(gpt)
    yield engine
    engine.close(0)


# --- many callers ---


def test_callers_share_steps_and_get_their_own(gpt: GPT, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: steps.append(len(batch.pictures)) or step(batch))
    calls = [some(1 + i % 3, SAMPLINGS[i % 4], first=10 * i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(engine.draw, calls))
    assert len(steps) < 8 * SMALL.block_size / 2
    for pictures, result in zip(calls, drawn, strict=True):
        assert torch.equal(result.tokens, torch.stack([alone(gpt, p) for p in pictures]))
        assert result.waited >= 0


def test_nothing_to_draw(engine: Engine) -> None:
    assert engine.draw([]).tokens.shape == (0, SMALL.block_size)


def test_more_pictures_than_rows_come_in_order(gpt: GPT) -> None:
    engine = Engine(gpt, most=2)
    pictures = some(9, SAMPLINGS[1])
    drawn = engine.draw(pictures).tokens
    engine.close()
    assert torch.equal(drawn, torch.stack([alone(gpt, p) for p in pictures]))


class Gate:
    """Holds an engine's steps back until it is told how many may pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = threading.Semaphore(0)
        self.steps: list[list[int]] = []  # seeds in each
        step = Batch.step

        def held(batch: Batch) -> None:
            assert self.passes.acquire(timeout=30)
            self.steps.append([p.seed for p in batch.pictures])
            step(batch)

        monkeypatch.setattr(Batch, "step", held)

    def let(self, count: int) -> None:
        """Let steps pass and wait until they have begun."""
        expected = len(self.steps) + count
        for _ in range(count):
            self.passes.release()
        until(lambda: len(self.steps) >= expected)

    def open(self) -> None:
        """Let all steps pass from now on."""
        self.passes.release(10**6)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def test_one_candidate_does_not_wait_for_many(gpt: GPT, gate: Gate) -> None:
    engine = Engine(gpt, most=16)
    with ThreadPoolExecutor() as pool:
        many = pool.submit(engine.draw, some(64))
        gate.let(3)
        assert len(gate.steps[-1]) == 16  # four fifths of 20 places
        one = pool.submit(engine.draw, some(1, first=1000))
        until(lambda: len(engine._calls) == 2)
        gate.let(2)
        assert 1000 in gate.steps[-1]
        gate.let(SMALL.block_size)
        assert one.result(30).tokens.shape == (1, SMALL.block_size) and not many.done()
        gate.open()
        assert len(many.result(30).tokens) == 64
    assert len(gate.steps) == 4 * SMALL.block_size  # nothing but the shared steps was spent on the one
    engine.close()


def test_first_come_first_served(gpt: GPT, gate: Gate) -> None:
    engine = Engine(gpt, most=1)  # two rows: one picture at a time
    with ThreadPoolExecutor() as pool:
        futures = []
        for i in range(4):
            futures.append(pool.submit(engine.draw, some(1, first=i)))
            until(lambda i=i: len(engine._calls) == i + 1)
        gate.open()
        for future in futures:
            future.result(30)
    assert list(gate.steps[:: SMALL.block_size]) == [[0], [1], [2], [3]]
    engine.close()


def test_cancelling_frees_the_rows_before_the_next_step(gpt: GPT, gate: Gate) -> None:
    engine = Engine(gpt)
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(engine.draw, some(5), is_cancelled=stop.is_set)
        going = pool.submit(engine.draw, some(2, first=50))
        until(lambda: len(engine._calls) == 2)
        gate.let(4)
        assert len(gate.steps[-1]) in (5, 7)
        stop.set()
        gate.let(2)  # one may have been under way
        assert gate.steps[-1] == [50, 51]
        with pytest.raises(Cancelled):
            stopped.result(30)
        gate.open()
        assert torch.equal(going.result(30).tokens[0], alone_ungated(gpt, some(1, first=50)[0]))
    engine.close()


def alone_ungated(gpt: GPT, picture: Picture) -> Tensor:
    """What the plain loop draws, which no gate holds back."""
    return generate_tokens(gpt, picture.condition[None], [picture.seed], picture.sampling)[0]


def test_a_call_that_waits_can_be_cancelled_too(gpt: GPT, gate: Gate) -> None:
    engine = Engine(gpt, most=1)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(engine.draw, some(1))
        until(lambda: engine._calls)
        gate.let(1)
        second = pool.submit(engine.draw, some(1), is_cancelled=lambda: True)
        gate.let(1)
        with pytest.raises(Cancelled):
            second.result(30)
        gate.open()
        first.result(30)
    engine.close()


def test_a_full_queue_refuses_and_says_so(gpt: GPT, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BACKLOG", 3)
    engine = Engine(gpt, most=1)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(engine.draw, some(5, SAMPLINGS[1]))
        until(lambda: engine._calls and len(engine._calls[0].waiting) <= 4)
        with pytest.raises(UnavailableError, match=r"\d pictures are waiting .* try again"):
            engine.draw(some(1))
        gate.open()
        first.result(30)
        engine.draw(some(1))
    engine.close()


# --- callbacks ---


def test_progress_counts_every_step(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    engine.draw(some(3), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3 * (i + 1), 3 * SMALL.block_size) for i in range(SMALL.block_size)]


def test_should_stop_is_asked_before_each_step(engine: Engine) -> None:
    asked: list[bool] = []
    engine.draw(some(1), is_cancelled=lambda: bool(asked.append(True)))
    assert len(asked) == SMALL.block_size


def test_callbacks_run_in_their_callers_context(engine: Engine) -> None:
    who: ContextVar[str] = ContextVar("who")
    seen: dict[str, set[str]] = {"a": set(), "b": set()}

    def call(name: str) -> None:
        who.set(name)
        engine.draw(some(1), progress=lambda done, total: seen[name].add(who.get()))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(call, "ab"))
    assert seen == {"a": {"a"}, "b": {"b"}}


@pytest.mark.parametrize("name", ["progress", "is_cancelled", "watch"])
def test_a_callback_that_fails_fails_its_own_call(engine: Engine, gpt: GPT, name: str) -> None:
    def broken(*_: object) -> bool:
        raise LookupError("my callback")

    with ThreadPoolExecutor() as pool:
        other = pool.submit(engine.draw, some(2, first=5))
        with pytest.raises(LookupError, match="my callback"):
            engine.draw(some(1), **{name: broken}, every=2)  # type: ignore[arg-type]
        assert torch.equal(other.result(30).tokens[0], alone(gpt, some(1, first=5)[0]))
    until(lambda: not engine._calls)


def test_watching_shows_the_tokens_as_they_come(gpt: GPT) -> None:
    engine = Engine(gpt, most=2)
    seen: list[Tensor] = []
    threads: set[int] = set()
    pictures = some(3)

    def watch(tokens: Tensor) -> None:
        seen.append(tokens)
        threads.add(threading.get_ident())

    final = engine.draw(pictures, watch=watch, every=5).tokens
    engine.close()
    assert threads == {threading.get_ident()}
    assert [int((tokens >= 0).sum()) for tokens in seen] == [10, 20, 30, 40, 45, 50, 55]  # the rest is the result
    for tokens in seen:
        assert torch.equal(tokens[tokens >= 0], final[tokens >= 0])


# --- faults ---


class Broken(RuntimeError):
    pass


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, when: Callable[[Batch], bool]) -> None:
    step = Batch.step

    def maybe(batch: Batch) -> None:
        if when(batch):
            raise error
        step(batch)

    monkeypatch.setattr(Batch, "step", maybe)


def test_a_step_that_fails_fails_its_calls_and_the_engine_lives_on(
    gpt: GPT, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, Broken("boom"), lambda batch: any(p.seed == 13 for p in batch.pictures))
    with pytest.raises(EngineError, match="boom") as caught:
        engine.draw(some(2, first=12))
    assert isinstance(caught.value.__cause__, Broken)
    assert torch.equal(engine.draw(some(1)).tokens[0], alone(gpt, some(1)[0]))


def test_those_who_wait_are_not_hurt_by_it(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, Broken("boom"), lambda batch: any(p.seed == 13 for p in batch.pictures))
    engine = Engine(gpt, most=1)
    with ThreadPoolExecutor() as pool:
        bad = pool.submit(engine.draw, some(1, first=13))
        good = pool.submit(engine.draw, some(1))
        with pytest.raises(EngineError):
            bad.result(30)
        assert len(good.result(30).tokens) == 1
    engine.close()


def test_out_of_memory_halves_and_changes_nothing(
    gpt: GPT, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = torch.stack([alone(gpt, p) for p in some(8)])
    allocate = KVCache.allocate
    steps = iter(range(10**6))

    def small(config: GPTConfig, batch: int, *rest: Any) -> KVCache:
        if batch > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return allocate(config, batch, *rest)

    monkeypatch.setattr(KVCache, "allocate", small)
    failing(
        monkeypatch,
        torch.OutOfMemoryError("CUDA out of memory in a step"),
        lambda batch: len(batch.pictures) > 2 and next(steps) == 10,
    )
    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        drawn = engine.draw(some(8), progress=lambda done, total: seen.append(done))
    assert torch.equal(drawn.tokens, expected)
    assert [record.getMessage() for record in caplog.records] == [
        "decoding tokens: out of memory with 8 pictures at once; going on with 4",
        "decoding tokens: out of memory with 4 pictures at once; going on with 2",
    ]
    assert seen == sorted(set(seen)) and seen[-1] == 8 * SMALL.block_size


def test_not_even_one_fits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, MemoryError(), lambda batch: True)
    with pytest.raises(InsufficientMemoryError, match="not even one picture"):
        engine.draw(some(2))
    monkeypatch.undo()
    assert len(engine.draw(some(2)).tokens) == 2


# --- beginning and end ---


def test_nothing_is_held_between_calls(engine: Engine) -> None:
    threads = threading.active_count()
    engine.draw(some(3))
    assert engine._batch.cache.data.numel() == 0 and not engine._calls and engine._driver is None
    assert threading.active_count() == threads


def test_ctrl_c_in_a_step_stops_its_caller_and_the_others_start_again(
    gpt: GPT, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(10**6))
    together = threading.Event()

    def once(batch: Batch) -> bool:
        if len(batch.pictures) == 3 and next(steps) == 5:
            together.set()
            return True
        return False

    failing(monkeypatch, KeyboardInterrupt(), once)
    expected = torch.stack([alone_ungated(gpt, p) for p in some(2, first=20)])

    def first() -> None:
        with pytest.raises(KeyboardInterrupt):
            engine.draw(some(1), is_cancelled=lambda: until(lambda: len(engine._calls) == 2 or together.is_set()))

    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(first)
        until(lambda: engine._driver)
        other = pool.submit(engine.draw, some(2, first=20))
        stopped.result(60)
        assert torch.equal(other.result(60).tokens, expected)
    assert not engine._calls


def test_closing_finishes_what_is_under_way(gpt: GPT, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(gpt, most=1)
    with ThreadPoolExecutor() as pool, caplog.at_level(logging.INFO):
        calls = [pool.submit(engine.draw, some(1)) for _ in range(2)]
        until(lambda: len(engine._calls) == 2)
        closing = pool.submit(engine.close)
        until(lambda: engine._closed)
        with pytest.raises(UnavailableError):
            engine.draw(some(1))
        gate.open()
        assert closing.result(30) == (2, 0)
        assert all(len(call.result(30).tokens) == 1 for call in calls)
    assert "2 calls finished, 0 did not" in caplog.text


def test_closing_at_once_fails_the_rest_and_says_which(gpt: GPT, gate: Gate) -> None:
    engine = Engine(gpt)
    with ThreadPoolExecutor() as pool:
        call = pool.submit(engine.draw, some(1))
        until(lambda: engine._calls)
        [running] = engine._calls
        closing = pool.submit(engine.close, 0)
        until(lambda: running.error)
        gate.open()
        assert closing.result(30) == (0, 1)
        with pytest.raises(UnavailableError, match="closed"):
            call.result(30)
    assert engine.close() == (0, 0)
