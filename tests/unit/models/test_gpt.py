"""The GPT: the logits of HFAiLab's implementation, and cached decoding that equals the full pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engine_kit import teacher_forced as decode
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from clipgen.config import GPTConfig
from clipgen.models.capabilities import cpu_dtypes
from clipgen.models.gpt import GPT, causal_attention
from clipgen.models.kv_cache import KVCache, single_query_backends
from clipgen.weights.convert import map_gpt
from clipgen.weights.model_dir import build_module

HFAILAB = GPTConfig(n_layer=3, n_head=4, n_embd=48, vocab_size=96, block_size=16, n_cond=24)
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=20, block_size=9, n_cond=6)
PRECISIONS = cpu_dtypes()
CLOSE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a small cache consist of several segments."""
    monkeypatch.setattr("clipgen.models.kv_cache.SEGMENT", 16)


@pytest.fixture(scope="module", params=[False, True], ids=["as published", "qk_norm"])
def gpt(request: pytest.FixtureRequest) -> GPT:
    """A GPT with random weights, large enough for logits to differ."""
    torch.manual_seed(0)
    gpt = GPT(replace(SMALL, qk_norm=request.param))
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return gpt.eval().requires_grad_(False)


def inputs(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SMALL.vocab_size, (batch, length), generator=generator)
    embedding = torch.randn(batch, SMALL.n_cond, generator=generator)
    return tokens, torch.nn.functional.normalize(embedding, dim=-1)


def test_logits_equal_those_of_the_original_implementation(golden: Path) -> None:
    tensors = load_file(golden / "hfailab_gpt_tiny.safetensors")
    theirs = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}
    gpt = build_module(GPT, HFAILAB, map_gpt(theirs, HFAILAB))
    tokens, embedding, logits = (tensors[f"io.{name}"] for name in ("tokens", "embedding", "logits"))
    torch.testing.assert_close(gpt(tokens, embedding), logits, **CLOSE)
    torch.testing.assert_close(decode(gpt, tokens, embedding), logits, **CLOSE)


@settings(max_examples=25)
@given(batch=st.integers(1, 5), length=st.integers(0, 8), seed=st.integers(0, 2**31))
def test_cached_decoding_equals_the_full_pass(gpt: GPT, batch: int, length: int, seed: int) -> None:
    tokens, embedding = inputs(batch, length, seed)
    full = gpt(tokens, embedding)
    assert full.shape == (batch, length + 1, SMALL.vocab_size)
    torch.testing.assert_close(decode(gpt, tokens, embedding), full, **CLOSE)


def test_used_cache_gives_the_logits_of_a_new_one(gpt: GPT) -> None:
    cache = KVCache.allocate(SMALL, 2)
    decode(gpt, *inputs(2, 8, seed=1), cache)
    tokens, embedding = inputs(2, 8, seed=2)
    assert torch.equal(decode(gpt, tokens, embedding, cache), decode(gpt, tokens, embedding))


