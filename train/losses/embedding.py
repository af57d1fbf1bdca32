"""What the GPT writes is decoded and shown to CLIP: stage 2's second loss (arXiv 2203.00386, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clipgen.errors import ConfigError
from clipgen.images.pixels import clip_from_pixels
from clipgen.models.clip import Clip
from clipgen.models.vqgan import VQGAN
from train.config import Stage2Config


class EmbeddingLoss(nn.Module):
    """Logits -> straight-through codes -> frozen VQGAN decoder -> frozen CLIP -> 1 - cos with the condition."""

    def __init__(self, vqgan: VQGAN, clip: Clip) -> None:
        super().__init__()
        self.vqgan, self.clip = vqgan, clip
        self.requires_grad_(False)

    def forward(self, logits: Tensor, condition: Tensor) -> Tensor:
        """The mean distance, 0 to 2, as a scalar whose gradient reaches the logits.

        Each code is that of the likeliest token on the way there and the mean of all, by probability, on the way back
        (Bengio et al., arXiv 1308.3432).

        Args:
            logits: (B, T, V), of every token given those before it.
            condition: (B, D) unit norm, or (B, K * D) of several things each, whose sum's direction is asked for; rows
                of zeros, "no condition", ask for nothing and count 0.
        """
        codes, side = self.vqgan.quantizer.codes().float(), self.vqgan.config.grid
        logits = logits.float()
        soft = logits.softmax(-1) @ codes  # (B, T, C)
        z = soft + (F.embedding(logits.argmax(-1), codes) - soft).detach()
        pixels = self.vqgan.decode(z.transpose(1, 2).unflatten(2, (side, side)))
        seen = self.clip.encode_image(clip_from_pixels(pixels, self.clip.image_size))
        wanted = F.normalize(condition.unflatten(1, (-1, seen.shape[1])).sum(1), dim=1)
        return torch.where(condition.any(1), 1 - (seen * wanted).sum(1), 0.0).mean()


def clip_loss_rows(config: Stage2Config, processes: int) -> slice:
    """Which rows of each part of a batch CLIP looks at: `clip_batch` of the whole, whoever holds them.

    Raises:
        ConfigError: the parts cannot have equally many.
    """
    parts = processes * config.accumulate
    if config.clip_batch % parts:
        raise ConfigError(
            f"clip_batch is {config.clip_batch}; with {processes} processes and accumulate={config.accumulate} it must "
            f"be a multiple of {parts}"
        )
    return slice(None, None, config.batch_size // config.clip_batch)
