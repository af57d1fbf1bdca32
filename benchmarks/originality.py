"""How far the drawn pictures are from those the GPT was trained on: is it drawing, or copying?"""

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
"""Side at which pictures are compared, px: edges that differ by a pixel of 144 are still the same drawing."""
NEAR_COPY = 20.0
"""PSNR, dB, from which a picture is a near copy: 17 of 20 training pictures are as close to what the VQGAN makes
of them, and one of seven to another training picture (two clock faces, books of two colours)."""


@dataclass(frozen=True)
class Neighbour:
    """A picture's nearest training picture: how near, and what it shows."""

    psnr: float
    shows: str

    @property
    def near_copy(self) -> bool:
        """Whether a person would call the two the same drawing."""
        return self.psnr >= NEAR_COPY


class TrainingPictures:
    """The pictures of data/emoji/stage2, small, to find a drawing's nearest among them."""

    def __init__(self, data: Path) -> None:
        records, emoji = read_records(data / "stage2"), read_emoji(data)
        names = [" and ".join(emoji[code].name for code in r["objects"]) for r in records]
        self.shows = [f"{name}, {r['style']}, {r['background']}" for name, r in zip(names, records, strict=True)]
        self.pixels = torch.cat([_small([load_image(data / "stage2" / r["file_name"])]) for r in records])

    def nearest(self, images: Sequence[Image.Image]) -> list[Neighbour]:
        """The training picture nearest to each image, by the mean square difference of the pixels."""
        squared = torch.cdist(_small(images), self.pixels).square() / self.pixels.shape[1]
        error, place = squared.min(1)
        psnr = -10 * torch.log10(error.clamp(min=1e-10))
        return [Neighbour(p, self.shows[i]) for p, i in zip(psnr.tolist(), place.tolist(), strict=True)]


def _small(images: Sequence[Image.Image]) -> Tensor:
    """Images to (N, 3 * SIDE * SIDE) float32 in [0, 1]."""
    return (to_pixels(images, SIDE).flatten(1) + 1) / 2


def summarise_originality(neighbours: Sequence[Sequence[Neighbour]]) -> dict[str, float]:
    """Over the pictures of several prompts: median PSNR (dB) to the nearest training picture, share of near copies."""
    flat = [n for row in neighbours for n in row]
    psnr = torch.tensor([n.psnr for n in flat]).median().item()
    return {"median_psnr": psnr, "near_copies": sum(n.near_copy for n in flat) / len(flat)}
