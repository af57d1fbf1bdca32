"""The embedding-reconstruction loss of stage 2 (arXiv 2203.00386, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from clipgen.errors import ConfigError
from clipgen.images.pixels import clip_from_pixels
from clipgen.models.clip import Clip
from clipgen.models.vqgan import VQGAN
from train.config import Stage2Config


class EmbeddingLoss(nn.Module):
    """Logits -> straight-through codes -> frozen VQGAN decoder -> frozen CLIP -> cosine distance to the condition."""

    def __init__(self, vqgan: VQGAN, clip: Clip) -> None:
        super().__init__()
        self.vqgan, self.clip = vqgan, clip
        self.requires_grad_(False)

    def forward(self, logits: Tensor, condition: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the mean cosine distance in [0, 2], differentiable in the logits, and its log entry.

        The forward pass decodes the code of the most likely token; the backward pass sees the mean code by
        probability (the straight-through estimator of Bengio et al., arXiv 1308.3432).

        Args:
            logits: (B, T, V), of every token given those before it.
            condition: (B, D) unit norm; rows of zeros ("no condition") count as distance 0.
        """
        codes, side = self.vqgan.quantizer.codes().float(), self.vqgan.config.grid
        logits = logits.float()
        soft = logits.softmax(-1) @ codes  # (B, T, C)
        z = soft + (F.embedding(logits.argmax(-1), codes) - soft).detach()
        pixels = self.vqgan.decode(rearrange(z, "b (h w) c -> b c h w", h=side))
        embedding = self.clip.encode_image(clip_from_pixels(pixels, self.clip.image_size))  # (B, D)
        distance = 1 - F.cosine_similarity(embedding, condition, dim=1)
        loss = torch.where(condition.any(1), distance, 0.0).mean()
        return loss, {"clip_distance": loss.detach()}


def clip_loss_rows(config: Stage2Config, processes: int) -> slice:
    """Rows of each micro-batch used by the embedding loss, `clip_batch` per batch in all.

    Raises:
        ConfigError: the micro-batches cannot have equally many.
    """
    parts = processes * config.accumulate
    if config.clip_batch % parts:
        raise ConfigError(
            f"clip_batch is {config.clip_batch}; with {processes} processes and accumulate={config.accumulate} it must "
            f"be a multiple of {parts}"
        )
    return slice(None, None, config.batch_size // config.clip_batch)
