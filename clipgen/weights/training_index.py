"""The training index: how near a prompt is to what a model was trained on, and which training images are nearest.

The embeddings of the training images lie in a small file beside the weights. On CLIP's sphere sentences and images lie
apart (Liang et al. 2022, arXiv 2203.02053): the mean difference between sentences and their nearest images, measured
when the index is built, is subtracted from a prompt before it is compared.

Shapes: N images, D embedding, R directions kept of it, M measured sentences.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from clipgen.errors import WeightsError
from clipgen.weights.model_dir import MANIFEST, read_manifest
from clipgen.weights.tensor_file import load_tensors

FILE = "coverage.safetensors"
NUM_NEAREST = 5
NUM_SHOWN = 3
"""Nearest images that fit into a line."""
OUT_OF_DISTRIBUTION = 0.05
"""A prompt farther away than all but this share of the measured sentences counts as unlike the training images."""
MAX_NAME_BYTES = 8_000_000


@dataclass(frozen=True)
class IndexMatch:
    """How one prompt compares with the training images."""

    similarity: float
    """Mean cosine with the nearest training images, after subtracting the gap."""
    percentile: float
    """Share, 0 to 100, of sentences about training images that are farther away than this prompt."""
    nearest: list[tuple[str, float]]
    """Names and cosines of the nearest images, nearest first."""

    @property
    def is_out_of_distribution(self) -> bool:
        """Whether the model was trained on little like the prompt."""
        return self.percentile < 100 * OUT_OF_DISTRIBUTION

    def warning(self, name: str) -> str:
        """One-line warning that the prompt `name` is out of distribution."""
        [nearest, *_] = self.captions
        return f"this model has seen little like {name}; the nearest of its training images is {nearest}"

    def __str__(self) -> str:
        """The percentile and the nearest images, in one line."""
        nearest = "; ".join(self.captions[:NUM_SHOWN])
        return f"coverage {self.percentile:.0f} of 100, nearest training images: {nearest}"

    @property
    def captions(self) -> list[str]:
        """Names without a leading file name: "002439.png: red heart" becomes "red heart"."""
        return [name.partition(": ")[2] or name for name, _ in self.nearest]


class TrainingIndex:
    """An index of training images in memory; `TrainingIndex.load` reads one.

    Raises:
        WeightsError: the tensors are not those of an index.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        try:
            self.basis = tensors["basis"].float()  # (R, D)
            self.images = tensors["images"].float() * tensors["scale"].float()[:, None]  # (N, R)
            self.gap = tensors["gap"].float()  # (D,)
            self.measured = tensors["held"].float().sort().values  # (M,)
            data = zlib.decompressobj().decompress(tensors["names"].numpy().tobytes(), MAX_NAME_BYTES)
            self.names: list[str] = [str(name) for name in json.loads(data)]
            fits = len(self.names) == len(self.images) > 0 and self.basis.shape == (self.images.shape[1], len(self.gap))
        except (KeyError, ValueError, TypeError, RuntimeError, IndexError, zlib.error) as error:
            raise WeightsError(f"{FILE} is not an index of training images ({error}); build it again") from error
        if not fits or self.measured.ndim != 1 or not len(self.measured):
            raise WeightsError(f"{FILE} is not an index of training images: its parts do not fit; build it again")

    @property
    def embed_dim(self) -> int:
        """Size of the embeddings, D."""
        return len(self.gap)

    @classmethod
    def load(cls, folder: str | Path) -> TrainingIndex | None:
        """Read the index of a folder of weights; None where it has none.

        Raises:
            WeightsError: it is damaged.
        """
        folder = Path(folder)
        return cls(load_tensors(folder / FILE)) if FILE in read_manifest(folder / MANIFEST) else None

    def query(self, embedding: Tensor, text_share: float = 1.0) -> IndexMatch:
        """Compare a prompt with the training images.

        Args:
            embedding: (D,) unit norm, as `ClipGen.embed` returns it.
            text_share: how much of it comes from sentences, 0 to 1; that share of the gap is subtracted.
        """
        cosines = self.cosines(embedding.float().cpu()[None] - text_share * self.gap)[0]
        values, places = cosines.topk(min(NUM_NEAREST, len(cosines)))
        similarity = values.mean().item()
        percentile = 100 * (self.measured < similarity).float().mean().item()
        nearest = [(self.names[i], cosine) for i, cosine in zip(places.tolist(), values.tolist(), strict=True)]
        return IndexMatch(similarity, percentile, nearest)

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Cosines (B, N) of embeddings (B, D) of any length with all images; parts outside the basis count as 0."""
        return F.normalize(embeddings, dim=1) @ self.basis.t() @ self.images.t()
