"""Facts drawn at random: which scenes there are, and how often."""

from __future__ import annotations

import random
from dataclasses import dataclass

from train.mini.attachments import ATTACHMENTS, can_have, kinds_of
from train.mini.colours import COLOURS, GROUND_COLOURS
from train.mini.facts import COLOURLESS, PLACES, RELATIONS, STYLES, Facts, Thing, is_held_out
from train.mini.objects import Object, read_objects


@dataclass(frozen=True)
class Mix:
    """How often scenes show what.

    Attributes:
        styles: relative weights of STYLES.
        layouts: of one thing, several of a thing, and two things.
        adorned: shares of first things with an attachment, in these layouts.
        coloured: share of things that are given a colour, where the style has colours.
        place, white, gradient: shares of grounds, where the style has colours; the rest are plain colours.
        white_paper: weight of white among the grounds of the colourless styles, where each other one has 1.
    """

    styles: tuple[int, ...]
    layouts: tuple[int, int, int]
    adorned: tuple[float, float, float]
    coloured: float
    place: float
    white: float
    gradient: float
    white_paper: int


FULL = Mix((36, 13, 12, 9, 10, 10, 10), (60, 16, 24), (0.5, 0.1, 0.1), 0.35, 0.15, 0.5, 0.08, 4)
"""Everything that the world has."""
PLAIN = Mix((28, 14, 13, 11, 12, 11, 11), (86, 5, 9), (0.15, 0.05, 0.05), 0.15, 0.07, 0.78, 0.03, 9)
"""Mostly a single thing as it is, on white: a GPT that knows these first learns the rest sooner."""
_LAYOUTS = ("one", "many", "two")
_PAPER = ("beige", "light blue", "yellow", "pink")
"""Grounds of the colourless styles besides white: dark ones would hide the lines."""
_LIKE = {"snow": "white", "sea": "blue", "sky": "blue", "night sky": "black", "desert": "orange", "meadow": "green"}
"""Colours in which a thing would hardly be seen in a place."""


def draw_facts(rng: random.Random, objects: list[Object] | None = None, mix: Mix = FULL) -> Facts:
    """Any scene, held out or not."""
    objects = objects or list(read_objects().values())
    style = rng.choices(STYLES, mix.styles)[0]
    layout = rng.choices(_LAYOUTS, mix.layouts)[0]
    chosen = rng.sample(objects, 2 if layout == "two" else 1)
    adorned = mix.adorned[_LAYOUTS.index(layout)]
    things = [_draw_thing(thing, style, adorned if i == 0 else 0.0, mix, rng) for i, thing in enumerate(chosen)]
    ground, second = _draw_ground(style, {thing.colour for thing in things}, mix, rng)
    relation = rng.choice(RELATIONS) if layout == "two" else None
    count = rng.choice((2, 3)) if layout == "many" else 1
    return Facts(tuple(things), style, ground, second, count, relation)


def draw_trained_facts(rng: random.Random, mix: Mix = FULL) -> Facts:
    """A scene that a GPT may see."""
    while is_held_out(facts := draw_facts(rng, mix=mix)):
        pass
    return facts


def draw_plain_facts(rng: random.Random) -> Facts:
    """A scene that a GPT may see, with little in it."""
    return draw_trained_facts(rng, PLAIN)


def _draw_thing(thing: Object, style: str, adorned: float, mix: Mix, rng: random.Random) -> Thing:
    has_colour = style not in COLOURLESS and rng.random() < mix.coloured
    colour = rng.choice(list(COLOURS)) if has_colour else None
    if rng.random() >= adorned:
        return Thing(thing.name, colour)
    # Hair comes in many cuts and colours, so there is more of it.
    fitting = [name for name in (*ATTACHMENTS, "hair", "hair") if can_have(thing, name)]
    attachment = rng.choice(fitting)
    kind = rng.choice(kinds_of(attachment))
    if kind and style in COLOURLESS:
        kind = (kind[0], "black")
    return Thing(thing.name, colour, attachment, kind)


def _draw_ground(style: str, taken: set[str | None], mix: Mix, rng: random.Random) -> tuple[str, str | None]:
    """Colour or place, and a second colour of a gradient; never the colour of a thing."""
    if style in COLOURLESS:
        return rng.choice((*["white"] * mix.white_paper, *_PAPER)), None
    roll = rng.random()
    if roll < mix.place:
        return rng.choice([place for place in PLACES if _LIKE.get(place) not in taken]), None
    if roll < mix.place + mix.white and "white" not in taken:
        return "white", None
    first, second = rng.sample([name for name in GROUND_COLOURS if name not in taken], 2)
    return first, second if roll > 1 - mix.gradient else None
