"""TrainingIndex: how near a prompt is to what a model was trained on, and to which pictures; where those lie.

The training pictures' embeddings lie in a small index beside the weights (`train/mini/index.py` makes it). Sentences
and pictures lie apart on CLIP's sphere (Liang et al. 2022, arXiv 2203.02053), so the mean way from sentences to their
nearest pictures, measured when the index is made, is taken off a prompt before it is compared.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.errors import WeightsError
from clipgen.weights.model_dir import load_extra

FILE = "coverage.safetensors"
RANK = 128
"""Directions of the embeddings that are kept: of 384, they hold 99.3 % of the mini model's training pictures."""
MOST_PICTURES = 18_000
"""In the index: spread evenly over larger sets."""
NEAREST = 5
SHOWN = 3
"""Of the nearest, where there is little room."""
LOW = 0.05
"""Share of the sentences measured beneath which a prompt counts as unlike the training pictures."""
SHARPNESS = 75
"""Inverse temperature of `TrainingIndex.project`: a cosine larger by a hundredth counts e^0.75 times as much."""
GAIN = 0.01
"""A sentence is about two things when they explain it better than pictures of one do: by so much of a cosine ...

Measured with the mini model's: taken apart are 0.6 % of 800 captions of one thing (of 200 bare names none) and 92 % of
300 "a ... and a ..." with two random names.
"""
UNLIKE = 0.38
"""... and when their own cosine is below this: "an apple" is not about a red one and a green one."""
_LIKELIEST = 48
"""Things, those most like the sentence, among which its two are sought."""
_FIRST = 0.02
"""Added to the cosine of two things of which one is the likeliest: "a lemon with hair" is not a saxophone and a folder.

Of 600 "a ... and a ..." with two random names the right two are found in 91.3 %, without it in 91.7 %.
"""
_MOST_NAMES = 8_000_000


@dataclass(frozen=True)
class IndexMatch:
    """What the index says of one prompt."""

    similarity: float
    """Mean cosine with the nearest training pictures, the gap taken off: what `percentile` goes by."""
    percentile: float
    """Share, 0 to 100, of sentences about training pictures that are farther away than this prompt."""
    nearest: list[tuple[str, float]]
    """The nearest pictures' names and cosines, nearest first."""

    @property
    def low(self) -> bool:
        """Whether the model has seen little like it."""
        return self.percentile < 100 * LOW

    def warning(self, name: str) -> str:
        """What to tell whoever asked for `name`, where `low`."""
        [nearest, *_] = self._captions()
        return f"this model has seen little like {name}; the nearest of its training pictures is {nearest}"

    def __str__(self) -> str:
        """The figure and the nearest pictures, in a line."""
        nearest = "; ".join(self._captions()[:SHOWN])
        return f"coverage {self.percentile:.0f} of 100, nearest training pictures: {nearest}"

    def _captions(self) -> list[str]:
        """Names as far as they are for people: "002439.png: red heart" has its file in front."""
        return [name.partition(": ")[2] or name for name, _ in self.nearest]


