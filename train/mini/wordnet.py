"""Other words for the world's objects: the hyponyms that WordNet knows, "beagle" of a dog, "schooner" of a sailboat."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clipgen.errors import DataError
from train.mini.objects import Object

CONCRETE = {"05", "06", "08", "13", "17", "19", "20", "25"}
"""Lexicographer files of what can be drawn: animal, artifact, body, food, object, phenomenon, plant, shape."""


@dataclass(frozen=True)
class _Synset:
    """Words of one meaning, and the offsets of narrower meanings."""

    file: str
    words: tuple[str, ...]
    narrower: tuple[str, ...]


def narrower_words(folder: Path, objects: Iterable[Object]) -> dict[str, tuple[str, ...]]:
    """For each object the words of WordNet for it or for some kind of it, without its own names.

    A word's meaning is its commonest concrete one. A word that fits several objects belongs to the one it is fewest
    steps away from: "palm" to the palm tree, not to the tree; with equally many, to none.

    Args:
        folder: of WordNet 3.0's database (Debian's package is wordnet-base).

    Raises:
        DataError: no database there.
    """
    objects = list(objects)
    synsets = dict(_read_synsets(folder / "data.noun"))
    senses = _read_senses(folder / "index.noun")
    taken = {name for thing in objects for name in thing.names}
    nearest: dict[str, tuple[int, str | None]] = {}
    for thing in objects:
        for word, steps in _below(thing, synsets, senses):
            if word in taken:
                continue
            known = nearest.get(word)
            if known is None or steps < known[0]:
                nearest[word] = (steps, thing.name)
            elif steps == known[0] and known[1] != thing.name:
                nearest[word] = (steps, None)
    found: dict[str, list[str]] = {thing.name: [] for thing in objects}
    for word, (_, owner) in sorted(nearest.items()):
        if owner is not None:
            found[owner].append(word)
    return {name: tuple(words) for name, words in found.items()}


def _below(thing: Object, synsets: dict[str, _Synset], senses: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """Words whose commonest meaning is the object's or a narrower one, and how many steps narrower."""
    start = next((offset for name in thing.names for offset in _concrete(name, synsets, senses)[:1]), None)
    queue: deque[tuple[str, int]] = deque([(start, 0)] if start else [])
    seen = set()
    while queue:
        offset, steps = queue.popleft()
        if offset in seen:
            continue
        seen.add(offset)
        for word in synsets[offset].words:
            if word[0].islower() and word.count(" ") < 2 and _concrete(word, synsets, senses)[:1] == [offset]:
                yield word, steps
        queue.extend((below, steps + 1) for below in synsets[offset].narrower)


def _concrete(word: str, synsets: dict[str, _Synset], senses: dict[str, list[str]]) -> list[str]:
    """Offsets of a word's concrete meanings, the commonest first."""
    return [offset for offset in senses.get(word, ()) if synsets[offset].file in CONCRETE]


def _read_synsets(path: Path) -> Iterator[tuple[str, _Synset]]:
    for line in _lines(path):
        parts = line.split(" | ", 1)[0].split()
        offset, file, count = parts[0], parts[1], int(parts[3], 16)
        words = tuple(parts[4 + 2 * i].replace("_", " ") for i in range(count))
        pointers = parts[5 + 2 * count :]
        narrower = tuple(
            pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] == "~" and pointers[i + 2] == "n"
        )
        yield offset, _Synset(file, words, narrower)


def _read_senses(path: Path) -> dict[str, list[str]]:
    senses = {}
    for line in _lines(path):
        lemma, _, count = line.split()[:3]
        senses[lemma.replace("_", " ")] = line.split()[-int(count) :]
    return senses


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path} is missing; install WordNet (Debian: wordnet-base) or name its folder")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(" ")]  # the licence
