"""Training pictures -> coverage.safetensors beside the weights: what a model has seen.

    python -m train.mini.index --weights weights/mini --encoded runs/gpt/encoded --data data/emoji/stage2

--encoded is what stage 2 or train/encode.py has written for --data: a folder of shards, or one .safetensors file. The
sentences that prompts are measured against come from --prompts, one a line, or for the emoji from their captions.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clipgen.errors import DataError
from clipgen.images.sources import open_source
from clipgen.models.clip import Clip
from clipgen.utils.entry_point import entry_point
from clipgen.utils.text import expand_home, printable, read_lines
from clipgen.weights.model_dir import MANIFEST, read_manifest
from clipgen.weights.tensor_file import load_tensors
from train.encode import Encoded
from train.mini.captions import Emoji, caption
from train.mini.coverage import build_index, write_index

SENTENCES = 800


def add_index(weights: Path, encoded: Path, data: str | Path, prompts: Path | None = None) -> Path:
    """Write the index of a folder of weights, and name it in the manifest.

    Pictures that could not be read are left out: the encoded set holds others in their places, and says so beside it.
    So are pictures of several things, which are near to sentences about others of these things.

    Raises:
        DataError: pictures and embeddings do not belong together, or there are no sentences.
        WeightsError: the folder of weights has no manifest, or its CLIP cannot be read.
    """
    read_manifest(weights / MANIFEST)  # fails before the work, not after it; an old index may be damaged
    clip = Clip.from_state_dict(load_tensors(weights / "clip.safetensors"))
    files, data = [Path(name) for name in open_source(data).names], expand_home(data)
    embeddings = load_file(encoded)["embeddings"].float() if encoded.is_file() else Encoded(encoded).embeddings()
    if len(embeddings) % len(files):
        raise DataError(f"{encoded} holds {len(embeddings)} embeddings, {data} {len(files)} images: not the same set")
    records = _records(data)
    names = [_name(file, data, records.get(file.name)) for file in files]
    sentences = read_lines(prompts) if prompts else _captions(data, records)
    sentences = [sentence.strip() for sentence in sentences if sentence.strip()]
    if len(sentences) < 20:
        raise DataError(f"{len(sentences)} sentences are too few; give --prompts with at least 20 of them, one a line")
    with torch.inference_mode():
        texts = torch.cat([clip.encode_text(sentences[i : i + 64]) for i in range(0, len(sentences), 64)])
    skipped = encoded / "skipped.txt"
    lines = read_lines(skipped, errors="surrogateescape") if skipped.is_file() else []
    several = {name for name, record in records.items() if len(record["objects"]) > 1}
    rows = [
        i
        for i, file in enumerate(files)
        if file.name not in several and not any(line.startswith(f"{file}: ") for line in lines)
    ]
    index = build_index(_unit(embeddings[rows]), [names[i] for i in rows], texts.clone())
    return write_index(weights, index)


def _unit(embeddings: Tensor) -> Tensor:
    """Normalize embeddings, which half precision leaves slightly off unit norm."""
    return torch.nn.functional.normalize(embeddings, dim=1)


def _records(data: Path) -> dict[str, dict]:
    """What the metadata.jsonl of `train.mini.emoji` says of each file, with the names of the emoji for their codes.

    Other programs give files of this name another content (Hugging Face's image folders): without a word of ours in
    every line it is not used, and {} is returned.
    """
    path = data / "metadata.jsonl"
    try:
        records = [json.loads(line) for line in read_lines(path) if line] if path.is_file() else []
    except ValueError:
        return {}
    if not all(map(_is_ours, records)):
        return {}
    emoji = _emoji(data)
    names = [[emoji[code].name if code in emoji else code for code in record["objects"]] for record in records]
    return {record["file_name"]: record | {"names": own} for record, own in zip(records, names, strict=True)}


def _is_ours(record: Any) -> bool:
    """Whether a line of metadata.jsonl has the fields, of the types, that `train.mini.emoji` writes."""
    if not isinstance(record, dict) or not isinstance(record.get("objects"), list):
        return False
    texts = [record.get("file_name"), record.get("style"), record.get("background"), *record["objects"]]
    return all(isinstance(text, str) for text in texts)


def _emoji(data: Path) -> dict[str, Emoji]:
    path = data.parent / "emoji.jsonl"
    try:
        rows = [json.loads(line) for line in read_lines(path) if line] if path.is_file() else []
        return {row["code"]: Emoji(row["code"], row["name"], tuple(row["keywords"]), row["group"]) for row in rows}
    except (ValueError, KeyError, TypeError):  # another program's file of this name
        return {}


def _name(path: Path, data: Path, record: dict | None) -> str:
    file = printable(path.relative_to(data).as_posix() if path.is_relative_to(data) else path.name)
    if not record or not record["names"]:
        return file
    look = f"{record['style']} on {record['background']}"
    return f"{file}: {' and '.join(record['names'])}, {look}"


def _captions(data: Path, records: dict[str, dict]) -> list[str]:
    """Sentences about some of the pictures, always the same."""
    emoji, rng = _emoji(data), random.Random(0)
    known = [record for record in records.values() if len(record["objects"]) == 1 and record["objects"][0] in emoji]
    return [
        caption([emoji[code] for code in record["objects"]], record["style"], record["background"], rng)
        for record in rng.sample(known, min(SENTENCES, len(known)))
    ]


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of weights that gets the index")
    parser.add_argument(
        "--encoded", type=Path, required=True, help="embeddings of the pictures that stage 2 trained on"
    )
    parser.add_argument("--data", required=True, help="those pictures, as they were given to stage 2")
    parser.add_argument("--prompts", type=Path, help="sentences about such pictures, one a line")
    args = parser.parse_args()
    try:
        path = add_index(args.weights, args.encoded, args.data, args.prompts)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
