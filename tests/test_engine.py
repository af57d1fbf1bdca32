"""The engine: pictures of many callers in the same steps, and none of them notices."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen import engine as engine_module
from clipgen.batch import Batch, Picture
from clipgen.config import GPTConfig, SamplingConfig
from clipgen.engine import Engine, EngineClosed, EngineError, QueueFull
from clipgen.gpt import GPT, KVCache
from clipgen.memory import MemoryShortage
from clipgen.sampling import Cancelled, generate_tokens
from clipgen.weights import build, load_weights

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=100, block_size=20, n_cond=16)
GUIDED = SamplingConfig(top_k=30, top_p=0.9, guidance=3.0)
SAMPLINGS = [GUIDED, SamplingConfig(), SamplingConfig(top_p=0.8), SamplingConfig(temperature=0.0, guidance=2.0)]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT(SMALL).eval()
    with torch.no_grad():
        gpt.head.weight.mul_(20)
    return gpt


@pytest.fixture
def engine(gpt: GPT) -> Iterator[Engine]:
    engine = Engine(gpt)
    yield engine
    engine.close(0)


def some(count: int, sampling: SamplingConfig = GUIDED, first: int = 0, d: int = SMALL.n_cond) -> list[Picture]:
    """Pictures whose conditions and seeds follow from their numbers."""
    conditions = [torch.randn(d, generator=torch.Generator().manual_seed(first + i)) for i in range(count)]
    return [Picture(F.normalize(c, dim=0), first + i, sampling) for i, c in enumerate(conditions)]


def alone(gpt: GPT, picture: Picture) -> Tensor:
    """The tokens of a picture that has a batch for itself."""
    return together(gpt, [(0, [picture])])[0]


def together(gpt: GPT, arrivals: Sequence[tuple[int, list[Picture]]], most: int = 64) -> list[Tensor]:
    """The tokens of pictures that join a batch before the steps given."""
    batch, found, step = Batch(gpt), {}, 0
    with torch.inference_mode():
        while len(found) < sum(len(pictures) for _, pictures in arrivals):
            batch.join([p for at, pictures in arrivals if at == step for p in pictures], most)
            step += 1
            if batch.pictures:
                batch.step()
            finished = batch.finished()
            found |= finished
            batch.leave(set(finished))
    return [found[picture] for _, pictures in arrivals for picture in pictures]


# --- same seed, same tokens ---


def test_a_batch_draws_what_the_plain_loop_draws(gpt: GPT) -> None:
    for sampling in SAMPLINGS:
        pictures = some(5, sampling)
        plain = generate_tokens(gpt, torch.stack([p.condition for p in pictures]), range(5), sampling)
        assert torch.equal(torch.stack(together(gpt, [(0, pictures)])), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whoever_joins_when_the_mini_model_draws_the_same_tokens(root: Path, dtype: torch.dtype) -> None:
    config, parts = load_weights(root / "weights" / "mini")
    weights = parts["gpt"] | {"pos_emb": parts["gpt"]["pos_emb"][:, :40].clone()}  # the first 40 tokens, to be quick
    gpt = build(GPT, replace(config.gpt, block_size=40), weights, torch.device("cpu"), dtype).pack()
    d = config.gpt.n_cond
    picture = some(1, config.sampling, first=50, d=d)[0]
    plain = replace(picture, sampling=SamplingConfig())
    expected = [alone(gpt, picture), alone(gpt, plain)]
    neighbours = [some(3, config.sampling, 0, d), some(2, SamplingConfig(top_p=0.9), 3, d), some(6, SAMPLINGS[3], 6, d)]
    for schedule in [
        [(0, [picture, plain, *neighbours[0]])],  # together
        [(0, neighbours[1]), (9, [picture]), (11, [plain]), (30, neighbours[2])],  # joining midway, and being joined
        [(0, neighbours[2]), (20, [picture, plain]), (39, neighbours[1])],  # neighbours leave: rows move
    ]:
        found = together(gpt, schedule)
        order = [p for _, pictures in schedule for p in pictures]
        for p, tokens in zip((picture, plain), expected, strict=True):
            assert torch.equal(found[order.index(p)], tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_the_same_to_the_bit_alone_and_with_neighbours(
    gpt: GPT, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt = build(GPT, SMALL, gpt.state_dict(), torch.device("cpu"), dtype)
    threads = torch.get_num_threads()
    seen: list[Tensor] = []
    choose = engine_module.Batch.step.__globals__["choose"]
    monkeypatch.setattr(
        "clipgen.batch.choose", lambda logits, *rest: seen.append(logits[0].clone()) or choose(logits, *rest)
    )
    torch.set_num_threads(1)
    try:
        picture = some(1)[0]
        alone(gpt, picture)
        for others in (1, 2, 6, 14):
            together(gpt, [(0, [picture]), (0, some(others, SAMPLINGS[others % 4], 7)), (3, some(others, GUIDED, 90))])
    finally:
        torch.set_num_threads(threads)
    length = SMALL.block_size
    first = torch.stack(seen[:length])
    for run in range(4):
        at = length + run * (length + 3)
        assert torch.equal(torch.stack(seen[at : at + length]), first)


def test_random_schedules(gpt: GPT) -> None:
    chance = random.Random(0)
    pictures = [some(1, chance.choice(SAMPLINGS), first=i)[0] for i in range(12)]
    expected = [alone(gpt, p) for p in pictures]
    for _ in range(3):
        arrivals = [(chance.randrange(40), [p]) for p in pictures]
        found = together(gpt, arrivals, most=chance.choice([1, 8, 64]))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_leaving_in_the_middle_changes_nobody(gpt: GPT) -> None:
    pictures = some(6)
    expected = [alone(gpt, p) for p in pictures]
    batch = Batch(gpt)
    with torch.inference_mode():
        batch.join(pictures, 64)
        for _ in range(7):
            batch.step()
        batch.leave({pictures[0], pictures[3]})
        assert len(batch.rows) == 8
        for _ in range(SMALL.block_size - 7):
            batch.step()
    found = batch.finished()
    assert set(found) == {pictures[i] for i in (1, 2, 4, 5)}
    assert all(torch.equal(found[pictures[i]], expected[i]) for i in (1, 2, 4, 5))


def test_kept_tokens_stay_and_the_rest_follows_from_them(gpt: GPT) -> None:
    plain = some(1)[0]
    tokens = alone(gpt, plain)
    same = replace(plain, kept=tokens[:8])
    other = replace(plain, kept=(tokens[:8] + 1) % SMALL.vocab_size)
    found = together(gpt, [(0, [same, plain]), (2, [other])])
    assert torch.equal(found[0], tokens) and torch.equal(found[1], tokens)
    assert torch.equal(found[2][:8], other.kept) and not torch.equal(found[2][8:], tokens[8:])


def test_only_the_rows_in_use_are_worked_on(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = build(GPT, SMALL, gpt.state_dict(), torch.device("cpu"), torch.bfloat16)
    rows: list[int] = []
    advance = gpt.advance
    monkeypatch.setattr(gpt, "advance", lambda x, *rest: rows.append(len(x)) or advance(x, *rest))
    together(gpt, [(0, some(2)), (10, some(3, SamplingConfig(), 5))])
    assert rows == [4] * 10 + [7] * 10 + [3] * 10


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
        stopped = pool.submit(engine.draw, some(5), should_stop=stop.is_set)
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
        second = pool.submit(engine.draw, some(1), should_stop=lambda: True)
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
        with pytest.raises(QueueFull, match=r"\d pictures are waiting .* try again"):
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
    engine.draw(some(1), should_stop=lambda: bool(asked.append(True)))
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


@pytest.mark.parametrize("name", ["progress", "should_stop", "watch"])
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
    with pytest.raises(MemoryShortage, match="not even one picture"):
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
            engine.draw(some(1), should_stop=lambda: until(lambda: len(engine._calls) == 2 or together.is_set()))

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
        with pytest.raises(EngineClosed):
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
        with pytest.raises(EngineClosed, match="closed"):
            call.result(30)
    assert engine.close() == (0, 0)
