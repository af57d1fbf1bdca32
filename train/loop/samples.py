"""A few images of a GPT that is being trained or measured, all in one batch.

Shapes: B images, D condition size, T tokens of an image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from clipgen.engine.batch import Batch
from clipgen.engine.sequence import Sequence
from clipgen.images.pixels import from_pixels, grid
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.request import SamplingParams


@torch.inference_mode()
def generate_tokens(gpt: GPT, conditions: Tensor, seeds: Iterable[int], params: SamplingParams) -> Tensor:
    """Generate one image of tokens per row in one batch.

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


def sample(gpt: GPT, embeddings: Tensor, sampling: SamplingParams) -> Tensor:
    """Sample tokens (B, T), one image per condition (B, D), with the seeds 0 to B - 1."""
    return generate_tokens(gpt, embeddings, range(len(embeddings)), sampling).clone()  # out of inference mode


@torch.no_grad()
def sample_grid(gpt: GPT, vqgan: VQGAN, tokens: Tensor, embeddings: Tensor, sampling: SamplingParams) -> Image.Image:
    """Images of tokens (B, T), eight in a row, and below them samples from their embeddings (B, D)."""
    samples = sample(gpt, embeddings, replace(sampling, guidance=1.0))
    return token_grid(vqgan, torch.cat([tokens, samples]), columns=min(8, len(tokens)))


@torch.no_grad()
def token_grid(vqgan: VQGAN, tokens: Tensor, columns: int = 8) -> Image.Image:
    """Decode tokens (B, T) into a grid of images."""
    return grid(from_pixels(vqgan.decode_tokens(tokens)), columns)
