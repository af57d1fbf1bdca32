"""What the judge makes of the pictures of one prompt, and the shares of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from judge import Gallery, Judge, border_colour
from measures import half_features, pair_ranks, rate
from originality import Neighbour, TrainingPictures, summarise_originality
from PIL import Image
from prompts import KINDS, Prompt
from torch import Tensor

from train.mini.captions import COLOURS

LINE_ART_CHROMA = 0.06
"""Mean difference of a pixel's largest and smallest channel, of 1, below which a picture is black and white."""


@dataclass(frozen=True)
class Drawn:
    """One prompt's pictures, best first, with CLIP's scores, the right class's ranks and, where asked, their look."""

    prompt: Prompt
    images: list[Image.Image]
    scores: list[float]
    ranks: list[int]
    nearest: list[str]
    """The judge's nearest class of each picture, of a pair's picture those of its halves."""
    look: list[bool] | None
    """Whether each picture has the background colour or the black lines that the prompt asks for."""
    neighbours: list[Neighbour]
    """Each picture's nearest training picture."""


def assess(
    judge: Judge,
    gallery: Gallery,
    training: TrainingPictures,
    prompt: Prompt,
    images: list[Image.Image],
    scores: list[float],
    names: dict[str, str],
) -> Drawn:
    """Judge the pictures of one prompt."""

    def taken_for(features: Tensor) -> list[str]:
        similarity, classes = gallery.similarities(features)
        return [names.get(classes[i], classes[i]) for i in similarity.argmax(1).tolist()]

    if prompt.kind == "pair":
        sides = half_features(judge, images)
        ranks = pair_ranks(gallery, sides, prompt.groups)
        nearest = [" and ".join(both) for both in zip(*map(taken_for, sides), strict=True)]
    else:
        features = judge.features(images)
        ranks, nearest = gallery.ranks(features, [prompt.groups[0]] * len(images)), taken_for(features)
    return Drawn(prompt, images, scores, ranks, nearest, check_look(prompt, images), training.nearest(images))


def check_look(prompt: Prompt, images: Sequence[Image.Image]) -> list[bool] | None:
    """Black lines where they were asked for, or the asked background; None where the prompt asks for neither."""
    if prompt.line_art:
        return [chroma(image) < LINE_ART_CHROMA for image in images]
    if prompt.background:
        return [background_name(image) == prompt.background for image in images]
    return None


def chroma(image: Image.Image) -> float:
    """Mean difference of the largest and the smallest channel, in [0, 1]: 0 for grey pictures."""
    x = np.asarray(image.convert("RGB")).astype(np.float32) / 255
    return float((x.max(2) - x.min(2)).mean())


def background_name(image: Image.Image) -> str | None:
    """Name of the nearest of the training's background colours; None when the border has no one colour."""
    colour, share = border_colour(image)
    if share < 0.5:
        return None
    return min(COLOURS, key=lambda name: float(np.square(colour - np.array(COLOURS[name])).sum()))


def summarise(drawn: Sequence[Drawn]) -> dict[str, dict[str, float]]:
    """By kind: share of right pictures (`images`), of right best-scored pictures (`best`), of prompts with any."""
    table = {}
    for kind in (*KINDS, "all"):
        rows = [d for d in drawn if kind in (d.prompt.kind, "all")]
        if not rows:
            continue
        table[kind] = {
            "prompts": len(rows),
            "images": rate([rank for d in rows for rank in d.ranks]),
            "nearest": rate([rank for d in rows for rank in d.ranks], nearest=1),
            "best": rate([d.ranks[0] for d in rows]),
            "any": rate([min(d.ranks) for d in rows]),
            **summarise_originality([d.neighbours for d in rows]),
        }
        looks = [look for d in rows if d.look for look in d.look]
        if looks and kind != "all":
            table[kind]["look"] = sum(looks) / len(looks)
    return table
