"""Eight bits: how far from the original, and that rows do not see each other."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.config import GPTConfig
from clipgen.gpt import GPT, KVCache, Linear
from clipgen.quantise import Int8Linear, has_dot_products, quantise, round_weight

CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=128, vocab_size=256, block_size=20, n_cond=32)


def logits(gpt: GPT, rows: int, dtype: torch.dtype) -> Tensor:
    """Of all positions, (rows, T, V)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, CONFIG.vocab_size, (8, CONFIG.block_size - 1), generator=generator)[:rows]
    embedding = F.normalize(torch.randn(8, CONFIG.n_cond, generator=generator), dim=-1)[:rows].to(dtype)
    cache = KVCache.allocate(CONFIG, rows, dtype=dtype)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_stay_near_the_original(
    gpt: GPT, dots: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dots and not has_dot_products():
        pytest.skip("this CPU has no 8-bit dot products")
    monkeypatch.setattr("clipgen.quantise.has_dot_products", lambda: dots)
    small = quantise(copy.deepcopy(gpt).to(dtype))
    assert not any(isinstance(m, Linear) for m in small.modules())
    expected, found = logits(gpt, 4, torch.float32), logits(small, 4, dtype).float()
    error = (found - expected).std() / expected.std()
    assert 1e-4 < error < 0.03
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@pytest.mark.skipif(not has_dot_products(), reason="this CPU has no 8-bit dot products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_bit_whatever_the_batch(gpt: GPT, dtype: torch.dtype) -> None:
    layer = Int8Linear(Linear(96, 40))
    x = (torch.randn(9, 96) * torch.logspace(-2, 2, 9)[:, None]).to(dtype)
    together = layer(x)
    for rows in (1, 2, 5):
        assert torch.equal(layer(x[:rows]), together[:rows])
    assert torch.equal(layer(torch.zeros(2, 96)), layer.bias.expand(2, -1))
    if dtype == torch.bfloat16:
        small = quantise(copy.deepcopy(gpt).to(dtype))
        together = logits(small, 8, dtype)
        assert all(torch.equal(logits(small, rows, dtype), together[:rows]) for rows in (1, 3))


def test_the_engine_chosen_for_others_stays(gpt: GPT) -> None:
    before = torch.backends.quantized.engine
    quantise(copy.deepcopy(gpt))
    assert torch.backends.quantized.engine == before
