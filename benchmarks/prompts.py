"""Prompts for the mini model, sampled from the world's lists by a seed: none is hand-picked.

A prompt is a sentence and the facts that the judge must find in an image of it. There are two sets with different
seeds: development, for use while a model is developed, and test, for measuring it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from train.mini.attachments import ATTACHMENTS, can_have, kinds_of
from train.mini.colours import COLOURS, GROUND_COLOURS
from train.mini.describe import article, describe
from train.mini.facts import (
    PLACES,
    RELATIONS,
    STYLES,
    Facts,
    Thing,
    held_out_attachment,
    held_out_colour,
    held_out_pair,
)
from train.mini.objects import Object, read_objects

SEEDS = {"development": 1_000, "test": 3_000}
KINDS = (
    *("example", "object", "word", "color held out", "color trained", "attachment held out", "attachment trained"),
    *("style", "ground", "pair held out", "pair trained", "count"),
)
_PLAIN = {"style": "3d", "ground": "white"}
_EXAMPLES = {
    "sketch of a lemon with hair": Facts((Thing("lemon", None, "hair", ("spiky", "black")),), "sketch", "white"),
    "a dog with a cigarette": Facts((Thing("dog", None, "cigarette"),), **_PLAIN),
    "a blue apple with a crown": Facts((Thing("apple", "blue", "crown"),), **_PLAIN),
    "an oil painting of a cat with glasses": Facts((Thing("cat", None, "glasses"),), "oil painting", "white"),
}
"""The project's own examples, the same in both sets; the first three are held out."""


@dataclass(frozen=True)
class Prompt:
    """A sentence, its kind, and the facts that it states."""

    kind: str
    text: str
    facts: Facts


def draw_prompts(split: str, per_kind: int, words: Mapping[str, Sequence[str]]) -> list[Prompt]:
    """Sample `per_kind` prompts of each kind, after the project's own examples.

    Args:
        split: of SEEDS.
        words: WordNet's words for the objects (`train.mini.wordnet`), of which the kind "word" is made.
    """
    found = [Prompt("example", text, facts) for text, facts in _EXAMPLES.items()]
    for kind in KINDS[1:]:
        rng = random.Random(f"{SEEDS[split]} {kind}")
        found += [_draw(kind, rng, words) for _ in range(per_kind)]
    return found


def _draw(kind: str, rng: random.Random, words: Mapping[str, Sequence[str]]) -> Prompt:
    objects = list(read_objects().values())
    thing = rng.choice(objects)
    if kind == "word":
        thing = rng.choice([thing for thing in objects if words.get(thing.name)])
        word = rng.choice(words[thing.name])
        return Prompt(kind, article(word), Facts((Thing(thing.name),), **_PLAIN))
    facts = Facts((Thing(thing.name),), **_PLAIN)
    if kind.startswith("color"):
        facts = replace(facts, things=(_coloured(objects, kind.endswith("held out"), rng),))
    elif kind.startswith("attachment"):
        facts = replace(facts, things=(_adorned(objects, kind.endswith("held out"), rng),))
    elif kind == "style":
        facts = replace(facts, style=rng.choice(STYLES))
    elif kind == "ground":
        facts = replace(facts, ground=rng.choice([*GROUND_COLOURS, *PLACES]))
    elif kind.startswith("pair"):
        two = _pair(objects, kind.endswith("held out"), rng)
        facts = replace(facts, things=two, relation=rng.choice(RELATIONS))
    elif kind == "count":
        facts = replace(facts, count=rng.choice((2, 3)))
    return Prompt(kind, describe(facts, rng), facts)


def _until(draw: Callable[[], Thing], fits: Callable[[Thing], bool]) -> Thing:
    while not fits(thing := draw()):
        pass
    return thing


def _coloured(objects: list[Object], held_out: bool, rng: random.Random) -> Thing:
    return _until(
        lambda: Thing(rng.choice(objects).name, rng.choice(list(COLOURS))),
        lambda thing: held_out_colour(thing.object, thing.colour or "") == held_out,
    )


def _adorned(objects: list[Object], held_out: bool, rng: random.Random) -> Thing:
    def draw() -> Thing:
        attachment = rng.choice(list(ATTACHMENTS))
        thing = rng.choice([thing for thing in objects if can_have(thing, attachment)])
        return Thing(thing.name, None, attachment, rng.choice(kinds_of(attachment)))

    return _until(draw, lambda thing: held_out_attachment(thing.object, thing.attachment or "") == held_out)


def _pair(objects: list[Object], held_out: bool, rng: random.Random) -> tuple[Thing, Thing]:
    while True:
        first, second = rng.sample(objects, 2)
        if held_out_pair(first.name, second.name) == held_out:
            return Thing(first.name), Thing(second.name)
