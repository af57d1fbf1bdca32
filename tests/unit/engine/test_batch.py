"""Sequences that join and leave one batch get the tokens that each gets alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_kit import GUIDED, SAMPLINGS, SMALL, alone, make_sequences, together, uncached
from torch import Tensor

from clipgen.engine.batch import Batch
from clipgen.engine.sampling import sample
from clipgen.models.capabilities import cpu_dtypes
from clipgen.models.gpt import GPT
from clipgen.request import SamplingParams
from clipgen.weights.model_dir import build_module, load_model_dir
from clipgen.weights.precision import pick_precision
from train.loop.samples import generate_tokens


@pytest.mark.parametrize("params", SAMPLINGS)
def test_batch_generates_the_tokens_of_uncached_forward_passes(gpt: GPT, params: SamplingParams) -> None:
    sequences = make_sequences(5, params)
    expected = torch.stack([uncached(gpt, seq) for seq in sequences])
    assert torch.equal(torch.stack(together(gpt, [(0, sequences)])), expected)


def test_generate_tokens_equals_each_sequence_alone(gpt: GPT) -> None:
    sequences = make_sequences(3)
    conditions = torch.stack([seq.condition for seq in sequences])
    tokens = generate_tokens(gpt, conditions, range(3), GUIDED)
    assert torch.equal(tokens, torch.stack([alone(gpt, seq) for seq in sequences]))
    assert generate_tokens(gpt, conditions[:0], [], GUIDED).shape == (0, SMALL.block_size)


@pytest.mark.numeric
@pytest.mark.parametrize("precision", cpu_dtypes())
def test_sequences_of_the_mini_model_get_the_same_tokens_whenever_they_join(root: Path, precision: str) -> None:
    config, parts = load_model_dir(root / "weights" / "mini")
    weights = parts["gpt"] | {"pos_emb": parts["gpt"]["pos_emb"][:, :40].clone()}  # only 40 tokens, for speed
    cpu = torch.device("cpu")
    gpt = pick_precision(precision, cpu).build_gpt(replace(config.gpt, block_size=40), weights, cpu)
    d = config.gpt.n_cond
    guided = make_sequences(1, config.sampling, first=50, d=d)[0]
    plain = replace(guided, params=SamplingParams())
    expected = [alone(gpt, guided), alone(gpt, plain)]
    neighbours = [
        make_sequences(3, config.sampling, 0, d),
        make_sequences(2, SamplingParams(top_p=0.9), 3, d),
        make_sequences(6, SAMPLINGS[3], 6, d),
    ]
    for schedule in [
        [(0, [guided, plain, *neighbours[0]])],  # together
        [(0, neighbours[1]), (9, [guided]), (11, [plain]), (30, neighbours[2])],  # they join midway, others later
        [(0, neighbours[2]), (20, [guided, plain]), (39, neighbours[1])],  # neighbours leave, so rows move
    ]:
        found = together(gpt, schedule)
        order = [seq for _, sequences in schedule for seq in sequences]
        for seq, tokens in zip((guided, plain), expected, strict=True):
            assert torch.equal(found[order.index(seq)], tokens)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_bit_identical_alone_and_with_neighbours(
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
        seq = make_sequences(1)[0]
        alone(gpt, seq)
        for others in (1, 2, 6, 31):  # up to 128 rows
            together(
                gpt,
                [
                    (0, [seq]),
                    (0, make_sequences(others, SAMPLINGS[others % 4], 7)),
                    (3, make_sequences(others, GUIDED, 90)),
                ],
            )
    finally:
        torch.set_num_threads(threads)
    length = SMALL.block_size
    first = torch.stack(seen[:length])
    for run in range(4):
        at = length + run * (length + 3)
        assert torch.equal(torch.stack(seen[at : at + length]), first)


def test_sequences_in_random_schedules_get_the_same_tokens(gpt: GPT) -> None:
    rng = random.Random(0)
    sequences = [make_sequences(1, rng.choice(SAMPLINGS), first=i)[0] for i in range(12)]
    expected = [alone(gpt, seq) for seq in sequences]
    for _ in range(3):
        arrivals = [(rng.randrange(40), [seq]) for seq in sequences]
        found = together(gpt, arrivals, max_rows=rng.choice([1, 8, 64]))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_removed_sequences_change_no_other_tokens(gpt: GPT) -> None:
    sequences = make_sequences(6)
    expected = [alone(gpt, seq) for seq in sequences]
    batch = Batch(gpt)
    with torch.inference_mode():
        batch.add(sequences, 64)
        for _ in range(7):
            batch.step()
        batch.remove({sequences[0], sequences[3]})
        assert len(batch.rows) == 8
        for _ in range(SMALL.block_size - 7):
            batch.step()
    found = batch.finished()
    assert set(found) == {sequences[i] for i in (1, 2, 4, 5)}
    assert all(torch.equal(found[sequences[i]], expected[i]) for i in (1, 2, 4, 5))


def test_prefix_tokens_are_kept_and_later_tokens_depend_on_them(gpt: GPT) -> None:
    plain = make_sequences(1)[0]
    tokens = alone(gpt, plain)
    same = replace(plain, prefix_tokens=tokens[:8])
    other = replace(plain, prefix_tokens=(tokens[:8] + 1) % SMALL.vocab_size)
    found = together(gpt, [(0, [same, plain]), (2, [other])])
    assert torch.equal(found[0], tokens) and torch.equal(found[1], tokens)
    assert torch.equal(found[2][:8], other.prefix_tokens) and not torch.equal(found[2][8:], tokens[8:])


def test_only_rows_in_use_are_computed(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = build_module(GPT, SMALL, gpt.state_dict(), torch.device("cpu"), torch.bfloat16)
    rows: list[int] = []
    decode_step = gpt.decode_step
    monkeypatch.setattr(gpt, "decode_step", lambda x, *rest: rows.append(len(x)) or decode_step(x, *rest))
    together(gpt, [(0, make_sequences(2)), (10, make_sequences(3, SamplingParams(), 5))])
    assert rows == [4] * 10 + [7] * 10 + [3] * 10
