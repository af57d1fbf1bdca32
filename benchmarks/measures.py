"""Measures of mini_quality.py besides the prompts: accuracy of the judge, CLIP retrieval, VQGAN reconstruction."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from judge import Gallery, Judge, halves
from PIL import Image
from prompts import Prompt
from torch import Tensor

from clipgen.evaluation.metrics import psnr
from clipgen.images.pixels import clip_from_pixels, from_pixels, load_image, to_pixels
from clipgen.models.clip import Clip
from clipgen.models.vqgan import VQGAN
from train.losses.codes import perplexity
from train.mini.captions import COLOURS, article
from train.mini.clip_data import recall
from train.mini.emoji import centred, compose, diagonal
from train.mini.words import read_emoji, read_records

NEAREST = 5
"""An image counts as recognised when its class is among this many nearest ones."""
_LPIPS_BACKBONE = "vgg16-397923af.pth"


def read_split(data: Path, split: str) -> tuple[list[Image.Image], list[str]]:
    """Images of a split, "heldout" or "unseen", and the emoji code of each."""
    records = read_records(data / split)
    return [load_image(data / split / r["file_name"]) for r in records], [r["objects"][0] for r in records]


def rate(ranks: Sequence[int], nearest: int = NEAREST) -> float:
    """Share of ranks below `nearest`."""
    return sum(rank < nearest for rank in ranks) / max(1, len(ranks))


def half_features(judge: Judge, images: Sequence[Image.Image]) -> list[Tensor]:
    """The judge's features of the two halves of B images: two tensors (B, D)."""
    return [judge.features(part) for part in zip(*map(halves, images), strict=True)]


def pair_ranks(gallery: Gallery, sides: Sequence[Tensor], groups: Sequence[Sequence[str]]) -> list[int]:
    """Ranks of B images of two objects: the worse rank of the two halves, in the better of both orders.

    Args:
        sides: `half_features` of the images.
        groups: the right codes of each of the two objects, the same for all images.
    """
    rank = [[gallery.ranks(side, [group] * len(side)) for group in groups] for side in sides]
    straight = map(max, rank[0][0], rank[1][1])
    crossed = map(max, rank[0][1], rank[1][0])
    return list(map(min, straight, crossed))


def measure_judge(
    judge: Judge, gallery: Gallery, data: Path, prompts: Sequence[Prompt], vqgan: VQGAN
) -> dict[str, float]:
    """Share of real images that the judge recognises, the upper bound for a generator, under several conditions.

    Returns:
        `new_style`: held-out images, which are Noto renders, without their own render in the gallery, so that they are
        recognised by other artists' drawings; also on coloured backgrounds and after the VQGAN.
        `known_style`: renders of the gallery at another position, size and background colour. A generator that draws
        in the styles it was trained on is closer to this.
        `prompted_emoji`, `prompted_pairs`: the emoji of the prompts of single objects, in every style, and the pairs
        of the prompts of pairs, composed as in the GPT's training images, with equal weight per prompt. After the
        VQGAN they are the share that would be right if the GPT made no mistake. Left out if there is no such prompt.
    """
    images, codes = read_split(data, "heldout")
    right, without = [[code] for code in codes], [("noto", code) for code in codes]
    rng = random.Random(0)
    sprites = [Image.open(data / "renders" / "noto" / f"{code}.png").convert("RGBA") for code in codes]
    colours = [colour for name, colour in COLOURS.items() if name != "white"]
    side = images[0].width
    moved = judge.features([compose([sprite], rng.choice(colours), side, rng) for sprite in sprites])
    pairs = [(i, i + 1) for i in range(0, len(sprites) - 1, 2)]
    composed = [compose([sprites[i], sprites[j]], (255, 255, 255), side, rng) for i, j in pairs]
    halved = [half_features(judge, [image]) for image in composed]
    paired = [pair_ranks(gallery, x, [right[i], right[j]])[0] for x, (i, j) in zip(halved, pairs, strict=True)]
    prompted = [(i, p.groups[0]) for p in prompts if p.kind == "object" for i in gallery.of(p.groups[0])]
    rows, groups = [i for i, _ in prompted], [group for _, group in prompted]
    names = [(gallery.styles[i], gallery.codes[i]) for i in rows]
    renders = [Image.open(data / "renders" / style / f"{code}.png").convert("RGBA") for style, code in names]

    def through_vqgan(images: Sequence[Image.Image]) -> list[Image.Image]:
        return from_pixels(reconstruct(vqgan, to_pixels(images, vqgan.config.image_size))[0])

    rebuilt = judge.features(through_vqgan(images))
    found = {
        "new_style": rate(gallery.ranks(judge.features(images), right, without)),
        "new_style_on_colour": rate(gallery.ranks(moved, right, without)),
        "new_style_after_vqgan": rate(gallery.ranks(rebuilt, right, without)),
        "known_style_on_colour": rate(gallery.ranks(moved, right)),
        "known_style_pairs": rate(paired),
        "known_style_after_vqgan": rate(gallery.ranks(rebuilt, right)),
    }
    if prompted:
        after_vqgan = judge.features(through_vqgan([centred([render], side) for render in renders]))
        found["prompted_emoji_in_a_new_style"] = rate(gallery.ranks(gallery.features[rows], groups, names))
        found["prompted_emoji_after_vqgan"] = rate(gallery.ranks(after_vqgan, groups))
    prompted_pairs = [(p, compose_pairs(p, data / "renders" / "3d", side)) for p in prompts if p.kind == "pair"]
    ranks = [pair_ranks(gallery, half_features(judge, through_vqgan(x)), p.groups) for p, x in prompted_pairs if x]
    if ranks:
        found["prompted_pairs_after_vqgan"] = sum(map(rate, ranks)) / len(ranks)
    return found


