"""Sentences for scenes, in varied wordings. Used only to train CLIP."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from train.mini.facts import PLACES, Facts, Thing
from train.mini.objects import read_objects

Words = Mapping[str, Sequence[str]]
"""Object -> words for it or for kinds of it."""
NO_WORDS: Words = {}

STYLES: dict[str, tuple[str, ...]] = {
    "3d": ("a 3d render of {}", "{}, 3d", "a glossy 3d {}", "a 3d model of {}"),
    "flat": (
        "a flat illustration of {}",
        "a flat icon of {}",
        "{}, flat design",
        "a cartoon of {}",
        "a clip art of {}",
    ),
    "sketch": ("a sketch of {}", "sketch of {}", "a pencil sketch of {}", "a pencil drawing of {}", "a drawing of {}"),
    "line art": ("line art of {}", "{}, line art", "an ink drawing of {}", "a line drawing of {}", "an outline of {}"),
    "oil painting": ("an oil painting of {}", "oil painting of {}", "a painting of {}", "{}, oil on canvas"),
    "watercolor": ("a watercolor of {}", "a watercolor painting of {}", "{}, watercolour", "{} in watercolor"),
    "pixel art": ("pixel art of {}", "{}, pixel art", "an 8-bit {}", "a pixelated {}", "{}, 8-bit"),
}
"""Style -> templates that name it."""

_GROUNDS = ("{} on a {} background", "{} on {}", "{}, {} background", "{} against a {} wall")
_GRADIENTS = ("{} on a gradient from {} to {}", "{} on a {} and {} gradient", "{}, {} to {} gradient background")
_PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on a beach", "at the beach", "on the sand by the sea"),
    "meadow": ("in a meadow", "on a green field", "on the grass", "in the grass"),
    "desert": ("in the desert", "in a desert", "among sand dunes"),
    "snow": ("in the snow", "in winter", "on a snowy day"),
    "sea": ("under water", "underwater", "in the sea", "at the bottom of the ocean"),
    "sky": ("in the sky", "in a blue sky with clouds", "among the clouds"),
    "night sky": ("in the night sky", "at night under the stars", "in space", "in outer space"),
    "city": ("in a city", "in the city", "in front of skyscrapers", "on a street"),
}
_RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": (
        "{a} to the left of {b}",
        "{a} left of {b}",
        "{b} to the right of {a}",
        "{a} on the left, {b} on the right",
    ),
    "right of": (
        "{a} to the right of {b}",
        "{a} right of {b}",
        "{b} to the left of {a}",
        "{b} on the left, {a} on the right",
    ),
    "above": ("{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}"),
    "below": ("{a} below {b}", "{a} under {b}", "{a} beneath {b}", "{b} above {a}"),
    "on": ("{a} on {b}", "{a} on top of {b}", "{a} standing on {b}", "{a} sitting on {b}"),
}
_BESIDE = ("{a} next to {b}", "{a} beside {b}", "{a} and {b}", "{a} with {b}", "{a} by the side of {b}")
"""Templates for two things side by side, in either order."""
_NUMBERS: dict[int, tuple[str, ...]] = {
    2: ("two {}", "2 {}", "a pair of {}"),
    3: ("three {}", "3 {}", "a group of three {}"),
}

_ATTACHED: dict[str, tuple[str, ...]] = {
    "hair": ("hair", "a hairdo", "a wig"),
    "face": ("a face", "a smiling face", "a smile", "eyes and a mouth"),
    "glasses": ("glasses", "spectacles", "eyeglasses"),
    "sunglasses": ("sunglasses", "shades", "dark glasses"),
    "top hat": ("a top hat", "a black hat"),
    "cowboy hat": ("a cowboy hat", "a western hat"),
    "cap": ("a cap", "a baseball cap"),
    "crown": ("a crown", "a golden crown"),
    "party hat": ("a party hat", "a birthday hat"),
    "santa hat": ("a santa hat", "a christmas hat"),
    "horns": ("horns", "devil horns"),
    "halo": ("a halo", "an angel's halo"),
    "bow": ("a bow", "a ribbon", "a red bow"),
    "moustache": ("a moustache", "a mustache"),
    "beard": ("a beard", "a full beard"),
    "headphones": ("headphones", "a headset"),
    "cigarette": ("a cigarette", "a cigarette in its mouth"),
    "wings": ("wings", "angel wings"),
}
_GROWN = ("hair", "face", "horns", "moustache", "beard", "wings")
"""Attachments that things have; the others are worn, except the cigarette."""
_ADJECTIVES = {
    "hair": "hairy",
    "face": "smiling",
    "glasses": "bespectacled",
    "horns": "horned",
    "moustache": "mustachioed",
    "beard": "bearded",
    "cigarette": "smoking",
    "wings": "winged",
    "crown": "crowned",
}
_NATURAL_HAIR = ("brown", "black", "blond", "red")


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


def describe(facts: Facts, rng: random.Random, words: Words = NO_WORDS) -> str:
    """A sentence that describes a scene.

    The default style, 3D, and the default ground, white, are mostly left out. Everything else is always mentioned,
    except the cut of hair and its usual colours.

    Args:
        words: more words for objects, such as those of WordNet (`train.mini.wordnet`).
    """
    phrase = _things(facts, rng, words)
    styled = facts.style != "3d" or rng.random() < 0.3
    if styled and rng.random() < 0.5:
        phrase = _styled(phrase, facts.style, rng)
        styled = False
    phrase = _grounded(phrase, facts, rng)
    return _styled(phrase, facts.style, rng) if styled else phrase


def _styled(phrase: str, style: str, rng: random.Random) -> str:
    template = rng.choice(STYLES[style])
    if " {}" in template and template.split(" {}")[0].split()[-1] not in ("of",):  # "a pixelated {}"
        phrase = phrase.removeprefix("an ").removeprefix("a ")
    return template.format(phrase)


def _grounded(phrase: str, facts: Facts, rng: random.Random) -> str:
    if facts.ground in PLACES:
        return f"{phrase} {rng.choice(_PLACES[facts.ground])}"
    if facts.second_ground:
        return rng.choice(_GRADIENTS).format(phrase, facts.ground, facts.second_ground)
    if facts.ground == "white" and rng.random() > 0.1:
        return phrase
    return rng.choice(_GROUNDS).format(phrase, facts.ground)


def _things(facts: Facts, rng: random.Random, words: Words) -> str:
    if facts.relation:
        a, b = (_one(thing, rng, words) for thing in facts.things)
        if facts.relation in ("left of", "right of") and rng.random() < 0.4:
            a, b = rng.sample((a, b), 2)
            return rng.choice(_BESIDE).format(a=a, b=b)
        return rng.choice(_RELATIONS[facts.relation]).format(a=a, b=b)
    if facts.count > 1:
        before, name, after = _parts(facts.things[0], rng, words)
        return rng.choice(_NUMBERS[facts.count]).format(before + plural(name)) + after
    return _one(facts.things[0], rng, words)


def _one(thing: Thing, rng: random.Random, words: Words) -> str:
    before, name, after = _parts(thing, rng, words)
    noun = before + name
    return (article(noun) if rng.random() < 0.85 else noun) + after


def _parts(thing: Thing, rng: random.Random, words: Words) -> tuple[str, str, str]:
    """The words before the name, the name, and the words after it."""
    names = read_objects()[thing.object].names
    name = names[0] if rng.random() < 0.7 else rng.choice(names)
    if (others := words.get(thing.object)) and rng.random() < 0.35:
        name = rng.choice(others)
    before, after = "", ""
    if thing.attachment:
        before, after = _attachment(thing.attachment, thing.kind, rng)
    if thing.colour:
        colour = {"gray": rng.choice(("gray", "grey"))}.get(thing.colour, thing.colour)
        if rng.random() < 0.88:
            before = f"{before}{colour} " if rng.random() < 0.5 else f"{colour} {before}"
        else:
            after = f" that is {colour}{' and has' + after[5:] if after.startswith(' with') else after}"
    return before, name, after


def _attachment(attachment: str, kind: tuple[str, str] | None, rng: random.Random) -> tuple[str, str]:
    """Either an adjective with a trailing space, or the words after the name."""
    said = rng.choice(_ATTACHED[attachment]) if rng.random() < 0.5 else _ATTACHED[attachment][0]
    adjective = _ADJECTIVES.get(attachment)
    if kind is not None:
        cut, colour = kind
        words = []
        if rng.random() < 0.45:
            words.append(cut)
        if colour not in _NATURAL_HAIR or rng.random() < 0.5:
            words.append(colour if colour != "blond" else rng.choice(("blond", "blonde")))
        if words and rng.random() < 0.2:
            return f"{words[-1]}-haired ", ""
        if words:
            adjective = None
            said = f"{'a ' if said.startswith('a ') else ''}{' '.join(words)} {said.removeprefix('a ')}"
    if adjective and rng.random() < 0.2:
        return f"{adjective} ", ""
    if attachment == "cigarette":
        verb = rng.choice(("with", "with", "smoking"))
        return "", f" {verb} {said if verb == 'with' else 'a cigarette'}"
    worn = () if attachment in _GROWN else ("wearing", "wearing", "in")
    return "", f" {rng.choice(('with', 'with', 'with', 'that has', 'having', *worn))} {said}"
