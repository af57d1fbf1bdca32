"""Distance of generated images to the GPT's training images, which tells near copies from new images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clipgen.images.pixels import load_image, to_pixels
from train.mini.words import read_emoji, read_records

SIDE = 48
"""Side at which images are compared, px; edges that are one of 144 pixels apart still match."""
NEAR_COPY = 20.0
"""PSNR, dB, from which an image is a near copy. 17 of 20 training images are as close to their VQGAN reconstruction,
and one in seven to another training image (two clock faces, books of two colours)."""


@dataclass(frozen=True)
class Neighbour:
    """The training image nearest to an image: PSNR, dB, and what it shows."""

    psnr: float
    shows: str

    @property
    def near_copy(self) -> bool:
        """Whether the two count as the same drawing."""
        return self.psnr >= NEAR_COPY


class TrainingImages:
    """The images of data/emoji/stage2, scaled down, to find the nearest ones of generated images."""

    def __init__(self, data: Path) -> None:
        records, emoji = read_records(data / "stage2"), read_emoji(data)
        names = [" and ".join(emoji[code].name for code in r["objects"]) for r in records]
        self.shows = [f"{name}, {r['style']}, {r['background']}" for name, r in zip(names, records, strict=True)]
        self.pixels = torch.cat([_small([load_image(data / "stage2" / r["file_name"])]) for r in records])

    def nearest(self, images: Sequence[Image.Image]) -> list[Neighbour]:
        """The training image nearest to each image, by mean squared difference of the pixels."""
        squared = torch.cdist(_small(images), self.pixels).square() / self.pixels.shape[1]
        error, nearest = squared.min(1)
        psnr = -10 * torch.log10(error.clamp(min=1e-10))
        return [Neighbour(p, self.shows[i]) for p, i in zip(psnr.tolist(), nearest.tolist(), strict=True)]


def _small(images: Sequence[Image.Image]) -> Tensor:
    """Images to (N, 3 * SIDE * SIDE) float32 in [0, 1]."""
    return (to_pixels(images, SIDE).flatten(1) + 1) / 2


def summarise_originality(neighbours: Sequence[Sequence[Neighbour]]) -> dict[str, float]:
    """Median PSNR (dB) to the nearest training image and share of near copies, over the images of several prompts."""
    flat = [n for row in neighbours for n in row]
    psnr = torch.tensor([n.psnr for n in flat]).median().item()
    return {"median_psnr": psnr, "near_copies": sum(n.near_copy for n in flat) / len(flat)}
