"""Weights in fewer bytes: how far from the original, and that rows do not see each other."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.config import GPTConfig
from clipgen.models.gpt import GPT, Linear
from clipgen.models.quantise import (
    HalfLinear,
    Int8Linear,
    has_dot_products,
    has_half_products,
    quantise,
    round_weight,
)

CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=128, vocab_size=256, block_size=20, n_cond=32)


needs_half = pytest.mark.skipif(not has_half_products(), reason="this PyTorch has no products with float16")


def logits(gpt: GPT, rows: int) -> Tensor:
    """Of all positions, (rows, T, V)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, CONFIG.vocab_size, (8, CONFIG.block_size - 1), generator=generator)[:rows]
    embedding = F.normalize(torch.randn(8, CONFIG.n_cond, generator=generator), dim=-1)[:rows]
    cache = gpt.allocate(rows)
    steps = [gpt.prefill(embedding, cache)]
    steps += [gpt.step(tokens[:, t - 1], t, cache) for t in range(1, CONFIG.block_size)]
    return torch.stack(steps, dim=1)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(CONFIG).eval().requires_grad_(False)
    gpt.head.weight.mul_(10)
    return gpt


def test_a_weight_is_rounded_to_the_nearest_of_its_steps() -> None:
    weight = torch.randn(6, 32) * torch.logspace(-3, 2, 6)[:, None]
    weight[2] = 0
    codes, scale = round_weight(weight)
    assert codes.dtype == torch.int8 and codes.abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127]
    assert ((codes * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-9).all()


@pytest.mark.parametrize("dots", [False, True])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
def test_eight_bits_stay_near_the_original(
    gpt: GPT, dots: bool, cache: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dots and not has_dot_products():
        pytest.skip("this CPU has no 8-bit dot products")
    monkeypatch.setattr("clipgen.models.quantise.has_dot_products", lambda: dots)
    small = quantise(copy.deepcopy(gpt), "int8", cache)
    assert not any(isinstance(m, Linear) for m in small.modules())
    expected, found = logits(gpt, 4), logits(small, 4)
    error = (found - expected).std() / expected.std()
    assert 1e-4 < error < 0.03
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@needs_half
@pytest.mark.parametrize(("cache", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-3)])
def test_float16_stays_nearer(gpt: GPT, cache: torch.dtype, bound: float) -> None:
    expected, found = logits(gpt, 4), logits(quantise(copy.deepcopy(gpt), "float16", cache), 4)
    assert 1e-6 < (found - expected).std() / expected.std() < bound


@needs_half
def test_weights_that_float16_holds_are_not_changed() -> None:
    layer = Linear(96, 40).requires_grad_(False)
    layer.weight.copy_(layer.weight.half())
    x = torch.randn(5, 96)
    torch.testing.assert_close(HalfLinear(layer, torch.float32)(x), layer(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        HalfLinear(layer, torch.float32)(x, gelu=True), layer(x, gelu=True), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            Int8Linear, marks=pytest.mark.skipif(not has_dot_products(), reason="this CPU has no 8-bit dot products")
        ),
        pytest.param(HalfLinear, marks=needs_half),
    ],
)
def test_a_product_is_the_same_to_the_bit_whatever_the_batch(kind: type[Int8Linear | HalfLinear]) -> None:
    layer = kind(Linear(96, 40), torch.bfloat16)
    x = torch.randn(40, 96) * torch.logspace(-2, 2, 40)[:, None]
    together = layer(x)
    for rows in (1, 2, 5, 13, 14, 33):
        assert torch.equal(layer(x[:rows]), together[:rows])
    assert torch.equal(layer(torch.zeros(2, 96)), layer(torch.zeros(1, 96)).expand(2, -1))


@needs_half
@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_a_row_is_the_same_to_the_bit_whatever_the_batch(gpt: GPT, weights: Literal["float16", "int8"]) -> None:
    if weights == "int8" and not has_dot_products():
        pytest.skip("this CPU has no 8-bit dot products")
    small = quantise(copy.deepcopy(gpt), weights, torch.bfloat16)
    together = logits(small, 8)
    assert all(torch.equal(logits(small, rows), together[:rows]) for rows in (1, 3))


def test_the_engine_chosen_for_others_stays(gpt: GPT) -> None:
    before = torch.backends.quantized.engine
    quantise(copy.deepcopy(gpt), "int8", torch.float32)
    assert torch.backends.quantized.engine == before
