"""Filtering, sampling and the decoding loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from clipgen.config import GPTConfig
from clipgen.engine.sampling import SamplingTensors, draw_uniforms, filter_logits, guide, largest, sample
from clipgen.models.gpt import GPT
from clipgen.request import SamplingParams
from train.loop.samples import generate_tokens


def params(*samplings: SamplingParams, vocab_size: int = 96, **changes: float) -> SamplingTensors:
    return SamplingTensors.from_params(samplings or [SamplingParams(**changes)], vocab_size)


@pytest.mark.parametrize(("name", "top_k", "top_p"), [("k20_p09", 20, 0.9), ("k20", 20, 1.0), ("p05", 0, 0.5)])
def test_filter_keeps_the_same_tokens_as_the_original(golden: Path, name: str, top_k: int, top_p: float) -> None:
    io = load_file(golden / "hfailab_topk_topp.safetensors")
    kept = filter_logits(io["logits"], params(top_k=top_k, top_p=top_p, vocab_size=io["logits"].shape[1])).isfinite()
    assert torch.equal(kept, io[f"keep_{name}"])


@given(st.integers(0, 200), st.floats(1e-6, 1.0), st.integers(0, 1000))
@settings(max_examples=50)
def test_filter_keeps_the_most_likely_token(top_k: int, top_p: float, seed: int) -> None:
    logits = torch.randn(3, 96, generator=torch.Generator().manual_seed(seed)) * 5
    kept = filter_logits(logits, params(top_k=top_k, top_p=top_p))
    assert torch.equal(kept.argmax(-1), logits.argmax(-1))
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])
    if top_k:
        assert (kept.isfinite().sum(-1) <= top_k).all()


@pytest.mark.parametrize("count", [1, 40, 96])
def test_largest_values_are_those_of_pytorch_with_equal_infinite_and_nan_ones(count: int) -> None:
    values = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    values[1, ::3], values[2, 7], values[3, 5:9] = -torch.inf, torch.inf, torch.nan
    expected = values.topk(count).values
    for rows in (values, values.clone().requires_grad_()):
        assert largest(rows, count).nan_to_num(nan=9e9).equal(expected.nan_to_num(nan=9e9))


def test_samples_follow_the_distribution() -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(1))
    count = 40_000
    drawn = sample(logits.expand(count, -1), draw_uniforms([5], count)[0], params(top_k=0, top_p=1.0, vocab_size=8))
    share = torch.bincount(drawn, minlength=8) / count
    assert (share - logits.softmax(-1)).abs().max() < 0.01


def test_filtered_tokens_are_never_sampled_at_extreme_uniforms() -> None:
    logits = torch.tensor([[-9.0, 2.0, 1.0, -9.0]]).expand(3, -1)
    drawn = sample(logits, torch.tensor([0.0, 0.5, 1 - 1e-7]), params(top_k=2, top_p=1.0, vocab_size=4))
    assert set(drawn.tolist()) <= {1, 2}
    assert drawn[0] == 1 and drawn[2] == 2


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-7])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(2)) * 9
    drawn = sample(logits, torch.rand(4), params(temperature=temperature, top_k=0, top_p=1.0, vocab_size=30))
    assert torch.equal(drawn, logits.argmax(-1))


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(4, 30)
    assert torch.equal(sample(logits, torch.rand(4), params(temperature=0.0, vocab_size=30)), logits.argmax(-1))


@given(
    st.lists(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.1, 1.0, 2.5]),
            top_k=st.integers(0, 120),
            top_p=st.floats(0.05, 1.0),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 1000),
)
@settings(max_examples=50)
def test_each_row_is_sampled_with_its_own_parameters(samplings: list[SamplingParams], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(samplings), 96, generator=generator) * 3
    uniforms = torch.rand(len(samplings), generator=generator)
    together = sample(logits, uniforms, params(*samplings))
    alone = [sample(logits[i : i + 1], uniforms[i : i + 1], params(s)).item() for i, s in enumerate(samplings)]
    assert together.tolist() == alone


def test_equal_logits_are_filtered_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 0.0]])
    kept = filter_logits(logits, params(top_k=2, top_p=1.0, vocab_size=4)).isfinite()
    assert kept.tolist() == [[True, True, True, False]]
    kept = filter_logits(logits, params(top_k=0, top_p=0.8, vocab_size=4)).isfinite()
    assert kept.tolist() == [[True, True, True, False]]


def test_greedy_sampling_takes_the_first_of_equal_logits() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert sample(logits, torch.tensor([0.99]), params(temperature=0.0, vocab_size=4)).tolist() == [1]


def test_guidance_between_equal_logits_changes_nothing() -> None:
    a = torch.randn(3, 5)
    assert torch.equal(guide(a, a, torch.tensor([[1.0], [3.0], [30.0]])), a)


def test_guidance_of_one_is_conditional_and_of_zero_unconditional() -> None:
    a, b = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(guide(a, b, 1.0), a, atol=1e-6)
    assert torch.allclose(guide(a, b, 0.0), b, atol=1e-6)


def test_uniforms_of_a_seed_do_not_depend_on_the_batch() -> None:
    assert torch.equal(draw_uniforms([7], 16)[0], draw_uniforms([1, 0, 7, 9], 16)[2])
    assert not torch.equal(draw_uniforms([0], 16), draw_uniforms([1], 16))


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16, n_cond=32)).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_seed_gives_the_same_tokens_alone_and_in_a_batch(gpt: GPT, guidance: float, dtype: torch.dtype) -> None:
    model = GPT(gpt.config).to(dtype).eval()
    model.load_state_dict(gpt.state_dict())
    embedding = F.normalize(torch.randn(8, 32, generator=torch.Generator().manual_seed(2)), dim=-1)
    sampling = SamplingParams(top_k=32, top_p=0.95, guidance=guidance)
    together = generate_tokens(model, embedding, range(8), sampling)
    alone = torch.cat([generate_tokens(model, embedding[i : i + 1], [i], sampling) for i in range(8)])
    assert torch.equal(together, alone)
    assert len(together.unique(dim=0)) == 8


def test_greedy_decoding_equals_the_full_forward_pass(gpt: GPT) -> None:
    embedding = F.normalize(torch.randn(3, 32), dim=-1)
    tokens = generate_tokens(gpt, embedding, [0, 1, 2], SamplingParams(temperature=0.0))
    with torch.no_grad():
        logits = gpt(tokens[:, :-1], embedding)
    assert torch.equal(logits.argmax(-1), tokens)


def test_nan_logits_give_a_valid_token() -> None:
    logits = torch.full((3, 96), float("nan"))
    for values in ({}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.0}):
        tokens = sample(logits, torch.tensor([0.0, 0.5, 0.999]), params(**values))
        assert ((tokens >= 0) & (tokens < 96)).all()