def compose_pairs(prompt: Prompt, renders: Path, side: int) -> list[Image.Image]:
    """Images of the two objects of a prompt from renders: every combination that counts as right, in both orders."""
    found = []
    for codes in product(*prompt.groups):
        paths = [renders / f"{code}.png" for code in codes]
        if all(path.is_file() for path in paths):
            sprites = [Image.open(path).convert("RGBA") for path in paths]
            found += [diagonal(sprites, side), diagonal(sprites[::-1], side)]
    return found


@torch.inference_mode()
def measure_retrieval(clip: Clip, data: Path) -> dict[str, float]:
    """Text-to-image recall over the held-out images: is an image among the k nearest of its name ("a lemon")?"""
    emoji = read_emoji(data)
    images, codes = read_split(data, "heldout")
    texts = clip.encode_text([article(emoji[code].name) for code in codes])
    pixels = to_pixels(images, images[0].width)
    embeddings = torch.cat([clip.encode_image(clip_from_pixels(x, clip.image_size)) for x in pixels.split(64)])
    return recall(texts, embeddings, codes, codes) | {"images": len(codes)}


@torch.inference_mode()
def reconstruct(vqgan: VQGAN, pixels: Tensor, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Encode and decode pixels (N, 3, H, W) in [-1, 1]: pixels, clamped to [-1, 1], and tokens (N, T)."""
    out, tokens = [], []
    for x in pixels.split(batch_size):
        tokens.append(vqgan.encode_tokens(x))
        out.append(vqgan.decode_tokens(tokens[-1]).clamp(-1, 1))
    return torch.cat(out), torch.cat(tokens)


def load_lpips() -> torch.nn.Module | None:
    """LPIPS if the ImageNet weights of VGG16 are in torch's cache, else None. Downloads nothing."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_BACKBONE).is_file():
        return None
    from train.losses.stage1 import build_perceptual

    return build_perceptual("lpips")


def measure_reconstruction(vqgan: VQGAN, data: Path, train_images: int = 1000) -> dict[str, object]:
    """PSNR (dB) and LPIPS of held-out and of unseen emoji, and usage of codes over these and training images.

    Args:
        train_images: how many training images to encode for the usage of codes.
    """
    size, lpips = vqgan.config.image_size, load_lpips()
    counts = torch.zeros(vqgan.config.codebook_size)
    found: dict[str, object] = {}
    for split in ("heldout", "unseen"):
        pixels = to_pixels(read_split(data, split)[0], size)
        rebuilt, tokens = reconstruct(vqgan, pixels)
        counts += tokens.flatten().bincount(minlength=len(counts))
        found[split] = {
            "images": len(pixels),
            "psnr": psnr(rebuilt, pixels, 2).mean().item(),
            "lpips": None if lpips is None else _mean_lpips(lpips, rebuilt, pixels),
        }
    paths = sorted((data / "train").glob("*.png"))
    paths = random.Random(0).sample(paths, min(train_images, len(paths)))
    for start in range(0, len(paths), 64):
        pixels = to_pixels([load_image(path) for path in paths[start : start + 64]], size)
        with torch.inference_mode():
            counts += vqgan.encode_tokens(pixels).flatten().bincount(minlength=len(counts))
    return found | {
        "train_images": len(paths),
        "codes_used": (counts > 0).float().mean().item(),
        "perplexity": perplexity(counts).item(),
    }


@torch.inference_mode()
def _mean_lpips(lpips: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    return torch.cat([lpips(a, b).flatten() for a, b in zip(x.split(16), y.split(16), strict=True)]).mean().item()


def check_prompts(prompts: Sequence[Prompt], gallery: Gallery, data: Path) -> None:
    """Refuse prompts for emoji that the model cannot have learned.

    Raises:
        ValueError: an emoji of a prompt has no render, or was kept out of training.
    """
    unseen = {record["objects"][0] for record in read_records(data / "unseen")}
    for prompt in prompts:
        for code in (code for group in prompt.groups for code in group):
            if code not in gallery.codes or code in unseen:
                reason = "is one of the unseen emoji" if code in unseen else "has no render"
                raise ValueError(f"the prompt {prompt.text!r} asks for {code}, which {reason}; choose another one")


def emoji_names(data: Path) -> dict[str, str]:
    """Name of each emoji by code, for reports."""
    rows = (json.loads(line) for line in (data / "emoji.jsonl").read_text().splitlines())
    return {row["code"]: row["name"] for row in rows}