def test_logits_of_a_row_do_not_depend_on_other_rows(gpt: GPT) -> None:
    tokens, embedding = inputs(5, 8)
    alone = torch.cat([decode(gpt, tokens[i : i + 1], embedding[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(decode(gpt, tokens, embedding), alone, **CLOSE)


@settings(max_examples=15)
@given(
    starts=st.lists(st.integers(0, 12), min_size=1, max_size=7),
    slots=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    exact=st.booleans(),
)
def test_rows_that_join_and_leave_get_the_logits_of_the_full_pass(
    gpt: GPT, starts: list[int], slots: int, seed: int, exact: bool
) -> None:
    """Sequences arrive at given times, take a free row of a used cache, and leave when they are complete."""
    tokens, embedding = inputs(len(starts), 8, seed)
    cache = KVCache.allocate(SMALL, slots + 1)
    cache.data.normal_(generator=torch.Generator().manual_seed(seed)).mul_(50)
    waiting = sorted(range(len(starts)), key=starts.__getitem__)
    place: list[tuple[int, int] | None] = [None] * slots  # sequence and position in each row
    logits = torch.empty(len(starts), 9, SMALL.vocab_size)
    for now in range(200):
        for slot in range(slots):
            if place[slot] is None and waiting and starts[waiting[0]] <= now:
                place[slot] = (waiting.pop(0), 0)
        rows = [p or (0, 0) for p in place]
        x = torch.stack([gpt.tok_emb(tokens[i, t - 1]) if t else gpt.cond_proj(embedding[i]) for i, t in rows])
        positions = torch.tensor([t for _, t in rows])
        step = gpt.decode_step(x, positions, cache, int(positions.max()) + 1 if exact else None)
        for slot, occupant in enumerate(place):
            if occupant is not None:
                seq, position = occupant
                logits[seq, position] = step[slot]
                place[slot] = (seq, position + 1) if position < 8 else None
        if not waiting and not any(place):
            break
    torch.testing.assert_close(logits, gpt(tokens, embedding), rtol=0, atol=1e-5)


WIDE = GPTConfig(n_layer=2, n_head=4, n_embd=256, vocab_size=512, block_size=40, n_cond=64)
"""Large enough for products to be split over threads."""


def decoder(precision: str) -> GPT:
    """A GPT with random weights, prepared for decoding in a precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT(WIDE).eval().requires_grad_(False)
    if precision in ("float16", "int8"):
        return gpt.quantise(precision, torch.float32)
    return gpt.to(getattr(torch, precision)).prepack()


def steps(gpt: GPT, tokens: Tensor, embedding: Tensor) -> Tensor:
    with torch.inference_mode():
        return decode(gpt, tokens, embedding.to(gpt.cond_proj.weight), gpt.allocate(len(embedding)))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.numeric
@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_of_a_row_are_bit_identical_in_any_batch(precision: str, threads: int) -> None:
    gpt = decoder(precision)
    tokens = torch.randint(0, 512, (64, 18), generator=torch.Generator().manual_seed(0))
    embedding = F.normalize(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
    together = steps(gpt, tokens, embedding)
    for rows in (1, 2, 5, 8, 33):
        assert gpt.row_counts is not None and gpt.row_counts.at_least(rows) is not None, rows
        assert torch.equal(steps(gpt, tokens[:rows], embedding[:rows]), together[:rows]), rows
        moved = steps(gpt, tokens.roll(7, 0)[:rows], embedding.roll(7, 0)[:rows])
        assert torch.equal(moved, together.roll(7, 0)[:rows]), rows
    cache = gpt.allocate(2)
    with torch.inference_mode():
        first = gpt.embed_condition(embedding[:1].to(gpt.cond_proj.weight))
        for position in range(19):  # beside a row that stays at position 0, and without max_position
            x = gpt.tok_emb(tokens[:1, position - 1]) if position else first
            ragged = gpt.decode_step(x.expand(2, -1), torch.tensor([position, 0]), cache)
            assert torch.equal(ragged[0], together[0, position])


@pytest.mark.numeric
@pytest.mark.parametrize("precision", PRECISIONS)
def test_prepacked_and_quantised_weights_stay_close_to_plain_ones(precision: str, threads: int) -> None:
    tokens = torch.randint(0, 512, (3, 36), generator=torch.Generator().manual_seed(0))
    embedding = F.normalize(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
    torch.manual_seed(0)
    exact = GPT(WIDE).eval().requires_grad_(False)
    reference = exact(tokens, embedding)
    error = (steps(decoder(precision), tokens, embedding) - reference).std() / reference.std()
    assert error < {"float32": 1e-5, "float16": 1e-3, "bfloat16": 0.02, "int8": 0.05}[precision]


@pytest.mark.numeric
def test_rows_are_exact_without_prepacked_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CPUs for which oneDNN has no prepacked products."""
    monkeypatch.setattr("clipgen.models.gpt.can_prepack", lambda dtype: False)
    for precision in ("float32", "bfloat16"):
        gpt = decoder(precision)
        assert gpt.blocks[0].fc1.packed is None
        tokens = torch.randint(0, 512, (9, 3), generator=torch.Generator().manual_seed(0))
        embedding = F.normalize(torch.randn(9, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
        together = steps(gpt, tokens, embedding)
        assert torch.equal(steps(gpt, tokens[:1], embedding[:1]), together[:1])


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_equals_plain_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs with AMX use the fused attention kernel, all others plain products."""
    tokens = torch.randint(0, 512, (3, 36), generator=torch.Generator().manual_seed(0))
    embedding = F.normalize(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
    gpt, found = GPT(WIDE).to(dtype).eval(), []
    for fused in (False, True):
        monkeypatch.setattr("clipgen.models.kv_cache.can_fuse_attention", lambda *_, fused=fused: fused)
        assert gpt.allocate(1).fused == fused
        found.append(steps(gpt, tokens, embedding))
    assert (found[0] - found[1]).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * found[0].abs().max()


@pytest.mark.numeric
def test_prepacking_float32_changes_only_rounding(gpt: GPT) -> None:
    ready = copy.deepcopy(gpt).prepack()
    assert ready.state_dict().keys() == gpt.state_dict().keys()
    tokens, embedding = inputs(2, 8)
    torch.testing.assert_close(decode(ready, tokens, embedding), decode(gpt, tokens, embedding), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "max_position", "message"),
    [(3, None, "3 rows for a cache of 2"), (2, 10, "position 9"), (2, 0, "position -1")],
)
def test_rows_and_positions_outside_the_cache_are_refused(
    gpt: GPT, rows: int, max_position: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gpt.decode_step(torch.zeros(rows, 16), torch.zeros(rows).long(), KVCache.allocate(SMALL, 2), max_position)


@pytest.mark.parametrize("position", range(8))
def test_token_affects_only_later_positions(gpt: GPT, position: int) -> None:
    tokens, embedding = inputs(1, 8)
    changed = tokens.clone()
    changed[0, position] = (changed[0, position] + 1) % SMALL.vocab_size
    differs = (gpt(tokens, embedding) - gpt(changed, embedding)).abs().amax(-1)[0] > 1e-6
    assert differs.tolist() == [False] * (position + 1) + [True] * (8 - position)


def test_condition_affects_every_position(gpt: GPT) -> None:
    tokens, embedding = inputs(1, 8)
    differs = (gpt(tokens, embedding) - gpt(tokens, torch.zeros_like(embedding))).abs().amax(-1)[0] > 1e-6
    assert differs.all()


def test_length_of_queries_and_keys_does_not_matter_with_qk_norm() -> None:
    torch.manual_seed(0)
    plain, normed = (GPT(replace(SMALL, qk_norm=flag)).eval() for flag in (False, True))
    with torch.no_grad():
        for gpt, changes in ((plain, True), (normed, False)):
            for block in gpt.blocks:
                torch.nn.init.normal_(block.qkv.weight, std=0.3)
                torch.nn.init.normal_(block.proj.weight, std=0.3)
            before = gpt(*inputs(2, 8))
            for block in gpt.blocks:
                block.qkv.weight[: 2 * SMALL.n_embd] *= 3
            assert torch.allclose(gpt(*inputs(2, 8)), before, atol=1e-4) != changes


def test_new_model_predicts_a_uniform_distribution() -> None:
    torch.manual_seed(0)
    loss = torch.nn.functional.cross_entropy(GPT(SMALL)(*inputs(4, 8)).flatten(0, 1), torch.arange(36) % 20)
    assert abs(loss.item() - torch.tensor(20.0).log().item()) < 0.1


def test_dropout_is_active_only_in_training() -> None:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=20, block_size=9, n_cond=6, dropout=0.5))
    tokens, embedding = inputs(1, 8)
    assert not torch.equal(gpt(tokens, embedding), gpt(tokens, embedding))
    gpt.eval()
    assert torch.equal(gpt(tokens, embedding), gpt(tokens, embedding))


def test_causal_attention_of_training_equals_the_fused_kernel() -> None:
    q, k, v = (torch.randn(3, 2, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(causal_attention(q.requires_grad_(), k, v), expected, atol=1e-6)


def test_decoding_on_a_gpu_disables_cudnn_attention() -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with single_query_backends(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with single_query_backends(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled()
