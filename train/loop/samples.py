"""Tokens of a few images, all in one batch.

Shapes: B images, D condition size, T tokens of an image.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from clipgen.engine.batch import Batch
from clipgen.engine.sequence import Sequence
from clipgen.models.gpt import GPT
from clipgen.request import SamplingParams


@torch.inference_mode()
def generate_tokens(gpt: GPT, conditions: Tensor, seeds: Iterable[int], params: SamplingParams) -> Tensor:
    """Generate one image of tokens per row in one batch, for training's samples and for benchmarks.

    Args:
        conditions: (B, D).
        seeds: B of them.

    Returns:
        (B, T) int64 on the GPT's device.
    """
    sequences = [Sequence(condition, seed, params) for condition, seed in zip(conditions, seeds, strict=True)]
    batch = Batch(gpt)
    batch.add(sequences, max_rows=2 * len(sequences))
    for _ in range(batch.length if sequences else 0):
        batch.step()
    return batch.tokens
