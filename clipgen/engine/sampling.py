"""Logits to tokens: filters, guidance, seeded draws, and the decoding loop.

Shapes: B images, T tokens of an image, V codebook size, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipgen.errors import Cancelled
from clipgen.models.gpt import GPT
from clipgen.request import SamplingParams

_COLDEST = 1e-6
"""Logits divided by less become infinite."""


def draw_uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """One uniform number per image and token, (B, steps) float32 in [0, 1).

    Each row comes from its own seed, on the CPU, so an image's randomness does not depend on its batch or device.
    """
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, steps)


@dataclass(frozen=True)
class SamplingTensors:
    """How each row of a batch samples, as tensors on the device, so that a batch can mix requests.

    Every tensor is (B,), or (1,) for all rows alike. `SamplingParams` says what the values mean.
    """

    temperature: Tensor
    """float32, above 0. A greedy row has 1 here, `top_k` 1 and `luck` 0: that draws the likeliest token."""
    top_k: Tensor
    """int64; off is `width` or more."""
    top_p: Tensor
    """float32."""
    guidance: Tensor
    """float32."""
    is_random: Tensor
    """float32, 1, or 0 for greedy rows: what their uniforms are multiplied with."""
    width: int
    """How many of the likeliest tokens are looked at: at least every row's top_k, V where a row has none.
    0: no row filters anything."""

    @classmethod
    def of(
        cls, samplings: Sequence[SamplingParams], vocab_size: int, device: torch.device | str = "cpu"
    ) -> SamplingTensors:
        """The knobs of rows that sample as these say."""
        limits = [1 if s.temperature == 0 else min(s.top_k or vocab_size, vocab_size) for s in samplings]
        plain = all(k == vocab_size and s.top_p == 1 for k, s in zip(limits, samplings, strict=True))

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).to(device)

        return cls(
            temperature=column([max(s.temperature, _COLDEST) if s.temperature else 1.0 for s in samplings]),
            top_k=torch.tensor(limits).to(device),
            top_p=column([s.top_p for s in samplings]),
            guidance=column([s.guidance for s in samplings]),
            is_random=column([float(s.temperature > 0) for s in samplings]),
            width=0 if plain else max(limits),
        )


def filter_logits(logits: Tensor, knobs: SamplingTensors) -> Tensor:
    """Keep the `top_k` likeliest tokens, then the smallest set of them that has probability `top_p`.

    Tokens as likely as the last one kept stay too: no order among equals is made up.

    Args:
        logits: (B, V) float32.

    Returns:
        (B, V): -inf where a token may not be drawn. The likeliest token always stays.
    """
    if knobs.width == 0:
        return logits
    if knobs.width < logits.shape[-1]:
        ordered = logits.topk(knobs.width, dim=-1).values
    else:
        ordered = logits.sort(dim=-1, descending=True).values
    rank = torch.arange(ordered.shape[-1], device=logits.device)
    probabilities = ordered.masked_fill(rank >= knobs.top_k[:, None], -torch.inf).softmax(dim=-1)
    # A token goes when those before it already have more than top_p (Holtzman et al., arXiv 1904.09751).
    before = probabilities.cumsum(dim=-1) - probabilities
    count = ((before <= knobs.top_p[:, None]) & (rank < knobs.top_k[:, None])).sum(dim=-1, keepdim=True)
    return logits.masked_fill(logits < ordered.gather(-1, count - 1), -torch.inf)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance on logits (Ho & Salimans, arXiv 2207.12598, eq. 6), any equal shapes.

    Where both are the same row, that row comes out, bit for bit, whatever the scale.
    """
    return unconditional + scale * (conditional - unconditional)


def choose(logits: Tensor, uniforms: Tensor, knobs: SamplingTensors) -> Tensor:
    """Draw one token per row by inverting the CDF in the codebook's order; never waits for the device.

    Args:
        logits: (B, V) of any float type; uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64. Temperature 0 takes the likeliest token.
    """
    logits = filter_logits(logits.float() / knobs.temperature[:, None], knobs)
    cdf = logits.softmax(dim=-1).cumsum(dim=-1)
    # Scaled by the last entry, which rounding leaves a little off 1, so that a draw never falls behind the last token.
    target = (uniforms * knobs.is_random)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


@torch.inference_mode()
def generate_tokens(
    gpt: GPT,
    embedding: Tensor,
    seeds: Sequence[int],
    sampling: SamplingParams,
    progress: Callable[[int, int], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> Tensor:
    """Decode one image of tokens per row.

    Args:
        embedding: conditions, (B, n_things * D).
        seeds: B of them.
        progress: called with (tokens done, tokens in all) of each row, after each.
        is_cancelled: asked before each token.

    Returns:
        (B, T) int64.

    Raises:
        Cancelled: `is_cancelled` said so.
    """
    config, batch = gpt.config, len(embedding)
    weight = gpt.head.weight
    guided = sampling.guidance != 1
    condition = embedding.to(weight)
    if guided:  # the lower half of the rows is the same images without the condition
        condition = torch.cat([condition, torch.zeros_like(condition)])
    cache = gpt.allocate(len(condition))
    knobs = SamplingTensors.of([sampling], config.vocab_size, weight.device)
    uniforms = draw_uniforms(seeds, config.block_size).to(weight.device)
    tokens = torch.empty(batch, config.block_size, dtype=torch.long, device=weight.device)
    for position in range(config.block_size):
        if is_cancelled is not None and is_cancelled():
            raise Cancelled
        if position == 0:
            logits = gpt.prefill(condition, cache)
        else:
            previous = tokens[:, position - 1]
            logits = gpt.step(previous.repeat(2) if guided else previous, position, cache)
        logits = logits.float()
        if guided:
            logits = guide(logits[:batch], logits[batch:], sampling.guidance)
        tokens[:, position] = choose(logits, uniforms[:, position], knobs)
        if progress is not None:
            progress(position + 1, config.block_size)
    return tokens
