"""Encoded pictures of several things -> the same pictures with an embedding of each thing, for `gpt.n_things`.

    python -m train.mini.things --encoded runs/encoded --data data/emoji/stage2 --out runs/things

CLIP's embedding of two things together does not say which is where, and tells them less well apart than an embedding of
each. --data's metadata.jsonl names the things of a picture; a thing's embedding is that of the picture that shows it
alone, in the same style and on the same background. A picture of one thing, once or twice, keeps its own.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.entry_point import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipgen.errors import DataError
from clipgen.utils.entry_point import entry_point
from clipgen.utils.files import write_text
from train.encode import Encoded, shard_path
from train.loop.checkpoint import save_tensors


def split_things(embeddings: Tensor, records: Sequence[dict]) -> Tensor:
    """An embedding of each thing, (N, K, D), zeros where a picture has fewer than K.

    Args:
        embeddings: (N, D), N a multiple of the number of records: crop r is of picture r % records.
        records: what metadata.jsonl says of each picture: `objects`, `style` and `background`.

    Raises:
        DataError: they do not belong together, or no picture shows a thing alone.
    """
    if not records or len(embeddings) % len(records):
        raise DataError(f"{len(embeddings)} embeddings and {len(records)} pictures are not the same set")
    alone = {_look(r, r["objects"][0]): row for row, r in reversed([*enumerate(records)]) if len(r["objects"]) == 1}
    several = [(row, r) for row, r in enumerate(records) if len(set(r["objects"])) > 1]
    most = max((len(r["objects"]) for _, r in several), default=1)
    things = torch.zeros(len(embeddings), most, embeddings.shape[1])
    things[:, 0] = embeddings
    for row, record in several:
        for place, thing in enumerate(record["objects"]):
            if _look(record, thing) not in alone:
                raise DataError(f"no picture shows {thing} of {record['file_name']} alone, in its style and background")
            things[row :: len(records), place] = embeddings[alone[_look(record, thing)]]
    return things


def _look(record: dict, thing: str) -> tuple[str, str, str]:
    return thing, record["style"], record["background"]


def write_things(encoded: Path, data: Path, out: Path) -> Tensor:
    """Write the set `encoded` with an embedding of each thing to OUT, as a set of its own; returns them, (N, K, D).

    Raises:
        DataError: there is no complete set there, or it is not of these pictures.
    """
    if out.resolve() == encoded.resolve():
        raise DataError(f"--out is {out}, which is what would be read; name another folder")
    if not (data / "metadata.jsonl").is_file():
        raise DataError(f"{data} holds no metadata.jsonl, which tells what its pictures show")
    rows = Encoded(encoded)
    lines = (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for number, record in enumerate(records, 1):
        if missing := {"file_name", "objects", "style", "background"} - record.keys():
            raise DataError(f"{data / 'metadata.jsonl'}, line {number}, lacks {', '.join(sorted(missing))}")
    things = split_things(rows.embeddings(), records)
    header = json.loads((encoded / "index.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "index.json", json.dumps(header | {"complete": False}, indent=1))
    for number, part in enumerate(torch.arange(len(rows)).split(header["rows_per_shard"])):
        tokens, _ = rows.read(part.tolist())
        save_tensors({"tokens": tokens.int(), "embeddings": things[part].half()}, shard_path(out, number))
    write_text(out / "index.json", json.dumps(header, indent=1))
    return things


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoded", type=Path, required=True, help="what train/encode.py has written")
    parser.add_argument("--data", type=Path, required=True, help="the pictures, with metadata.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for the new set")
    args = parser.parse_args()
    try:
        things = write_things(args.encoded, args.data, args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: {len(things)} crops, {int(things[:, 1:].any(-1).any(-1).sum())} of them of several things")


if __name__ == "__main__":
    main()
