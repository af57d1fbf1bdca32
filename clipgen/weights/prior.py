"""Priors: maps from CLIP's embeddings to the GPT's condition, for weights that need one.

Plain CLIP-GEN has none: the GPT is conditioned on the prompt's embedding itself. A folder of weights can name one in
its config.yaml (`prior: training_index`). The core depends only on the `Prior` interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from clipgen.config import ModelConfig
from clipgen.errors import WeightsError
from clipgen.weights.training_index import TrainingIndex

# Measured with the mini model: 0.6 % of 800 captions of one thing (none of 200 bare names) and 92 % of 300 "a ... and
# a ..." with two random names are split.
SHARPNESS = 75
"""Inverse temperature of `IndexPrior.project`: a cosine larger by 0.01 weighs e^0.75 times as much."""
PAIR_GAIN = 0.01
"""A sentence is about two things when they explain it better than images of one thing do, by this much of a cosine."""
MAX_PAIR_COSINE = 0.38
"""Two things must differ by more than this: "an apple" is not about a red one and a green one."""
NUM_CANDIDATES = 48
"""Number of things most like the sentence that are searched for its two."""
FIRST_BONUS = 0.02
"""Added to the cosine of pairs with the likeliest thing; else "a lemon with hair" gives a saxophone and a folder.

Of 600 "a ... and a ..." with two random names, 91.3 % give the right two; without it 91.7 %.
"""


class Prior(Protocol):
    """Maps a prompt's embeddings to the GPT's condition."""

    def __call__(self, embeddings: Tensor, weights: Sequence[float], is_text: Sequence[bool]) -> Tensor:
        """Condition for a prompt of P parts.

        Args:
            embeddings: (P, D) unit norm.
            weights: P of them.
            is_text: which parts are texts; the others are images.

        Returns:
            (n_cond,); zeros in its first D numbers where the parts cancel each other out.
        """
        ...


class IndexPrior:
    """Maps texts to embeddings of the training images they describe, as the GPT was trained on image embeddings.

    A text becomes the mean of the training images' embeddings, weighted by the softmax of their cosines with it (Li et
    al. 2023, "DeCap", arXiv 2303.03032, eq. 5, with sentences and images swapped). A text about two things becomes
    two embeddings if the condition has room for them. Image embeddings are kept.
    """

    def __init__(self, index: TrainingIndex, num_slots: int = 1) -> None:
        """Args: `num_slots` embeddings in a condition, one after another."""
        self.index, self.num_slots = index, num_slots
        self.things = F.normalize(index.images[index.things] @ index.basis, dim=1)  # (K, D)

    def __call__(self, embeddings: Tensor, weights: Sequence[float], is_text: Sequence[bool]) -> Tensor:
        """See `Prior`. Only a prompt that is a single text can be about two things."""
        slots = self.num_slots if len(embeddings) == 1 else 1
        total = embeddings.new_zeros(slots, embeddings.shape[1])
        for embedding, weight, text in zip(embeddings, weights, is_text, strict=True):
            rows = self.project(embedding, slots) if text else embedding[None]
            total[: len(rows)] += weight * rows
        return F.pad(F.normalize(total, dim=1), (0, 0, 0, self.num_slots - slots)).flatten()

    def project(self, embedding: Tensor, num_things: int = 1) -> Tensor:
        """Embedding of the training images that a text is about.

        Args:
            embedding: (D,) unit norm.
            num_things: 2 to look for two things.

        Returns:
            (1, D), or (2, D) for two things, the likelier one first; unit norm, on the same device.
        """
        sentence, index = embedding.float().cpu(), self.index
        cosines = index.cosines(sentence[None])[0]
        images = F.normalize((SHARPNESS * cosines).softmax(dim=0) @ index.images @ index.basis, dim=0)
        pair = None
        if num_things > 1 and len(self.things) > 1:
            pair = self._find_pair(sentence, sentence @ images + PAIR_GAIN)
        return (images[None] if pair is None else pair).to(embedding.device)

    def _find_pair(self, sentence: Tensor, min_cosine: Tensor) -> Tensor | None:
        """The two things whose sum is most like a sentence, (2, D); None if its cosine is not above `min_cosine`."""
        things = self.things
        single, places = (things @ sentence).topk(min(NUM_CANDIDATES, len(things)))
        likeliest = things[places]
        mutual = likeliest @ likeliest.t()
        together = (single + single[:, None]) / (2 + 2 * mutual).clamp(min=1e-6).sqrt()
        together[mutual >= MAX_PAIR_COSINE] = -1.0
        preferred = together.clone()
        preferred[0] += FIRST_BONUS
        best = preferred.argmax()
        if together.flatten()[best] <= min_cosine:
            return None
        return likeliest[sorted(divmod(int(best), len(likeliest)))]


def load_prior(folder: str | Path, config: ModelConfig, index: TrainingIndex | None, embed_dim: int) -> Prior | None:
    """Read the prior that a folder of weights names; None for plain CLIP-GEN.

    Raises:
        WeightsError: an unknown prior, or one that needs an index which is not there.
    """
    if not config.prior:
        return None
    if config.prior != "training_index":
        raise WeightsError(f"{folder}: prior is {config.prior!r}; this version knows training_index, or none at all")
    if index is None:
        raise WeightsError(f"{folder}: its prior needs coverage.safetensors, which is missing; fetch the weights again")
    return IndexPrior(index, config.gpt.n_cond // embed_dim)
