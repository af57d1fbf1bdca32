"""TrainingIndex: distance of prompts to the training images; a damaged index is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from clipgen import ClipGen
from clipgen.cli.main import app
from clipgen.errors import WeightsError
from clipgen.weights.model_dir import load_model_dir, save_model_dir
from clipgen.weights.tensor_file import load_tensors
from clipgen.weights.training_index import FILE, IndexMatch, TrainingIndex
from train.index import build_index, write_index

D = 64


def points(count: int, seed: int, directions: int = D) -> Tensor:
    """Unit vectors (count, D) that are zero from dimension `directions` on."""
    made = torch.zeros(count, D)
    made[:, :directions] = torch.randn(count, directions, generator=torch.Generator().manual_seed(seed))
    return F.normalize(made, dim=1)


@pytest.fixture(scope="module")
def world() -> tuple[Tensor, Tensor, Tensor]:
    """Images in half of the dimensions, the modality gap, and sentences near images, shifted by the gap."""
    images = points(300, 0, D // 2)
    gap = 0.6 * F.normalize(torch.ones(D), dim=0)
    texts = F.normalize(images[:200] + gap + 0.3 * points(200, 1), dim=1)
    return images, gap, texts


@pytest.fixture(scope="module")
def index(world: tuple[Tensor, Tensor, Tensor]) -> TrainingIndex:
    images, _, texts = world
    return TrainingIndex(build_index(images, [f"image {i}" for i in range(len(images))], texts))


def test_query_near_training_images_is_in_distribution_and_a_far_one_is_not(
    world: tuple[Tensor, Tensor, Tensor], index: TrainingIndex
) -> None:
    images, gap, _ = world
    near = index.query(F.normalize(images[250] + gap + 0.3 * points(1, 2)[0], dim=0))
    assert near.nearest[0][0] == "image 250" and not near.is_out_of_distribution and 5 < near.percentile < 100
    assert [value for _, value in near.nearest] == sorted((value for _, value in near.nearest), reverse=True)
    outside = torch.zeros(D)
    outside[-1] = 1
    far = index.query(F.normalize(outside + gap, dim=0))
    assert far.is_out_of_distribution and far.percentile < 1 and far.similarity < near.similarity


def test_training_image_is_its_own_nearest_neighbour(
    world: tuple[Tensor, Tensor, Tensor], index: TrainingIndex
) -> None:
    images, *_ = world
    for i in range(0, 300, 50):
        name, cosine = index.query(images[i], text_share=0).nearest[0]
        assert name == f"image {i}" and cosine == pytest.approx(1, abs=0.02)


def test_index_measures_the_modality_gap(world: tuple[Tensor, Tensor, Tensor], index: TrainingIndex) -> None:
    _, gap, _ = world
    assert F.cosine_similarity(index.gap, gap, dim=0) > 0.8


@pytest.fixture
def folder(tiny_weights: Path, tmp_path: Path) -> Path:
    """The tiny model with an index of 40 images."""
    copy = shutil.copytree(tiny_weights, tmp_path / "tiny")
    images = F.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    write_index(copy, build_index(images, [f"{i}.png" for i in range(40)], images[:30]))
    return copy


def test_index_is_saved_beside_the_weights_and_removed_with_other_weights(folder: Path, tiny_weights: Path) -> None:
    assert TrainingIndex.load(tiny_weights) is None
    found = TrainingIndex.load(folder)
    assert found is not None and found.names[39] == "39.png"
    config, parts = load_model_dir(folder)  # the model itself still loads
    assert not list(folder.glob(".saving-*"))
    save_model_dir(
        folder, config, {part: {k: v.clone() for k, v in tensors.items()} for part, tensors in parts.items()}
    )
    assert TrainingIndex.load(folder) is None, "an index of other weights must not stay"


def test_damaged_or_missing_index_is_named(folder: Path) -> None:
    data = bytearray((folder / FILE).read_bytes())
    data[-1] ^= 1
    (folder / FILE).write_bytes(data)
    with pytest.raises(WeightsError, match=r"coverage\.safetensors is damaged"):
        load_model_dir(folder)
    (folder / FILE).unlink()
    with pytest.raises(WeightsError, match=r"coverage\.safetensors is missing"):
        load_model_dir(folder)


@pytest.mark.parametrize("change", ["names", "scale", "basis", "held", "bomb", "gone"])
def test_index_that_does_not_fit_is_refused(folder: Path, change: str) -> None:
    import zlib

    tensors = {key: tensor.clone() for key, tensor in load_tensors(folder / FILE).items()}
    if change == "gone":
        del tensors["gap"]
    elif change == "bomb":
        tensors["names"] = torch.frombuffer(
            bytearray(zlib.compress(b"[" + b" " * 50_000_000 + b"]")), dtype=torch.uint8
        )
    else:
        tensors[change] = tensors[change][: 0 if change == "held" else 3]
    write_index(folder, tensors)
    with pytest.raises(WeightsError, match="not an index"):
        TrainingIndex.load(folder)


def test_generate_json_holds_the_coverage(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("--num-outputs", "1", "--candidates", "1", "--device", "cpu", "--dtype", "float32", "--json")
    result = CliRunner().invoke(app, ["generate", "a lemon", *few, "--weights", str(folder)])
    assert result.exit_code == 0, result.output
    covered = json.loads(result.stdout)["coverage"]
    assert set(covered) == {"similarity", "percentile", "nearest"} and len(covered["nearest"]) == 5
    assert ("has seen little like 'a lemon'" in result.stderr) == (covered["percentile"] < 5)


@pytest.mark.parametrize("low", [True, False])
def test_generate_prints_coverage_and_warns_below_the_threshold(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, low: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clipgen.weights.training_index.OUT_OF_DISTRIBUTION", 1.01 if low else 0)
    few = ("--num-outputs", "1", "--candidates", "1", "--device", "cpu", "--dtype", "float32")
    result = CliRunner().invoke(app, ["generate", "a lemon", *few, "--weights", str(folder)])
    assert re.search(r"coverage \d+ of 100, nearest training images: \d+\.png; \d+\.png; \d+\.png\n", result.stdout)
    warned = re.search(r"little like 'a lemon'; the nearest of its training images is \d+\.png", result.stderr)
    assert bool(warned) == low


def test_match_is_printed_with_captions_instead_of_file_names() -> None:
    covered = IndexMatch(0.5, 3.0, [("7.png: red heart", 0.6), ("8.png", 0.5)])
    assert str(covered) == "coverage 3 of 100, nearest training images: red heart; 8.png"
    assert covered.warning("it").endswith("little like it; the nearest of its training images is red heart")


def test_modality_gap_is_subtracted_for_texts_but_not_for_images(folder: Path) -> None:
    pipe = ClipGen.from_pretrained(folder, device="cpu", dtype="float32")
    image = Image.linear_gradient("L")
    assert pipe.index is not None
    assert pipe.query_index(image) == pipe.index.query(pipe.embed(image), text_share=0)
    assert pipe.query_index("a") == pipe.index.query(pipe.embed("a"), text_share=1)
    mixed = [("a", 1.0), (image, -3.0)]
    assert pipe.query_index(mixed) == pipe.index.query(pipe.embed(mixed), text_share=0.25)


def test_index_of_another_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(60, 48, generator=generator), dim=1)
    write_index(other, build_index(embeddings, [f"{i}.png" for i in range(60)], embeddings[:30].clone()))
    with pytest.raises(WeightsError, match="is of embeddings of 48 numbers, not this CLIP's"):
        ClipGen.from_pretrained(other, device="cpu")


def test_distances_without_an_axis_are_refused(folder: Path) -> None:
    tensors = load_tensors(folder / FILE)
    with pytest.raises(WeightsError, match="its parts do not fit"):
        TrainingIndex(tensors | {"held": torch.tensor(0.5)})
