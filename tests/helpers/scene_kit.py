"""A world of four objects, from renders beside the tests, also as a source for the training scripts."""

from __future__ import annotations

import random
from pathlib import Path

from train.mini.facts import Facts, is_held_out
from train.mini.objects import Object, read_objects
from train.mini.sampling import draw_facts
from train.mini.source import Scenes

RENDERS = Path(__file__).parents[1] / "golden" / "renders"
OBJECTS: list[Object] = [read_objects()[name] for name in ("lemon", "dog", "apple", "castle")]


def draw(rng: random.Random) -> Facts:
    """Sample facts with these objects only."""
    return draw_facts(rng, OBJECTS)


def draw_trained(rng: random.Random) -> Facts:
    """Sample facts with these objects, none of them held out."""
    while is_held_out(facts := draw(rng)):
        pass
    return facts


def scenes(count: str, layout_seed: int | None = None) -> Scenes:
    """A source of `count` scenes, for `--data scene_kit:scenes=COUNT`."""
    return Scenes(RENDERS, draw, seed=3, count=int(count), size=64, layout_seed=layout_seed)
