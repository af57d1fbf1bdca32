"""Words for the mini CLIP: style names, background colours and sentence templates.

Only CLIP is trained on these; stages 1 and 2 are language-free.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

STYLES: dict[str, tuple[str, ...]] = {
    "3d": ("a 3d render of {}", "3d render of {}", "{}, 3d", "a glossy 3d {}"),
    "fluent": ("a glossy icon of {}", "a colorful emoji of {}", "{}, with soft gradients", "an emoji of {}"),
    "flat": ("a flat illustration of {}", "a flat icon of {}", "{}, flat design", "a simple flat drawing of {}"),
    "noto": ("a cartoon of {}", "a cartoon drawing of {}", "{}, cartoon", "an emoji of {}"),
    "twemoji": ("a simple cartoon of {}", "a clip art of {}", "{}, clip art", "an emoji of {}"),
    "line": (
        "a sketch of {}",
        "sketch of {}",
        "a black and white drawing of {}",
        "a line drawing of {}",
        "an ink drawing of {}",
        "{}, line art",
    ),
}
"""Style key -> templates that name it. The keys are also the folder names of the renders."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (225, 50, 50),
    "orange": (250, 150, 40),
    "yellow": (250, 220, 60),
    "green": (80, 175, 80),
    "blue": (50, 110, 220),
    "light blue": (160, 210, 245),
    "purple": (140, 80, 190),
    "pink": (250, 165, 200),
    "brown": (140, 95, 60),
    "gray": (150, 150, 155),
    "black": (20, 20, 22),
}
"""Background colours, RGB in [0, 255]."""

_BACKGROUNDS = ("{} on a {} background", "{} on {}", "{}, {} background", "{} in front of a {} wall")
_PAIRS = ("{} and {}", "{} with {}", "{} next to {}", "{} beside {}", "{}, {}")
_TWICE = ("two {}", "a pair of {}", "two identical {}", "2 {}")


@dataclass(frozen=True)
class Emoji:
    """One base emoji: its normalised code points, its name, its other names and keywords, and its group."""

    code: str
    name: str
    keywords: tuple[str, ...]
    group: int


def article(noun: str) -> str:
    """`noun` with its indefinite article: "a lemon", "an apple", "scissors"."""
    if noun.endswith("s") and not noun.endswith(("ss", "us")):
        return noun
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Plural of `noun` by the regular rules: "lemons", "boxes", "cherries", "scissors"."""
    if noun.endswith("s") and not noun.endswith(("ss", "us")):
        return noun
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "sh", "ch")) else f"{noun}s"


def choose_noun(emoji: Emoji, rng: random.Random) -> str:
    """A noun for the emoji: mostly its name, sometimes a keyword, sometimes both."""
    roll = rng.random()
    if roll < 0.65 or not emoji.keywords:
        return emoji.name
    keyword = rng.choice(emoji.keywords)
    return keyword if roll < 0.85 else f"{emoji.name} {keyword}"


def object_phrase(emoji: Emoji, rng: random.Random) -> str:
    """A noun for the emoji, mostly with its article."""
    noun = choose_noun(emoji, rng)
    return article(noun) if rng.random() < 0.6 else noun


def caption(objects: list[Emoji], style: str, background: str, rng: random.Random) -> str:
    """A sentence for a picture of `objects` in `style` on a `background` colour.

    The default is a glossy picture on white: that style is named half of the time and white rarely, other styles and
    backgrounds always.
    """
    if len(objects) == 1:
        phrase = object_phrase(objects[0], rng)
    elif objects[0] == objects[1]:
        phrase = rng.choice(_TWICE).format(plural(choose_noun(objects[0], rng)))
    else:
        phrase = rng.choice(_PAIRS).format(*(object_phrase(emoji, rng) for emoji in objects))
    if style != "3d" or rng.random() < 0.5:
        phrase = rng.choice(STYLES[style]).format(phrase)
    if background != "white" or rng.random() < 0.1:
        phrase = rng.choice(_BACKGROUNDS).format(phrase, background)
    return phrase
