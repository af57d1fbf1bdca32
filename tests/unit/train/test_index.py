"""Writing the index of training images: from images and captions, and beside metadata files of other programs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from image_files import encoded, photo
from PIL import Image
from safetensors.torch import save_file

from clipgen.weights.training_index import TrainingIndex
from train.mini.coverage import MAX_IMAGES, build_index
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


def test_index_of_a_large_set_is_thinned_evenly() -> None:
    count = MAX_IMAGES + 100
    points = F.normalize(torch.randn(count + 40, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    made = TrainingIndex(build_index(points[:count], [str(i) for i in range(count)], points[count:]))
    assert len(made.names) == MAX_IMAGES and made.names[0] == "0" and made.names[-1] == str(count - 1)


def test_index_script_writes_an_index_with_captions(root: Path, tiny_weights: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(tiny_weights, tmp_path / "tiny")
    data = tmp_path / "emoji" / "stage2"
    data.mkdir(parents=True)
    with (data / "metadata.jsonl").open("w") as file:
        for i in range(24):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(data / f"{i:02}.png")
            objects = {22: ["1f34b", "1f34b"], 23: ["1f436", "1f34b"]}.get(i, ["1f34b"])
            row = {"file_name": f"{i:02}.png", "objects": objects, "style": "line", "background": "red"}
            file.write(json.dumps(row) + "\n")
    lemon = {"code": "1f34b", "name": "lemon", "keywords": ["citrus"], "group": 4}
    (data.parent / "emoji.jsonl").write_text(json.dumps(lemon) + "\n")
    embeddings = F.normalize(torch.randn(48, 32, generator=torch.Generator().manual_seed(0)), dim=1)  # 2 views
    save_file({"embeddings": embeddings.half()}, tmp_path / "encoded.safetensors")
    command = [sys.executable, "-m", "train.mini.index", "--weights", weights, "--data", data, "--encoded"]
    done = subprocess.run([*command, tmp_path / "encoded.safetensors"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = TrainingIndex.load(weights)
    assert found is not None and found.names[3] == "03.png: lemon, line on red"
    assert len(found.names) == 22, "images of two objects are left out"
    (data / "00.png").unlink()
    wrong = subprocess.run([*command, tmp_path / "encoded.safetensors"], cwd=root, capture_output=True, text=True)
    assert wrong.returncode == 2 and "not the same set" in wrong.stderr
