"""The world's scenes as a source of images for the training scripts, like a folder or shards (`--data`).

    python train/stage1.py --data train.mini.source:all_scenes=data/emoji ...
    python train/stage2.py --data train.mini.source:trained_scenes=data/emoji ...

Nothing is stored: scene number i is composed anew whenever it is asked for, from i alone.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import cv2

from train.mini.colours import Bytes
from train.mini.facts import Facts
from train.mini.sampling import draw_facts, draw_plain_facts, draw_trained_facts
from train.mini.scene import Composer

SCENES = 2_000_000
"""Scenes of a source: more than a training looks at."""
SIZE = 128
"""Side of a scene, px."""


class _Numbered(Sequence[str]):
    """The names of scenes, made when they are asked for."""

    def __init__(self, length: int) -> None:
        self._rows = range(length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:  # type: ignore[override] # nobody takes a slice
        return f"scene {self._rows[index]}"


@lru_cache(maxsize=4)
def _composer(renders: Path, size: int) -> Composer:
    """A composer that the sources of a process share: its sprites are read and recoloured once."""
    return Composer(renders, size)


class Scenes:
    """Numbered scenes (`clipgen.images.sources.Source`), each a pure function of its number and the source's seeds."""

    def __init__(
        self,
        renders: Path,
        draw: Callable[[random.Random], Facts],
        seed: int = 0,
        count: int = SCENES,
        size: int = SIZE,
        layout_seed: int | None = None,
    ) -> None:
        """Open the renders.

        Args:
            renders: folder of them, as `train.mini.renders` writes it.
            draw: draws the facts of a scene.
            seed: of the facts.
            count: number of scenes.
            size: side of an image, px.
            layout_seed: of places, sizes and whatever else is not a fact; by default `seed`.
        """
        self.names: Sequence[str] = _Numbered(count)
        self.unused = Counter[str]()
        self.draw, self.seed = draw, seed
        self.layout_seed = seed if layout_seed is None else layout_seed
        self.renders, self.size = renders, size

    @property
    def composer(self) -> Composer:
        """The process's composer: not an attribute, since its caches cannot be sent to worker processes."""
        return _composer(self.renders, self.size)

    def facts(self, index: int) -> Facts:
        """What a scene shows."""
        return self.draw(random.Random(f"{self.seed} {index}"))

    def image(self, index: int) -> Bytes:
        """A scene, RGB (size, size, 3)."""
        return self.composer.compose(self.facts(index), hash((self.layout_seed, index)))

    def read(self, index: int) -> bytes:
        """A scene as a file, of the kind that is quickest to write and to read."""
        image = cv2.cvtColor(self.image(index), cv2.COLOR_RGB2BGR)
        return cv2.imencode(".bmp", image)[1].tobytes()

    def fingerprint(self) -> str:
        """SHA-256 of the seed, the number of scenes and the first sixteen of them."""
        digest = hashlib.sha256(f"{self.seed} {len(self.names)}".encode())
        for index in range(min(16, len(self.names))):
            digest.update(self.read(index))
        return digest.hexdigest()


def all_scenes(data: str) -> Scenes:
    """Scenes with every combination, for the VQGAN and the CLIP; data: the folder that `make renders` fills."""
    return Scenes(Path(data) / "renders", draw_facts, seed=1)


def trained_scenes(data: str) -> Scenes:
    """Scenes without held-out combinations: what the GPT may see; data: as above."""
    return Scenes(Path(data) / "renders", draw_trained_facts, seed=2)


def plain_scenes(data: str) -> Scenes:
    """Trained scenes with little in them, for the GPT's first part; data: as above."""
    return Scenes(Path(data) / "renders", draw_plain_facts, seed=4)


def seen_plain_scenes(data: str) -> Scenes:
    """The scenes of `plain_scenes`, each in another layout, as for `seen_scenes`; data: as above."""
    return Scenes(Path(data) / "renders", draw_plain_facts, seed=4, layout_seed=5)


def seen_scenes(data: str) -> Scenes:
    """The scenes of `trained_scenes`, each in another layout: what CLIP sees of them; data: as above.

    A sentence says what a scene shows and not where, so the GPT learns from embeddings that do not say it either.
    """
    return Scenes(Path(data) / "renders", draw_trained_facts, seed=2, layout_seed=3)
