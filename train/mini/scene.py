"""Facts -> pixels: the same facts and seed give the same image, composed in a few milliseconds.

A figure is a thing with what is on it: layers about the middle of its face. Figures are put in places of the frame, on
a ground, and the style is painted over all.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from train.mini import styles
from train.mini.attachments import ATTACHMENTS, draw_variants
from train.mini.colours import Bytes, Floats, floats, recolour
from train.mini.facts import COLOURLESS, Facts, Thing
from train.mini.grounds import draw_ground
from train.mini.objects import read_objects
from train.mini.sprites import Anchors, find_anchors, load_render, premultiply, trim

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
_FLAT_STYLES = ("flat", "line art", "pixel art")
"""Styles that are painted over the flat renders; the others are over the 3D ones."""

# What keeps its size and moves by whole patches keeps its tokens, so the GPT learns a thing once and not anew at every
# pixel, size and angle. Hence figures stand upright, in two sizes, and with what is on them on the tokenizer's grid.
_LARGE, _SMALL = 0.64, 0.4
"""Longer side of a thing that is alone, and of one of several, as a share of the frame's."""
_RADIUS_STEP = 4
"""Pixels between two sizes of an attachment, as radii of the face it is for."""
_SHRINK, _SHRINKS = 0.84, 8
"""What a thing's size is multiplied by while what is on it does not fit in the slot, and how often at most."""
_FARTHEST = 8
"""Pixels that a figure stands at most from the middle of its slot, before it is moved to the grid."""
_LEAST_CONTRAST = 0.14
"""Difference of the mean colours of a figure and its ground, of 1, below which the ground gives way."""


@dataclass(frozen=True)
class Layer:
    """A sprite and where it is in a figure: premultiplied RGBA, a scale, and its left top corner.

    The corner is in px of the frame; of a sprite that is in no figure yet, in px of its render.
    """

    image: Bytes
    scale: float
    left: float
    top: float

    @property
    def box(self) -> Box:
        height, width = self.image.shape[:2]
        return self.left, self.top, self.left + self.scale * width, self.top + self.scale * height


@dataclass(frozen=True)
class Figure:
    """Layers from back to front, and the box that holds them all; the middle of the face is at 0, 0."""

    layers: list[Layer]
    box: Box


@dataclass(frozen=True)
class Cover:
    """A layer in the frame: where it is, and premultiplied RGBA floats (height, width, 4) in [0, 1]."""

    rows: slice
    columns: slice
    image: Floats

    def blend(self, frame: Floats, alpha: Floats) -> None:
        """Lay it over a frame (S, S, 3) and its alpha (S, S), in place."""
        rest = 1 - self.image[..., 3:]
        under, hidden = frame[self.rows, self.columns], alpha[self.rows, self.columns]
        under *= rest
        under += self.image[..., :3]
        hidden *= rest[..., 0]
        hidden += self.image[..., 3]


@dataclass(frozen=True)
class Slot:
    """A part of the frame for a figure, in [0, 1]: its centre, its size, and the longer side of the thing there."""

    x: float
    y: float
    width: float
    height: float
    side: float = _SMALL


