"""Logits to tokens: filters, guidance, seeded draws, and the decoding loop.

Shapes: B images, T tokens of an image, V codebook size, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipgen.config import SamplingConfig
from clipgen.gpt import GPT, KVCache


class Cancelled(Exception):
    """Generation was asked to stop; nothing of it is kept."""


def draw_uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """One uniform number per image and token, (B, steps) float32 in [0, 1).

    Each row comes from its own seed, on the CPU, so an image's randomness does not depend on its batch or device.
    """
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, steps)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Keep the `top_k` likeliest tokens (0: all), then the smallest set of them that has probability `top_p`.

    Args:
        logits: (B, V) float32.

    Returns:
        (B, V): -inf where a token may not be drawn. The likeliest token always stays.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = torch.where(logits < threshold, -torch.inf, logits)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token goes when those before it already have more than top_p (Holtzman et al., arXiv 1904.09751).
        before = probabilities.cumsum(dim=-1) - probabilities
        ordered = torch.where(before > top_p, -torch.inf, ordered)
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    return logits


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits (Ho & Salimans, arXiv 2207.12598, eq. 6), any equal shapes."""
    return unconditional + scale * (conditional - unconditional)


def choose(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> Tensor:
    """Draw one token per row by inverting the CDF in the codebook's order.

    Args:
        logits: (B, V) of any float type; uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64. Temperature 0 takes the likeliest token.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    cdf = logits.softmax(dim=-1).cumsum(dim=-1)
    # Scaled by the last entry, which rounding leaves a little off 1, so that a draw never falls behind the last token.
    target = uniforms[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


@torch.inference_mode()
def generate_tokens(
    gpt: GPT,
    embedding: Tensor,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Decode one image of tokens per row.

    Args:
        embedding: (B, D) unit norm.
        seeds: B of them.
        progress: called with (tokens done, tokens in all) of each row, after each.
        should_stop: asked before each token.

    Returns:
        (B, T) int64.

    Raises:
        Cancelled: `should_stop` said so.
    """
    config, batch = gpt.config, len(embedding)
    weight = gpt.head.weight
    guided = sampling.guidance != 1
    condition = embedding.to(weight)
    if guided:  # the lower half of the rows is the same images without the condition
        condition = torch.cat([condition, torch.zeros_like(condition)])
    cache = KVCache.allocate(config, len(condition), weight.device, weight.dtype)
    uniforms = draw_uniforms(seeds, config.block_size).to(weight.device)
    tokens = torch.empty(batch, config.block_size, dtype=torch.long, device=weight.device)
    for position in range(config.block_size):
        if should_stop is not None and should_stop():
            raise Cancelled
        if position == 0:
            logits = gpt.prefill(condition, cache)
        else:
            previous = tokens[:, position - 1]
            logits = gpt.step(previous.repeat(2) if guided else previous, position, cache)
        logits = logits.float()
        if guided:
            logits = guide(logits[:batch], logits[batch:], sampling.guidance)
        tokens[:, position] = choose(logits, uniforms[:, position], sampling)
        if progress is not None:
            progress(position + 1, config.block_size)
    return tokens
