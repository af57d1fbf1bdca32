"""Numbered pictures -> batches, in an order that depends on the seed alone.

Position p of training is picture `Order.keys` says, cropped by a seed of its own, whatever the number of processes,
of workers, or of interruptions: batch k is positions k * B to (k + 1) * B, of which every process takes its part.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clipgen.errors import DataError
from clipgen.images.pixels import load_image, to_clip, to_pixels
from clipgen.images.sources import Source, open_source

Key = tuple[int, int]
"""Which picture, and the seed of its crop and flip."""


class Batch(NamedTuple):
    """Pictures as both networks see them, and what could not be read on the way."""

    pixels: Tensor
    """(B, 3, S, S) in [-1, 1]."""
    clip: Tensor
    """(B, 3, s, s) with CLIP's own preprocessing; (B, 0) when it was not asked for."""
    failures: list[tuple[str, str]]
    """Name and reason."""


class Images(Dataset[Batch]):
    """Pictures by (index, seed), so that the same item of the same step is the same pixels in every run.

    What cannot be read is replaced by the next picture that can, and said so in `Batch.failures`.

    Attributes:
        failures: name -> reason, as far as this process has come across them.
    """

    def __init__(
        self, source: Source | str | Path, size: int, min_scale: float = 1.0, flip: bool = True, clip_size: int = 0
    ) -> None:
        """Args: the data, the side of the pixels, how much a crop keeps, whether to flip, the side for CLIP (0: none).

        Raises:
            DataError: no picture there.
        """
        self.source = open_source(source) if isinstance(source, (str, Path)) else source
        self.size, self.min_scale, self.flip, self.clip_size = size, min_scale, flip, clip_size
        self.failures: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.source.names)

    @property
    def item_bytes(self) -> int:
        """Size of one item's pixels, as both networks see them."""
        return 3 * 4 * (self.size**2 + self.clip_size**2)

    def __getitem__(self, key: Key) -> Batch:
        index, seed = key
        found: list[tuple[str, str]] = []
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            name = self.source.names[at]
            try:
                if name not in self.failures:
                    crop = self.augment(load_image(self.source.read(at)), random.Random(seed))
                    clip = to_clip([crop], self.clip_size) if self.clip_size else torch.empty(1, 0)
                    return Batch(to_pixels([crop], self.size), clip, found)
            except (DataError, OSError) as error:
                self.failures[name] = reason(error)
            found.append((name, self.failures[name]))
        raise DataError(f"none of the {len(self)} images can be read, {found[0][0]}: {found[0][1]}")

    def augment(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """A random square of at least `min_scale` of the shorter side, flipped half of the time."""
        if self.min_scale < 1:
            side = max(1, round(min(image.size) * rng.uniform(self.min_scale, 1)))
            x, y = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
            image = image.crop((x, y, x + side, y + side))
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def batch(self, keys: list[Key]) -> Batch:
        """Several items as one."""
        return collate([self[key] for key in keys])


def reason(error: Exception) -> str:
    """Why a picture cannot be read, without its name."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.removeprefix("the given image").lstrip(": ")


def collate(items: list[Batch]) -> Batch:
    """Join batches into one."""
    pixels, clip, failures = zip(*items, strict=True)
    return Batch(torch.cat(pixels), torch.cat(clip), [failure for found in failures for failure in found])


class ResumableSampler:
    """Endless positions -> keys: every picture once an epoch, shuffled anew in each."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def keys(self, start: int, count: int) -> list[Key]:
        """The keys of positions start to start + count."""
        return [(self._index(position), hash((self.seed, position))) for position in range(start, start + count)]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.length, generator=generator)
        return int(self._permutation[offset])