class Composer:
    """The world's images, from the renders in a folder. Sprites are read once and kept."""

    def __init__(self, renders: Path, size: int = 128) -> None:
        """Args: renders: folder of STYLE/CODE.png, as `train.mini.renders` writes it; size: side of the images, px."""
        self.renders, self.size = renders, size
        self._render = lru_cache(maxsize=None)(self._read_render)
        self._sprite = lru_cache(maxsize=4096)(self._make_sprite)
        self._bank = lru_cache(maxsize=None)(self._read_bank)

    def compose(self, facts: Facts, seed: int) -> Bytes:
        """An image, RGB (size, size, 3); the seed decides all that the facts leave open."""
        rng = random.Random(seed)
        base = "flat" if facts.style in _FLAT_STYLES else "3d"
        slots = _slots(facts, rng)
        things = [thing for thing in facts.things for _ in range(facts.count)]
        figures = [self._figure(thing, base, slot, rng) for thing, slot in zip(things, slots, strict=True)]
        if facts.relation == "on":
            figures, slots = figures[::-1], slots[::-1]  # what stands on something hides its edge
        colourless = facts.style in COLOURLESS
        ground = draw_ground(facts.ground, facts.second_ground, self.size, rng)
        covers = [
            cover for figure, slot in zip(figures, slots, strict=True) for cover in self._place(figure, slot, rng)
        ]
        if facts.ground != "white" and not colourless:
            ground = _set_apart(ground, covers)
        frame = np.ones_like(ground) if colourless else ground.copy()
        alpha = np.zeros(frame.shape[:2], np.float32)
        for cover in covers:
            cover.blend(frame, alpha)
        painted = _paint(facts.style, frame, alpha, ground[0, 0])
        return (np.clip(painted, 0, 1) * 255 + 0.5).astype(np.uint8)

    def _figure(self, thing: Thing, base: str, slot: Slot, rng: random.Random) -> Figure:
        """A thing as large as its slot asks, or less if what is on it would not fit."""
        sprite, image = self._sprite(base, thing.object, thing.colour), None
        if thing.attachment is not None:
            bank = self._bank(base, thing.attachment, thing.kind)
            image = bank[rng.randrange(len(bank))]
        anchors = self._render(base, thing.object)[1]
        left, top, right, bottom = anchors.box
        scale = self.size * slot.side / max(right - left, bottom - top)
        room_x, room_y = self._room(slot)
        for _ in range(_SHRINKS):
            x, y = (scale * place for place in anchors.face)
            layers = [Layer(sprite.image, scale, scale * sprite.left - x, scale * sprite.top - y)]
            if image is not None and thing.attachment is not None:
                layer = _attach(image, thing.attachment, anchors, scale)
                layers.insert(0 if ATTACHMENTS[thing.attachment].behind else 1, layer)
            box = _union([layer.box for layer in layers])
            if box[2] - box[0] <= room_x and box[3] - box[1] <= room_y:
                break
            scale *= _SHRINK
        return Figure(layers, box)

    def _place(self, figure: Figure, slot: Slot, rng: random.Random) -> list[Cover]:
        """The layers of a figure in the frame."""
        left, top, right, bottom = figure.box
        room_x, room_y = self._room(slot)
        x = self.size * slot.x - (left + right) / 2 + rng.uniform(-1, 1) * min((room_x - right + left) / 2, _FARTHEST)
        y = self.size * slot.y - (top + bottom) / 2 + rng.uniform(-1, 1) * min((room_y - bottom + top) / 2, _FARTHEST)
        x, y = (round(place / styles.PATCH) * styles.PATCH for place in (x, y))
        return [self._warp(layer.image, layer.scale, x + layer.left, y + layer.top) for layer in figure.layers]

    def _room(self, slot: Slot) -> tuple[float, float]:
        """Width and height in px that a figure may have in a slot: the grid takes half a patch on each side."""
        return self.size * slot.width - styles.PATCH, self.size * slot.height - styles.PATCH

    def _warp(self, image: Bytes, scale: float, left: float, top: float) -> Cover:
        """A layer scaled and moved to a place in the frame; only where it comes to lie."""
        if scale < 0.6:  # halved first: nothing is skipped between its pixels
            image, scale = _halved(image), 2 * scale
        height, width = image.shape[:2]
        first = np.clip(np.floor([left, top]) - 1, 0, self.size - 1).astype(int)
        last = np.ceil([left + scale * width, top + scale * height]) + 1
        last = np.clip(last, first + 1, self.size).astype(int)
        move = np.array([[scale, 0, left - first[0]], [0, scale, top - first[1]]], np.float32)
        side = (int(last[0] - first[0]), int(last[1] - first[1]))
        moved = floats(cv2.warpAffine(image, move, side, flags=cv2.INTER_LINEAR))
        return Cover(slice(first[1], last[1]), slice(first[0], last[0]), moved * np.float32(1 / 255))

    def _read_render(self, base: str, name: str) -> tuple[Bytes, Anchors]:
        image = load_render(self.renders, base, read_objects()[name].code)
        return image, find_anchors(image[..., 3])

    def _make_sprite(self, base: str, name: str, colour: str | None) -> Layer:
        image = self._render(base, name)[0]
        left, top, width, height = cv2.boundingRect(image[..., 3])
        image = np.ascontiguousarray(image[top : top + height, left : left + width])
        return Layer(premultiply(recolour(image, colour) if colour else image), 1.0, left, top)

    def _read_bank(self, base: str, attachment: str, kind: tuple[str, str] | None) -> list[Bytes]:
        source = ATTACHMENTS[attachment].source
        if isinstance(source, str):
            return [premultiply(trim(load_render(self.renders, base, source)))]
        return [premultiply(trim(image)) for image in draw_variants(attachment, kind)]


