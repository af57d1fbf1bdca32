"""Numbered images -> batches, in an order that depends on the seed alone.

`ResumableSampler.keys` assigns an image and a crop seed to every position of the training. Batch k is positions k * B
to (k + 1) * B - 1, of which every process takes its part, so the numbers of processes, workers and interruptions change
nothing.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import suppress
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
"""Index of an image, and the seed of its crop; an odd seed flips the image."""


def readable_images(source: Source) -> Iterator[Image.Image]:
    """The images of a source, without those that cannot be read."""
    for index in range(len(source.names)):
        with suppress(DataError, OSError):
            yield load_image(source.read(index))


class Batch(NamedTuple):
    """Pixels of images for both networks, and the images that could not be read."""

    pixels: Tensor
    """(B, 3, S, S) in [-1, 1]; (B, 0) when they were not asked for."""
    clip: Tensor
    """(B, 3, s, s) with CLIP's own preprocessing; (B, 0) when it was not asked for."""
    failures: list[tuple[str, str]]
    """Name and reason."""


class Images(Dataset[Batch]):
    """Images by (index, seed), so that the same item of the same step has the same pixels in every run.

    An image that cannot be read is replaced by the next readable one and listed in `Batch.failures`.

    Attributes:
        failures: name -> reason, of the images that this process failed to read so far.
    """

    def __init__(
        self, source: Source | str | Path, size: int, min_scale: float = 1.0, flip: bool = True, clip_size: int = 0
    ) -> None:
        """Open the data.

        Args:
            source: the images, or the folder, list or shards that hold them.
            size: side of the VQGAN's pixels, px; 0 for none.
            min_scale: smallest side of a crop, as a fraction of the image's shorter side; 1 does not crop.
            flip: whether to flip half of the images.
            clip_size: side of CLIP's pixels, px; 0 for none.

        Raises:
            DataError: there are no images.
        """
        self.source = open_source(source) if isinstance(source, (str, Path)) else source
        self.size, self.min_scale, self.flip, self.clip_size = size, min_scale, flip, clip_size
        self.failures: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.source.names)

    @property
    def item_bytes(self) -> int:
        """Size of one item's pixels for both networks, bytes."""
        return 3 * 4 * (self.size**2 + self.clip_size**2)

    def __getitem__(self, key: Key) -> Batch:
        index, seed = key
        failures: list[tuple[str, str]] = []
        for offset in range(len(self)):
            position = (index + offset) % len(self)
            name = self.source.names[position]
            try:
                if name not in self.failures:
                    crop = self.augment(load_image(self.source.read(position)), seed)
                    pixels = to_pixels([crop], self.size) if self.size else torch.empty(1, 0)
                    clip = to_clip([crop], self.clip_size) if self.clip_size else torch.empty(1, 0)
                    return Batch(pixels, clip, failures)
            except (DataError, OSError) as error:
                self.failures[name] = reason(error)
            failures.append((name, self.failures[name]))
        raise DataError(f"none of the {len(self)} images can be read, {failures[0][0]}: {failures[0][1]}")

    def augment(self, image: Image.Image, seed: int) -> Image.Image:
        """A random square crop of at least `min_scale` of the shorter side, flipped if the seed is odd."""
        if self.min_scale < 1:
            rng = random.Random(seed)
            side = max(1, round(min(image.size) * rng.uniform(self.min_scale, 1)))
            x, y = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
            image = image.crop((x, y, x + side, y + side))
        if self.flip and seed % 2:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def batch(self, keys: list[Key]) -> Batch:
        """Several items as one batch."""
        return collate([self[key] for key in keys])

    def fingerprint(self) -> str:
        """SHA-256 of the images."""
        return self.source.fingerprint()


class PairedImages(Images):
    """Images for the VQGAN, each with another one of the same name for CLIP: the same thing, in another layout."""

    def __init__(
        self,
        source: Source | str | Path,
        seen: Source | str | Path,
        size: int,
        min_scale: float,
        flip: bool,
        clip_size: int,
    ) -> None:
        """Open both; `seen` is what CLIP sees, the rest as for `Images`.

        Raises:
            DataError: there are no images, or the two have different names.
        """
        super().__init__(source, size, min_scale, flip)
        self.seen = Images(seen, 0, min_scale, flip, clip_size)
        names, others = self.source.names, self.seen.source.names
        if len(names) != len(others) or any(_file_name(a) != _file_name(b) for a, b in zip(names, others, strict=True)):
            raise DataError(f"{seen} does not hold the same names as {source}; it needs an image for each of them")

    @property
    def item_bytes(self) -> int:
        return super().item_bytes + self.seen.item_bytes

    def __getitem__(self, key: Key) -> Batch:
        """Both images of a key.

        Raises:
            DataError: one of them cannot be read. The next readable one in its place, as in `Images`, would pair tokens
                with the embedding of another image.
        """
        item, other = super().__getitem__(key), self.seen[key]
        for name, why in item.failures + other.failures:
            raise DataError(f"{name} cannot be read ({why}); --seen needs every image in both folders: remove both")
        return item._replace(clip=other.clip)

    def fingerprint(self) -> str:
        """SHA-256 of both sets."""
        return hashlib.sha256(f"{super().fingerprint()} {self.seen.fingerprint()}".encode()).hexdigest()


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def reason(error: Exception) -> str:
    """Why an image cannot be read, without its name."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text.removeprefix("the given image").lstrip(": ")


def collate(items: list[Batch]) -> Batch:
    """Join batches into one."""
    pixels, clip, failures = zip(*items, strict=True)
    return Batch(torch.cat(pixels), torch.cat(clip), [failure for item in failures for failure in item])


class ResumableSampler:
    """Keys of an endless sequence of positions: every image once per epoch, in a new order each."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def keys(self, start: int, count: int) -> list[Key]:
        """The keys of positions start to start + count - 1."""
        return [(self._index(position), hash((self.seed, position))) for position in range(start, start + count)]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.length, generator=generator)
        return int(self._permutation[offset])
