"""Quantised weights: their distance to the original, and rows that do not depend on each other."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from engine_kit import teacher_forced
from torch import Tensor

from clipgen.config import GPTConfig
from clipgen.models.capabilities import can_prepack, dot_product_bits, has_half_products
from clipgen.models.gpt import GPT
from clipgen.models.linear import HalfLinear, Int8Linear, Linear, RowCounts, round_weight

CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=128, vocab_size=256, block_size=20, n_cond=32)


needs_half = pytest.mark.skipif(not has_half_products(), reason="this PyTorch has no products with float16")


def logits(gpt: GPT, rows: int) -> Tensor:
    """Logits of all positions, (rows, T, V)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, CONFIG.vocab_size, (8, CONFIG.block_size - 1), generator=generator)[:rows]
    embedding = F.normalize(torch.randn(8, CONFIG.n_cond, generator=generator), dim=-1)[:rows]
    return teacher_forced(gpt, tokens, embedding)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(CONFIG).eval().requires_grad_(False)
    gpt.head.weight.mul_(10)
    return gpt


def test_int8_codes_are_within_half_a_step_of_the_weight() -> None:
    weight = torch.randn(6, 32) * torch.logspace(-3, 2, 6)[:, None]
    weight[2] = 0
    codes, scale = round_weight(weight)
    assert codes.dtype == torch.int8 and codes.abs().amax(1).tolist() == [127, 127, 0, 127, 127, 127]
    assert ((codes * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-9).all()


@pytest.mark.parametrize("bits", [8, 7, None])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
def test_int8_logits_stay_close_to_float32(
    gpt: GPT, bits: int | None, cache: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 7-bit activations where there is FBGEMM, 8-bit ones with VNNI, and in plain arithmetic anywhere."""
    if bits is not None and (dot_product_bits() or 0) < bits:
        pytest.skip(f"this CPU has no dot products of {bits} bits")
    monkeypatch.setattr("clipgen.models.linear.dot_product_bits", lambda: bits)
    small = copy.deepcopy(gpt).quantise("int8", cache)
    assert not any(isinstance(m, Linear) for m in small.modules())
    expected, found = logits(gpt, 4), logits(small, 4)
    error = (found - expected).std() / expected.std()
    assert 1e-4 < error < 0.03
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@pytest.mark.skipif(not dot_product_bits(), reason="this PyTorch has no int8 dot products")
def test_int8_dot_products_do_not_overflow() -> None:
    """The largest activations and weights: 16-bit sums of two products overflow if both have 8 bits."""
    layer = Linear(256, 8).requires_grad_(False)
    layer.weight.fill_(1)
    x = torch.ones(3, 256)
    torch.testing.assert_close(Int8Linear(layer)(x), layer(x), rtol=1e-5, atol=0)


@needs_half
@pytest.mark.parametrize(("cache", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-3)])
def test_float16_logits_stay_close_to_float32(gpt: GPT, cache: torch.dtype, bound: float) -> None:
    expected, found = logits(gpt, 4), logits(copy.deepcopy(gpt).quantise("float16", cache), 4)
    assert 1e-6 < (found - expected).std() / expected.std() < bound


@needs_half
def test_weights_exact_in_float16_give_the_same_products() -> None:
    layer = Linear(96, 40).requires_grad_(False)
    layer.weight.copy_(layer.weight.half())
    x = torch.randn(5, 96)
    torch.testing.assert_close(HalfLinear(layer)(x), layer(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(HalfLinear(layer)(x, gelu=True), layer(x, gelu=True), atol=1e-6, rtol=1e-5)


def layer_of(kind: str) -> Linear | Int8Linear | HalfLinear:
    torch.manual_seed(0)
    layer = Linear(96, 40).requires_grad_(False)
    if kind == "float32":
        if can_prepack(torch.float32):
            layer.prepack()
        return layer
    return Int8Linear(layer) if kind == "int8" else HalfLinear(layer)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["float32", "int8", pytest.param("float16", marks=needs_half)])
def test_padded_rows_are_bit_identical_in_any_batch(kind: str) -> None:
    layer = layer_of(kind)
    counts = RowCounts([layer])
    x = torch.randn(130, 96) * torch.logspace(-2, 2, 130)[:, None]
    together = layer(counts.pad(x))[:130]
    for rows in (1, 2, 5, 13, 14, 32, 33, 65, 128):
        padded = counts.pad(x[:rows])
        assert rows <= len(padded) <= rows + 16
        assert torch.equal(layer(padded)[:rows], together[:rows]), rows
    assert torch.equal(layer(counts.pad(torch.zeros(1, 96)))[:1], layer(counts.pad(torch.zeros(2, 96)))[:1])


class RowDependent(torch.nn.Module):
    """A layer whose rounding depends on the number of rows, as in matrix-product kernels."""

    def __init__(self, exact: Callable[[int], bool]) -> None:
        super().__init__()
        self.in_features, self.exact = 8, exact
        self.weight = torch.nn.Parameter(torch.eye(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.exact(len(x)) else x * (1 + 1e-6)


@pytest.mark.parametrize(
    ("exact", "counts"),
    [
        (lambda n: n % 4 == 0, {1: 4, 4: 4, 5: 8, 33: 36, 65: 68}),
        (lambda n: n > 2 and n != 32, {1: 3, 3: 3, 32: 33, 40: 40}),
        (lambda n: n % 64 == 0, {1: 64, 65: 128}),
        (lambda n: n != 128, {1: 1, 128: 129}),
    ],
)
def test_smallest_exact_number_of_rows_is_found(exact: Callable[[int], bool], counts: dict[int, int]) -> None:
    found = RowCounts([RowDependent(exact)])
    assert {rows: found.at_least(rows) for rows in counts} == counts
    assert RowCounts([RowDependent(exact)], least=5).at_least(1) == next(n for n in range(5, 65) if exact(n))


def test_rows_that_are_never_exact_are_not_padded() -> None:
    class NeverExact(RowDependent):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(len(x))[:, None]

    counts = RowCounts([NeverExact(lambda n: True)])
    assert counts.at_least(3) is None and counts.pad(torch.zeros(3, 8)).shape == (3, 8)


def test_quantising_restores_the_quantized_engine_of_torch(gpt: GPT) -> None:
    before = torch.backends.quantized.engine
    copy.deepcopy(gpt).quantise("int8", torch.float32)
    assert torch.backends.quantized.engine == before