def _halved(image: Bytes) -> Bytes:
    height, width = image.shape[:2]
    half = cv2.resize(image, (max(1, width // 2), max(1, height // 2)), interpolation=cv2.INTER_AREA)
    return half.astype(np.uint8, copy=False)


def _union(boxes: list[Box]) -> Box:
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _attach(image: Bytes, attachment: str, anchors: Anchors, scale: float) -> Layer:
    """Where an attachment goes on a thing with such anchors, drawn at such a scale."""
    how = ATTACHMENTS[attachment]
    height, width = image.shape[:2]
    radius = max(1, round(anchors.radius * scale / _RADIUS_STEP)) * _RADIUS_STEP
    own = how.width * radius / width
    y = how.down * radius
    if how.at == "top":  # rather lower than higher: a gap would show
        y += np.ceil((anchors.top - anchors.face[1]) * scale / styles.PATCH - 0.25) * styles.PATCH
    return Layer(image, own, how.right * radius - own * width / 2, y - own * height / 2)


def _set_apart(ground: Floats, covers: list[Cover]) -> Floats:
    """The ground a little darker or lighter where a figure of about its colour would be lost on it."""
    behind = np.array(cv2.mean(ground)[:3])
    for cover in covers:
        *total, area = cv2.sumElems(cover.image)
        colour = np.array(total) / max(area, 1.0)
        if float(np.abs(colour - behind).max()) < _LEAST_CONTRAST:
            return floats(ground * 0.86 if behind.mean() > 0.35 else ground + 0.14 * (1 - ground))
    return ground


def _slots(facts: Facts, rng: random.Random) -> list[Slot]:
    """Where the figures go, in the order of the things."""
    if facts.relation is not None:
        return _pair_slots(facts.relation)
    if facts.count == 1:
        return [Slot(0.5, 0.5, 1.0, 1.0, _LARGE)]
    if facts.count == 2:
        return [Slot(x, 0.5, 0.48, 0.62) for x in (0.26, 0.74)]
    up: tuple[float, ...] = (0.5,)
    down: tuple[float, ...] = (0.26, 0.74)
    if rng.random() < 0.5:
        up, down = down, up
    return [Slot(x, y, 0.44, 0.42) for y, row in ((0.26, up), (0.74, down)) for x in row]


def _pair_slots(relation: str) -> list[Slot]:
    left, right = Slot(0.26, 0.5, 0.48, 0.62), Slot(0.74, 0.5, 0.48, 0.62)
    upper, lower = Slot(0.5, 0.26, 0.7, 0.47), Slot(0.5, 0.74, 0.7, 0.47)
    if relation == "on":  # close together
        return [Slot(0.5, 0.28, 0.7, 0.5), Slot(0.5, 0.68, 0.7, 0.5)]
    return {
        "left of": [left, right],
        "right of": [right, left],
        "above": [upper, lower],
        "below": [lower, upper],
    }[relation]


def _paint(style: str, frame: Floats, alpha: Floats, paper: Floats) -> Floats:
    if style == "sketch":
        return styles.sketch(frame, paper)
    if style == "line art":
        return styles.line_art(frame, alpha, paper)
    if style == "oil painting":
        return styles.oil_painting(frame)
    if style == "watercolor":
        return styles.watercolor(frame, alpha)
    return styles.pixel_art(frame, alpha) if style == "pixel art" else frame