class TrainingIndex:
    """An index of training pictures, in memory. Make one with `TrainingIndex.load`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Take an index apart; raises WeightsError when it is none."""
        try:
            self.basis = tensors["basis"].float()  # (R, D)
            self.images = tensors["images"].float() * tensors["scale"].float()[:, None]  # (N, R)
            self.gap = tensors["gap"].float()  # (D,)
            self.held = tensors["held"].float().sort().values  # (M,)
            things = tensors.get("things", torch.empty(0, dtype=torch.int32)).long()
            self.things = F.normalize(self.images[things] @ self.basis, dim=1)  # (T, D)
            data = zlib.decompressobj().decompress(tensors["names"].numpy().tobytes(), _MOST_NAMES)
            self.names: list[str] = [str(name) for name in json.loads(data)]
            fits = len(self.names) == len(self.images) > 0 and self.basis.shape == (self.images.shape[1], len(self.gap))
        except (KeyError, ValueError, TypeError, RuntimeError, IndexError, zlib.error) as error:
            raise WeightsError(f"{FILE} is no index of training pictures ({error}); make it again") from error
        if not fits or not len(self.held):
            raise WeightsError(f"{FILE} is no index of training pictures: its parts do not fit; make it again")

    @classmethod
    def load(cls, folder: str | Path) -> TrainingIndex | None:
        """The index of a folder of weights; None when it has none.

        Raises:
            WeightsError: it is damaged.
        """
        tensors = load_extra(folder, FILE)
        return None if tensors is None else cls(tensors)

    def look(self, embedding: Tensor, texts: float = 1.0) -> IndexMatch:
        """Compare a prompt with the training pictures.

        Args:
            embedding: (D,) unit norm, as `ClipGen.embed` gives it.
            texts: how much of it comes from sentences, 0 to 1: so much of the gap is taken off.
        """
        similar = self._similar(embedding.float().cpu()[None], texts)[0]
        values, places = similar.topk(min(NEAREST, len(similar)))
        figure = values.mean().item()
        percentile = 100 * (self.held < figure).float().mean().item()
        return IndexMatch(
            figure, percentile, [(self.names[i], v) for i, v in zip(places.tolist(), values.tolist(), strict=True)]
        )

    def project(self, embedding: Tensor, things: int = 1) -> Tensor:
        """Where the pictures lie that a sentence is about: its place in the GPT's training.

        The mean of the training pictures' embeddings, weighted by the softmax of their cosines with the sentence (Li et
        al. 2023, "DeCap", arXiv 2303.03032, eq. 5, with sentence and pictures in each other's place). No training, no
        captions. A sentence about two things is taken apart into theirs, where the GPT can draw two.

        Args:
            embedding: (D,) unit norm, of a text.
            things: how many the GPT can draw together.

        Returns:
            (1, D), or (2, D) of two things, the likelier one first; unit norm, on the same device.
        """
        sentence = embedding.float().cpu()
        cosines = _cosines(sentence[None], self.basis, self.images)[0]
        pictures = F.normalize((SHARPNESS * cosines).softmax(dim=0) @ self.images @ self.basis, dim=0)
        two = self._two(sentence, sentence @ pictures + GAIN) if things > 1 and len(self.things) > 1 else None
        return (pictures[None] if two is None else two).to(embedding.device)

    def _two(self, sentence: Tensor, least: Tensor) -> Tensor | None:
        """The two things whose sum is most like a sentence, (2, D); None where its cosine is not above `least`."""
        alone, places = (self.things @ sentence).topk(min(_LIKELIEST, len(self.things)))
        likeliest = self.things[places]
        alike = likeliest @ likeliest.t()
        together = (alone + alone[:, None]) / (2 + 2 * alike).clamp(min=1e-6).sqrt()
        together[alike >= UNLIKE] = -1.0
        preferred = together.clone()
        preferred[0] += _FIRST
        best = preferred.argmax()
        if together.flatten()[best] <= least:
            return None
        return likeliest[sorted(divmod(int(best), len(likeliest)))]

    def _similar(self, embeddings: Tensor, texts: float = 1.0) -> Tensor:
        return _cosines(embeddings - texts * self.gap, self.basis, self.images)


def _cosines(embeddings: Tensor, basis: Tensor, images: Tensor) -> Tensor:
    """(B, N) cosines of embeddings (B, D) and images (N, R) given in `basis`; what lies outside it counts as unlike."""
    return F.normalize(embeddings, dim=1) @ basis.t() @ images.t()


def build_index(images: Tensor, names: Sequence[str], texts: Tensor, things: Sequence[int] = ()) -> dict[str, Tensor]:
    """The tensors of an index.

    Args:
        images: (N, D) unit norm, the training pictures.
        names: N of them.
        texts: (M, D) unit norm, sentences such as users write about such pictures. One half measures the gap, the
            other how near such sentences are.
        things: which of the pictures are of the things that the GPT has learned to draw two of; all of them are kept.
    """
    kept = torch.linspace(0, len(images) - 1, min(len(images), MOST_PICTURES)).long()
    taught = torch.tensor(things, dtype=torch.long)
    kept = torch.cat([kept, taught]).unique()
    images, names = images[kept], [names[i] for i in kept.tolist()]
    *_, directions = torch.linalg.svd(images, full_matrices=False)
    basis = directions[:RANK].half()
    inside = images @ basis.float().t()
    scale = (inside.abs().amax(dim=1) / 127).clamp(min=1e-8)
    stored = (inside / scale[:, None]).round().to(torch.int8)
    there = stored.float() * scale[:, None]
    measuring, held = texts[::2], texts[1::2]
    nearest = (measuring @ images.t()).argmax(dim=1)
    gap = (measuring - images[nearest]).mean(dim=0)
    figures = _cosines(held - gap, basis.float(), there).topk(min(NEAREST, len(images))).values.mean(dim=1)
    packed = zlib.compress(json.dumps(list(names), ensure_ascii=False).encode(), 9)
    return {
        "basis": basis,
        "images": stored,
        "scale": scale.half(),
        "gap": gap,
        "held": figures.sort().values,
        "things": torch.isin(kept, taught).nonzero()[:, 0].int(),
        "names": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
    }
