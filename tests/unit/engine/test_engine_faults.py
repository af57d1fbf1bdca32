"""Faults of the engine: failing steps, lack of memory and broken weights fail their requests and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from engine_kit import SMALL, alone, make_sequences, sharp_gpt

from clipgen.config import GPTConfig
from clipgen.engine.batch import Batch
from clipgen.engine.engine import Engine
from clipgen.errors import EngineError, InsufficientMemoryError
from clipgen.models.gpt import GPT
from clipgen.models.kv_cache import KVCache


class Broken(RuntimeError):
    pass


def fail_steps(monkeypatch: pytest.MonkeyPatch, error: BaseException, when: Callable[[Batch], bool]) -> None:
    """Let steps of batches raise an error when a condition holds."""
    step = Batch.step

    def maybe(batch: Batch) -> None:
        if when(batch):
            raise error
        step(batch)

    monkeypatch.setattr(Batch, "step", maybe)


def test_failing_step_fails_its_requests_and_the_next_one_works(
    gpt: GPT, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_steps(monkeypatch, Broken("boom"), lambda batch: any(seq.seed == 13 for seq in batch.sequences))
    with pytest.raises(EngineError, match="boom") as caught:
        engine.generate(make_sequences(2, first=12))
    assert isinstance(caught.value.__cause__, Broken)
    assert torch.equal(engine.generate(make_sequences(1)).tokens[0], alone(gpt, make_sequences(1)[0]))


def test_failing_step_spares_waiting_requests(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_steps(monkeypatch, Broken("boom"), lambda batch: any(seq.seed == 13 for seq in batch.sequences))
    engine = Engine(gpt, max_num_seqs=1)
    with ThreadPoolExecutor() as pool:
        bad = pool.submit(engine.generate, make_sequences(1, first=13))
        good = pool.submit(engine.generate, make_sequences(1))
        with pytest.raises(EngineError):
            bad.result(30)
        assert len(good.result(30).tokens) == 1


def test_out_of_memory_halves_the_batch_and_changes_no_token(
    gpt: GPT, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = torch.stack([alone(gpt, seq) for seq in make_sequences(8)])
    allocate = KVCache.allocate
    steps = iter(range(10**6))

    def small(config: GPTConfig, batch: int, *rest: Any) -> KVCache:
        if batch > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return allocate(config, batch, *rest)

    monkeypatch.setattr(KVCache, "allocate", small)
    fail_steps(
        monkeypatch,
        torch.OutOfMemoryError("CUDA out of memory in a step"),
        lambda batch: len(batch.sequences) > 2 and next(steps) == 10,
    )
    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        output = engine.generate(make_sequences(8), progress=lambda done, total: seen.append(done))
    assert torch.equal(output.tokens, expected)
    assert [record.getMessage() for record in caplog.records] == [
        "decoding tokens: out of memory with 8 images at once; going on with 4",
        "decoding tokens: out of memory with 4 images at once; going on with 2",
    ]
    assert seen == sorted(set(seen)) and seen[-1] == 8 * SMALL.block_size


def test_out_of_memory_with_one_sequence_is_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_steps(monkeypatch, MemoryError(), lambda batch: True)
    with pytest.raises(InsufficientMemoryError, match="not even one image"):
        engine.generate(make_sequences(2))
    monkeypatch.undo()
    assert len(engine.generate(make_sequences(2)).tokens) == 2


def test_non_finite_logits_fail_the_request_and_the_next_one_works(gpt: GPT) -> None:
    broken = sharp_gpt()
    engine = Engine(broken)
    with torch.no_grad():
        broken.head.bias[7] = torch.nan
        with pytest.raises(EngineError, match="not finite"):
            engine.generate(make_sequences(2))
        broken.head.bias.copy_(gpt.head.bias)
    assert torch.equal(engine.generate(make_sequences(1)).tokens[0], alone(gpt, make_sequences(1)[0]))


@pytest.mark.parametrize(
    "what", ["Scheduler.restart", "Batch"]
)  # the latter is needed twice, to recover and to give up
def test_failing_recovery_fails_the_request_instead_of_hanging(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    fail_steps(monkeypatch, Broken("boom"), lambda batch: True)

    def gone(*_: object) -> None:
        raise RuntimeError("CUDA error: the device is gone")

    monkeypatch.setattr(f"clipgen.engine.engine.{what}", gone)
    with pytest.raises(EngineError, match="the device is gone"):
        engine.generate(make_sequences(1))
    monkeypatch.undo()
    if what == "Batch":  # one more may fail, on the batch that could not be replaced
        with suppress(EngineError):
            engine.generate(make_sequences(1))
    assert len(engine.generate(make_sequences(1)).tokens) == 1
