"""Images on disk -> batches, in an order that depends on the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipgen.images import ImageError, load_image, to_pixels

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class DataError(ValueError):
    """A data set that cannot be trained on; the message says what was found and what is needed."""


def list_images(root: Path) -> list[Path]:
    """All images under a folder, sorted.

    Raises:
        DataError: the folder does not exist or holds no image.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; --data names a folder of images")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise DataError(f"{root} holds no image; looked for {', '.join(sorted(SUFFIXES))}")
    return files


class Images(Dataset[Tensor]):
    """A folder of images as pixels (3, size, size) in [-1, 1], cropped and flipped at random.

    An item is asked for by (index, seed), so that the same item of the same step is the same pixels in every run.
    Unreadable files are replaced by the next readable one and counted in `skipped`.
    """

    def __init__(self, root: Path, size: int, min_scale: float = 1.0, flip: bool = True) -> None:
        self.files = list_images(root)
        self.size, self.min_scale, self.flip = size, min_scale, flip
        self.skipped: set[Path] = set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        index, seed = key
        for offset in range(len(self.files)):
            path = self.files[(index + offset) % len(self.files)]
            if path in self.skipped:
                continue
            try:
                image = load_image(path)
            except ImageError:
                self.skipped.add(path)
                continue
            return to_pixels([self.augment(image, random.Random(seed))], self.size)[0]
        raise DataError(f"none of the {len(self.files)} images can be read")

    def augment(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """A random square of at least `min_scale` of the shorter side, flipped half of the time."""
        if self.min_scale < 1:
            side = max(1, round(min(image.size) * rng.uniform(self.min_scale, 1)))
            x, y = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
            image = image.crop((x, y, x + side, y + side))
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class Shuffle(Sampler[tuple[int, int]]):
    """Endless (index, seed) pairs, shuffled anew every epoch, starting at any position."""

    def __init__(self, length: int, seed: int, start: int = 0) -> None:
        self.length, self.seed, self.start = length, seed, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.start
        while True:
            epoch, first = divmod(position, self.length)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            for index in torch.randperm(self.length, generator=generator)[first:].tolist():
                yield index, hash((self.seed, position))
                position += 1


def image_batches(data: Images, batch_size: int, seed: int, start: int, workers: int) -> DataLoader[Tensor]:
    """Endless batches (B, 3, size, size), as if `start` items had been drawn before."""
    sampler = Shuffle(len(data), seed, start)
    return DataLoader(data, batch_size, sampler=sampler, num_workers=workers, drop_last=True)
