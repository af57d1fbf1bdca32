"""Pictures of several things get the embedding of each, as they are when alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from clipgen.errors import DataError
from train.encode import Encoded, shard_path
from train.mini.things import split_things


def record(*objects: str, style: str = "3d", background: str = "white") -> dict:
    return {"file_name": f"{'-'.join(objects)}.png", "objects": list(objects), "style": style, "background": background}


RECORDS = [record("dog", style="line"), record("dog"), record("cat"), record("cat", "dog"), record("dog", "dog")]


def embeddings(count: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(0)), dim=1)


def test_each_thing_has_the_embedding_of_its_own_picture() -> None:
    own = embeddings(10)  # two crops of each picture
    things = split_things(own, RECORDS)
    assert things.shape == (10, 2, 8)
    for alone in (0, 1, 2, 4, 5, 6, 7, 9):  # the dog twice is a picture of its own
        assert torch.equal(things[alone], torch.stack([own[alone], torch.zeros(8)]))
    for pair in (3, 8):
        assert torch.equal(things[pair], own[[2, 1]]), "the glossy dog, not the one in lines"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="7 embeddings and 5 pictures"):
        split_things(embeddings(7), RECORDS)
    with pytest.raises(DataError, match=r"no picture shows dog of cat-dog\.png alone"):
        split_things(embeddings(3), [RECORDS[0], *RECORDS[2:4]])
    assert split_things(embeddings(3), RECORDS[:3]).shape == (3, 1, 8)


def test_the_script_writes_a_set_that_can_be_trained_on(root: Path, tmp_path: Path) -> None:
    encoded, data, out = (tmp_path / name for name in ("encoded", "data", "out"))
    encoded.mkdir()
    data.mkdir()
    tokens = torch.arange(5 * 16, dtype=torch.int32).view(5, 16)
    for number, rows in enumerate(torch.arange(5).split(2)):
        save_file(
            {"tokens": tokens[rows], "embeddings": embeddings(5)[rows].half()},
            shard_path(encoded, number),
        )
    header = {"origin": {"settings": {"views": 1}}, "rows": 5, "rows_per_shard": 2, "complete": True}
    (encoded / "index.json").write_text(json.dumps(header))
    command = [sys.executable, "-m", "train.mini.things", "--encoded", encoded, "--data", data, "--out"]

    def run(to: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, command), str(to)], cwd=root, capture_output=True, text=True)

    refused = run(out)
    assert refused.returncode == 2 and "holds no metadata.jsonl" in refused.stderr and not out.exists()
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": "dog.png", "style": "3d"}) + "\n")
    refused = run(out)
    assert refused.returncode == 2 and "line 1, lacks background, objects" in refused.stderr and not out.exists()
    (data / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    refused = run(encoded)
    assert refused.returncode == 2 and "name another folder" in refused.stderr
    done = run(out)
    assert done.returncode == 0 and "5 crops, 1 of them of several things" in done.stdout, done.stderr
    found_tokens, things = Encoded(out).read(range(5))
    assert torch.equal(found_tokens, tokens.long())
    assert torch.equal(things, split_things(embeddings(5).half().float(), RECORDS))
