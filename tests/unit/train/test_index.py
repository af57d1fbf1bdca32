"""The index of training images beside metadata files of other programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from image_files import encoded, photo
from safetensors.torch import save_file

from clipgen.weights.training_index import TrainingIndex
from train.mini.index import add_index

FOREIGN = {
    "captions": '{"file_name": "0.png", "text": "a lemon"}\n',
    "object detection": '{"file_name": "0.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": [0]}}\n',
    "numbers as objects": '{"file_name": "0.png", "objects": [1, 2], "style": "x", "background": "y"}\n',
    "no style": '{"file_name": "0.png", "objects": ["1f34b"]}\n',
    "null": '{"file_name": null, "objects": ["a", "b"], "style": "x", "background": "y"}\n',
    "list": "[1, 2]\n",
    "not JSON": "file_name,text\n0.png,a lemon\n",
    "not UTF-8": "\udcff\n",
    "empty": "",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_metadata_beside_the_images_is_ignored(name: str, tiny_weights: Path, tmp_path: Path) -> None:
    weights, data = shutil.copytree(tiny_weights, tmp_path / "tiny"), tmp_path / "data" / "images"
    data.mkdir(parents=True)
    for i in range(3):
        (data / f"{i}.png").write_bytes(encoded(photo(i), "PNG"))
    for path in (data / "metadata.jsonl", data.parent / "emoji.jsonl"):
        path.write_bytes(FOREIGN[name].encode(errors="surrogateescape"))
    (tmp_path / "prompts.txt").write_text("".join(f"prompt\u2028{i}\n" for i in range(20)))
    embeddings = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    save_file({"embeddings": embeddings.half()}, tmp_path / "encoded.safetensors")
    add_index(weights, tmp_path / "encoded.safetensors", data, tmp_path / "prompts.txt")
    found = TrainingIndex.load(weights)
    assert found is not None and found.names == ["0.png", "1.png", "2.png"]


def test_metadata_with_blank_lines_and_any_line_end_is_read(tiny_weights: Path, tmp_path: Path) -> None:
    weights, data = shutil.copytree(tiny_weights, tmp_path / "tiny"), tmp_path / "data"
    data.mkdir()
    rows = []
    for i in range(3):
        (data / f"{i}.png").write_bytes(encoded(photo(i), "PNG"))
        rows.append(json.dumps({"file_name": f"{i}.png", "objects": ["x"], "style": "line", "background": "red"}))
    (data / "metadata.jsonl").write_bytes(("\ufeff" + "\r\n\r\n".join(rows)).encode())
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(20)))
    embeddings = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    save_file({"embeddings": embeddings.half()}, tmp_path / "encoded.safetensors")
    add_index(weights, tmp_path / "encoded.safetensors", data, tmp_path / "prompts.txt")
    found = TrainingIndex.load(weights)
    assert found is not None and found.names[0] == "0.png: x, line on red"
