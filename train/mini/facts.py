"""The facts of a scene, and the combinations of them that are held out from every GPT."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

STYLES = ("3d", "flat", "sketch", "line art", "oil painting", "watercolor", "pixel art")
COLOURLESS = ("sketch", "line art")
"""Styles in which things have no colour."""
RELATIONS = ("left of", "right of", "above", "below", "on")
PLACES = ("beach", "meadow", "desert", "snow", "sea", "sky", "night sky", "city")
"""Grounds other than plain colours."""


@dataclass(frozen=True)
class Thing:
    """An object as a scene shows it.

    Attributes:
        object: its name in objects.txt.
        colour: one of COLOURS, None for its natural colour.
        attachment: one of ATTACHMENTS, None for nothing.
        kind: cut and colour of hair, None for other attachments.
    """

    object: str
    colour: str | None = None
    attachment: str | None = None
    kind: tuple[str, str] | None = None


@dataclass(frozen=True)
class Facts:
    """Complete description of a scene.

    Attributes:
        things: one, or two different ones.
        count: copies of a single thing, 1 to 3.
        relation: position of the first of two things relative to the second, one of RELATIONS.
        ground: one of GROUND_COLOURS or of PLACES.
        second_ground: the colour at the bottom, if the ground is a gradient.
        style: one of STYLES.
    """

    things: tuple[Thing, ...]
    style: str
    ground: str
    second_ground: str | None = None
    count: int = 1
    relation: str | None = None


ALWAYS_HELD_OUT = {
    ("lemon", "hair"),
    ("dog", "cigarette"),
    ("apple", "crown"),
    ("apple", "blue"),
    ("lemon", "blue"),
}
"""Combinations in the project's own examples."""


@cache
def _share(*names: str) -> float:
    """A fixed hash of names as a number in [0, 1)."""
    digest = hashlib.sha256("|".join(("clipgen mini 3", *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def held_out_attachment(thing: str, attachment: str) -> bool:
    """Whether an object with an attachment is held out: a third of all."""
    return (thing, attachment) in ALWAYS_HELD_OUT or _share("attachment", thing, attachment) < 1 / 3


def held_out_colour(thing: str, colour: str) -> bool:
    """Whether an object in a colour is held out: a third of all."""
    return (thing, colour) in ALWAYS_HELD_OUT or _share("colour", thing, colour) < 1 / 3


def held_out_pair(first: str, second: str) -> bool:
    """Whether a pair of objects, in either order, is held out: a fifth of all."""
    return _share("pair", *sorted((first, second))) < 1 / 5


def is_held_out(facts: Facts) -> bool:
    """Whether a scene shows a held-out combination."""
    for thing in facts.things:
        if thing.attachment and held_out_attachment(thing.object, thing.attachment):
            return True
        if thing.colour and held_out_colour(thing.object, thing.colour):
            return True
    return len(facts.things) == 2 and held_out_pair(*(thing.object for thing in facts.things))
