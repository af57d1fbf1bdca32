"""Writing the index of training images: from images, their embeddings and sentences."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from image_files import encoded, photo
from safetensors.torch import save_file

from clipgen.errors import DataError
from clipgen.weights.training_index import TrainingIndex
from train.index import MAX_IMAGES, add_index, build_index


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of three images, with the metadata of another program beside them."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("0.png", "1.png", "more/2.png"):
        (folder / name).write_bytes(encoded(photo(len(name)), "PNG"))
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a lemon"}\n')
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Twenty sentences, between blank lines; one holds a separator that is no line end."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(f"prompt\u2028{i}" for i in range(20)))
    return path


def embeddings(count: int, path: Path) -> Path:
    """A file of random embeddings in half precision."""
    found = F.normalize(torch.randn(count, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    save_file({"embeddings": found.half()}, path)
    return path


def test_images_are_named_by_their_paths_within_the_folder(
    tiny_weights: Path, data: Path, prompts: Path, tmp_path: Path
) -> None:
    weights = shutil.copytree(tiny_weights, tmp_path / "tiny")
    add_index(weights, embeddings(3, tmp_path / "encoded.safetensors"), data, prompts)
    found = TrainingIndex.load(weights)
    assert found is not None and sorted(found.names) == ["0.png", "1.png", "more/2.png"]
    assert len(found.measured) == 10


def test_too_few_sentences_are_refused(tiny_weights: Path, data: Path, prompts: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(tiny_weights, tmp_path / "tiny")
    prompts.write_text("a lemon\n\n")
    with pytest.raises(DataError, match=r"prompts\.txt has 1 sentences; give at least 20, one a line"):
        add_index(weights, embeddings(3, tmp_path / "encoded.safetensors"), data, prompts)
    assert TrainingIndex.load(weights) is None


def test_index_of_a_large_set_is_thinned_evenly() -> None:
    count = MAX_IMAGES + 100
    points = F.normalize(torch.randn(count + 40, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    made = TrainingIndex(build_index(points[:count], [str(i) for i in range(count)], points[count:]))
    assert len(made.names) == MAX_IMAGES and made.names[0] == "0" and made.names[-1] == str(count - 1)


def test_index_script_writes_an_index_and_refuses_other_images(
    root: Path, tiny_weights: Path, data: Path, prompts: Path, tmp_path: Path
) -> None:
    weights = shutil.copytree(tiny_weights, tmp_path / "tiny")
    path = embeddings(6, tmp_path / "encoded.safetensors")  # two views of each image
    command = [sys.executable, "-m", "train.index", "--weights", weights, "--data", data, "--encoded", path]
    done = subprocess.run([*command, "--prompts", prompts], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = TrainingIndex.load(weights)
    assert found is not None and len(found.names) == 3
    (data / "0.png").unlink()
    embeddings(5, path)
    wrong = subprocess.run([*command, "--prompts", prompts], cwd=root, capture_output=True, text=True)
    assert wrong.returncode == 2 and "not the same set" in wrong.stderr
