"""Facts drawn at random: which scenes there are, and how often."""

from __future__ import annotations

import random

from train.mini.attachments import ATTACHMENTS, can_have, kinds_of
from train.mini.colours import COLOURS, GROUND_COLOURS
from train.mini.facts import COLOURLESS, PLACES, RELATIONS, STYLES, Facts, Thing, is_held_out
from train.mini.objects import Object, read_objects

_STYLE_SHARES = dict(zip(STYLES, (36, 13, 12, 9, 10, 10, 10), strict=True))
_PAPER = ("white", "white", "white", "beige", "light blue", "yellow", "pink")
"""Grounds of the colourless styles: dark ones would hide the lines."""
_LIKE = {"snow": "white", "sea": "blue", "sky": "blue", "night sky": "black", "desert": "orange", "meadow": "green"}
"""Colours in which a thing would hardly be seen in a place."""
_COLOURED = 0.38
"""Share of the things that are given a colour, where the style has colours; 0.23 of all scenes show one."""


def draw_facts(rng: random.Random, objects: list[Object] | None = None) -> Facts:
    """Any scene, held out or not."""
    objects = objects or list(read_objects().values())
    style = rng.choices(list(_STYLE_SHARES), list(_STYLE_SHARES.values()))[0]
    layout = rng.choices(("one", "many", "two"), (70, 10, 20))[0]
    chosen = rng.sample(objects, 2 if layout == "two" else 1)
    adorned = {"one": 0.5, "many": 0.15, "two": 0.15}[layout]
    things = [_draw_thing(chosen[0], style, adorned, rng)]
    things += [_draw_thing(other, style, 0.0, rng) for other in chosen[1:]]
    ground, second = _draw_ground(style, {thing.colour for thing in things}, rng)
    relation = rng.choice(RELATIONS) if layout == "two" else None
    count = rng.choice((2, 3)) if layout == "many" else 1
    return Facts(tuple(things), style, ground, second, count, relation)


def draw_trained_facts(rng: random.Random) -> Facts:
    """A scene that a GPT may see."""
    while is_held_out(facts := draw_facts(rng)):
        pass
    return facts


def _draw_thing(thing: Object, style: str, adorned: float, rng: random.Random) -> Thing:
    has_colour = style not in COLOURLESS and rng.random() < _COLOURED
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


def _draw_ground(style: str, taken: set[str | None], rng: random.Random) -> tuple[str, str | None]:
    """Colour or place, and a second colour of a gradient; never the colour of a thing."""
    if style in COLOURLESS:
        return rng.choice(_PAPER), None
    roll = rng.random()
    if roll < 0.17:
        return rng.choice([place for place in PLACES if _LIKE.get(place) not in taken]), None
    if roll < 0.6 and "white" not in taken:
        return "white", None
    free = [name for name in GROUND_COLOURS if name not in taken]
    first, second = rng.sample(free, 2)
    return first, second if roll > 0.9 else None
