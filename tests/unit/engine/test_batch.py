"""Pictures that come and go in one batch: each is drawn as if it were alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_kit import GUIDED, SAMPLINGS, SMALL, alone, sharp_gpt, some, together, uncached
from torch import Tensor

from clipgen.engine.batch import Batch, generate_tokens
from clipgen.engine.sampling import sample
from clipgen.models.capabilities import cpu_dtypes
from clipgen.models.gpt import GPT
from clipgen.request import SamplingParams
from clipgen.weights.model_dir import build_module, load_model_dir
from clipgen.weights.precision import pick_precision


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return sharp_gpt()


@pytest.mark.parametrize("params", SAMPLINGS)
def test_batch_generates_what_uncached_forward_passes_give(gpt: GPT, params: SamplingParams) -> None:
    sequences = some(5, params)
    expected = torch.stack([uncached(gpt, seq) for seq in sequences])
    assert torch.equal(torch.stack(together(gpt, [(0, sequences)])), expected)


def test_generate_tokens_is_one_batch(gpt: GPT) -> None:
    sequences = some(3)
    conditions = torch.stack([seq.condition for seq in sequences])
    tokens = generate_tokens(gpt, conditions, range(3), GUIDED)
    assert torch.equal(tokens, torch.stack([alone(gpt, seq) for seq in sequences]))
    assert generate_tokens(gpt, conditions[:0], [], GUIDED).shape == (0, SMALL.block_size)


@pytest.mark.numeric
@pytest.mark.parametrize("precision", cpu_dtypes())
def test_whoever_joins_when_the_mini_model_draws_the_same_tokens(root: Path, precision: str) -> None:
    config, parts = load_model_dir(root / "weights" / "mini")
    weights = parts["gpt"] | {"pos_emb": parts["gpt"]["pos_emb"][:, :40].clone()}  # the first 40 tokens, to be quick
    cpu = torch.device("cpu")
    gpt = pick_precision(precision, cpu).build_gpt(replace(config.gpt, block_size=40), weights, cpu)
    d = config.gpt.n_cond
    picture = some(1, config.sampling, first=50, d=d)[0]
    plain = replace(picture, params=SamplingParams())
    expected = [alone(gpt, picture), alone(gpt, plain)]
    neighbours = [some(3, config.sampling, 0, d), some(2, SamplingParams(top_p=0.9), 3, d), some(6, SAMPLINGS[3], 6, d)]
    for schedule in [
        [(0, [picture, plain, *neighbours[0]])],  # together
        [(0, neighbours[1]), (9, [picture]), (11, [plain]), (30, neighbours[2])],  # joining midway, and being joined
        [(0, neighbours[2]), (20, [picture, plain]), (39, neighbours[1])],  # neighbours leave: rows move
    ]:
        found = together(gpt, schedule)
        order = [p for _, pictures in schedule for p in pictures]
        for p, tokens in zip((picture, plain), expected, strict=True):
            assert torch.equal(found[order.index(p)], tokens)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_the_same_to_the_bit_alone_and_with_neighbours(
    gpt: GPT, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt = build_module(GPT, SMALL, gpt.state_dict(), torch.device("cpu"), dtype).prepack()
    threads = torch.get_num_threads()
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "clipgen.engine.batch.sample", lambda logits, *rest: seen.append(logits[0].clone()) or sample(logits, *rest)
    )
    torch.set_num_threads(1)
    try:
        picture = some(1)[0]
        alone(gpt, picture)
        for others in (1, 2, 6, 31):  # up to 128 rows
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
        found = together(gpt, arrivals, max_rows=chance.choice([1, 8, 64]))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_leaving_in_the_middle_changes_nobody(gpt: GPT) -> None:
    pictures = some(6)
    expected = [alone(gpt, p) for p in pictures]
    batch = Batch(gpt)
    with torch.inference_mode():
        batch.add(pictures, 64)
        for _ in range(7):
            batch.step()
        batch.remove({pictures[0], pictures[3]})
        assert len(batch.rows) == 8
        for _ in range(SMALL.block_size - 7):
            batch.step()
    found = batch.finished()
    assert set(found) == {pictures[i] for i in (1, 2, 4, 5)}
    assert all(torch.equal(found[pictures[i]], expected[i]) for i in (1, 2, 4, 5))


def test_kept_tokens_stay_and_the_rest_follows_from_them(gpt: GPT) -> None:
    plain = some(1)[0]
    tokens = alone(gpt, plain)
    same = replace(plain, prefix_tokens=tokens[:8])
    other = replace(plain, prefix_tokens=(tokens[:8] + 1) % SMALL.vocab_size)
    found = together(gpt, [(0, [same, plain]), (2, [other])])
    assert torch.equal(found[0], tokens) and torch.equal(found[1], tokens)
    assert torch.equal(found[2][:8], other.prefix_tokens) and not torch.equal(found[2][8:], tokens[8:])


def test_only_the_rows_in_use_are_worked_on(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = build_module(GPT, SMALL, gpt.state_dict(), torch.device("cpu"), torch.bfloat16)
    rows: list[int] = []
    advance = gpt.decode_step
    monkeypatch.setattr(gpt, "decode_step", lambda x, *rest: rows.append(len(x)) or advance(x, *rest))
    together(gpt, [(0, some(2)), (10, some(3, SamplingParams(), 5))])
    assert rows == [4] * 10 + [7] * 10 + [3] * 10
