"""Verdicts of the judge on the images of one prompt, and summaries over all prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from judge import Gallery, Judge, border_colour
from measures import half_features, pair_ranks, rate
from originality import Neighbour, TrainingImages, summarise_originality
from PIL import Image
from prompts import KINDS, Prompt
from torch import Tensor

from train.mini.captions import COLOURS

LINE_ART_CHROMA = 0.06
"""Chroma (see `chroma`) below which an image counts as black and white."""


@dataclass(frozen=True)
class Drawn:
    """The images of one prompt, best by CLIP first, and their assessment.

    Attributes:
        scores: CLIP scores.
        ranks: the judge's rank of the right class, 0 for the nearest.
        nearest: the judge's nearest class; of an image of a pair, those of its halves.
        look: whether the image has the background colour or black lines of the prompt; None if it names neither.
        neighbours: the nearest training image.
    """

    prompt: Prompt
    images: list[Image.Image]
    scores: list[float]
    ranks: list[int]
    nearest: list[str]
    look: list[bool] | None
    neighbours: list[Neighbour]


def assess(
    judge: Judge,
    gallery: Gallery,
    training: TrainingImages,
    prompt: Prompt,
    images: list[Image.Image],
    scores: list[float],
    names: dict[str, str],
) -> Drawn:
    """Assess the images of one prompt.

    Args:
        names: emoji names by code, for the report.
    """

    def nearest_names(features: Tensor) -> list[str]:
        similarity, classes = gallery.similarities(features)
        return [names.get(classes[i], classes[i]) for i in similarity.argmax(1).tolist()]

    if prompt.kind == "pair":
        sides = half_features(judge, images)
        ranks = pair_ranks(gallery, sides, prompt.groups)
        nearest = [" and ".join(both) for both in zip(*map(nearest_names, sides), strict=True)]
    else:
        features = judge.features(images)
        ranks, nearest = gallery.ranks(features, [prompt.groups[0]] * len(images)), nearest_names(features)
    return Drawn(prompt, images, scores, ranks, nearest, check_look(prompt, images), training.nearest(images))


def check_look(prompt: Prompt, images: Sequence[Image.Image]) -> list[bool] | None:
    """Whether each image has the black lines or the background of its prompt; None if the prompt names neither."""
    if prompt.line_art:
        return [chroma(image) < LINE_ART_CHROMA for image in images]
    if prompt.background:
        return [background_name(image) == prompt.background for image in images]
    return None


def chroma(image: Image.Image) -> float:
    """Mean difference of the largest and the smallest channel of a pixel, in [0, 1]; 0 for grey images."""
    x = np.asarray(image.convert("RGB")).astype(np.float32) / 255
    return float((x.max(2) - x.min(2)).mean())


def background_name(image: Image.Image) -> str | None:
    """Name of the nearest background colour of the training images; None if the border is not uniform."""
    colour, share = border_colour(image)
    if share < 0.5:
        return None
    return min(COLOURS, key=lambda name: float(np.square(colour - np.array(COLOURS[name])).sum()))


def summarise(drawn: Sequence[Drawn]) -> dict[str, dict[str, float]]:
    """Shares by kind of prompt: of right images, of right best-scored ones (`best`), of prompts with a right image."""
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
