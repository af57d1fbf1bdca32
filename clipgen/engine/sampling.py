"""Logits to tokens: filters, guidance and seeded sampling.

Shapes: B rows, T tokens of an image, V codebook size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipgen.request import SamplingParams

TOP_K_BLOCK = 64
"""Sums over likely tokens run over multiples of this many, so that they do not depend on the other rows' top_k."""
_MIN_TEMPERATURE = 1e-6
"""Dividing logits by less overflows to infinity."""


def draw_uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Draw one uniform number per image and token, (B, steps) float32 in [0, 1).

    Each row comes from its own seed, on the CPU, so an image's randomness depends on neither batch nor device.
    """
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, steps)


@dataclass(frozen=True)
class SamplingTensors:
    """Sampling parameters of each row as tensors on the device, so that one batch can mix requests.

    Every tensor is (B,), or (1,) for all rows alike; see `SamplingParams` for the meaning of the values.
    """

    temperature: Tensor
    """float32, above 0. Greedy rows have temperature 1, `top_k` 1 and `is_random` 0: the likeliest token."""
    top_k: Tensor
    """int64; `max_top_k` or more switches the filter off."""
    top_p: Tensor
    """float32."""
    guidance: Tensor
    """float32."""
    is_random: Tensor
    """float32, 1, or 0 for greedy rows: multiplies the uniforms."""
    max_top_k: int
    """How many of the likeliest tokens to sort: at least every row's top_k, V where a row has none. 0: no filters."""

    @classmethod
    def from_params(
        cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device | str = "cpu"
    ) -> SamplingTensors:
        """Collect the parameters of all rows."""
        limits = [1 if p.temperature == 0 else min(p.top_k or vocab_size, vocab_size) for p in params]
        is_unfiltered = all(k == vocab_size and p.top_p == 1 for k, p in zip(limits, params, strict=True))
        blocks = -(-max(limits, default=0) // TOP_K_BLOCK)

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).to(device)

        return cls(
            temperature=column([max(p.temperature, _MIN_TEMPERATURE) if p.temperature else 1.0 for p in params]),
            top_k=torch.tensor(limits).to(device),
            top_p=column([p.top_p for p in params]),
            guidance=column([p.guidance for p in params]),
            is_random=column([float(p.temperature > 0) for p in params]),
            max_top_k=0 if is_unfiltered else min(blocks * TOP_K_BLOCK, vocab_size),
        )


def filter_logits(logits: Tensor, params: SamplingTensors) -> Tensor:
    """Keep the `top_k` likeliest tokens, then the smallest set of them that has probability `top_p`.

    Tokens as likely as the last one kept stay too, so that no order among equals is made up.

    Args:
        logits: (B, V) float32.

    Returns:
        (B, V): -inf where a token may not be drawn. The likeliest token always stays.
    """
    if params.max_top_k == 0:
        return logits
    ordered = largest(logits, params.max_top_k)
    rank = torch.arange(ordered.shape[-1], device=logits.device)
    probabilities = ordered.masked_fill(rank >= params.top_k[:, None], -torch.inf).softmax(dim=-1)
    # A token goes when those before it already have more than top_p (Holtzman et al., arXiv 1904.09751).
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = (before <= params.top_p[:, None]) & (rank < params.top_k[:, None])
    # NaN compares false: without the clamp the index would be -1, which on a GPU kills the CUDA context.
    count = kept.sum(dim=-1, keepdim=True).clamp(min=1)
    return logits.masked_fill(logits < ordered.gather(-1, count - 1), -torch.inf)


def largest(values: Tensor, count: int) -> Tensor:
    """Select the `count` largest values of each row, the largest first, NaN before all: (B, V) -> (B, count).

    On a CPU by NumPy, which sorts several rows faster (docs/performance.md, "What was tried").
    """
    size = values.shape[-1]
    if values.device.type != "cpu":
        return (values.topk(count) if count < size else values.sort(dim=-1, descending=True)).values
    rows = values.detach().numpy()
    if count < size:
        rows = np.partition(rows, size - count, axis=-1)[..., size - count :]
    return torch.from_numpy(np.sort(rows, axis=-1)).flip(-1)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Apply classifier-free guidance to logits of any equal shapes (Ho & Salimans, arXiv 2207.12598, eq. 6).

    Where both are the same row the result is that row, bit for bit, whatever the scale.
    """
    return unconditional + scale * (conditional - unconditional)


def sample(logits: Tensor, uniforms: Tensor, params: SamplingTensors) -> Tensor:
    """Sample one token per row by inverting the CDF in codebook order, without waiting for the device.

    Args:
        logits: (B, V) of any float type. Rows with NaN give some valid token; the caller checks for them.
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64 in [0, V). Temperature 0 takes the likeliest token.
    """
    logits = filter_logits(logits.float() / params.temperature[:, None], params)
    # CUDA's scan of a single row is not deterministic; in float64 the difference is far below one draw in a million.
    wide = torch.float64 if logits.is_cuda and len(logits) == 1 else torch.float32
    cdf = logits.softmax(dim=-1).cumsum(dim=-1, dtype=wide)
    # Rounding leaves the last entry a little off 1: scale by it, so that no draw falls behind the last token.
    target = (uniforms * params.is_random)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
