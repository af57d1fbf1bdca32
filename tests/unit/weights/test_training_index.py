"""TrainingIndex: what lies among the training pictures is told from what does not, and a damaged index is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from clipgen import ClipGen
from clipgen.cli.main import app
from clipgen.errors import WeightsError
from clipgen.request import GenerationRequest
from clipgen.weights.model_dir import add_extra, load_extra, load_model_dir, save_model_dir
from clipgen.weights.training_index import FILE, MOST_PICTURES, IndexMatch, TrainingIndex, build_index
from train.mini.index import add_index

D = 64


def points(count: int, seed: int, directions: int = D) -> Tensor:
    """Unit vectors of D numbers, the last of which are zero."""
    made = torch.zeros(count, D)
    made[:, :directions] = torch.randn(count, directions, generator=torch.Generator().manual_seed(seed))
    return F.normalize(made, dim=1)


@pytest.fixture(scope="module")
def world() -> tuple[Tensor, Tensor, Tensor]:
    """Pictures in half of the directions, the gap, and sentences near pictures, on the other side of the gap."""
    images = points(300, 0, D // 2)
    gap = 0.6 * F.normalize(torch.ones(D), dim=0)
    texts = F.normalize(images[:200] + gap + 0.3 * points(200, 1), dim=1)
    return images, gap, texts


@pytest.fixture(scope="module")
def index(world: tuple[Tensor, Tensor, Tensor]) -> TrainingIndex:
    images, _, texts = world
    return TrainingIndex(build_index(images, [f"picture {i}" for i in range(len(images))], texts))


def test_near_and_far(world: tuple[Tensor, Tensor, Tensor], index: TrainingIndex) -> None:
    images, gap, _ = world
    near = index.query(F.normalize(images[250] + gap + 0.3 * points(1, 2)[0], dim=0))
    assert near.nearest[0][0] == "picture 250" and not near.is_out_of_distribution and 5 < near.percentile < 100
    assert [value for _, value in near.nearest] == sorted((value for _, value in near.nearest), reverse=True)
    outside = torch.zeros(D)
    outside[-1] = 1
    far = index.query(F.normalize(outside + gap, dim=0))
    assert far.is_out_of_distribution and far.percentile < 1 and far.similarity < near.similarity


def test_a_training_picture_finds_itself(world: tuple[Tensor, Tensor, Tensor], index: TrainingIndex) -> None:
    images, *_ = world
    for i in range(0, 300, 50):
        name, cosine = index.query(images[i], texts=0).nearest[0]
        assert name == f"picture {i}" and cosine == pytest.approx(1, abs=0.02)


def test_the_gap_is_measured(world: tuple[Tensor, Tensor, Tensor], index: TrainingIndex) -> None:
    _, gap, _ = world
    assert F.cosine_similarity(index.gap, gap, dim=0) > 0.8


def test_large_sets_are_thinned() -> None:
    count = MOST_PICTURES + 100
    made = TrainingIndex(build_index(points(count, 3), [str(i) for i in range(count)], points(40, 4)))
    assert len(made.names) == MOST_PICTURES and made.names[0] == "0" and made.names[-1] == str(count - 1)


@pytest.fixture
def folder(tiny_weights: Path, tmp_path: Path) -> Path:
    """The tiny model with an index of 40 pictures."""
    copy = shutil.copytree(tiny_weights, tmp_path / "tiny")
    images = F.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    add_extra(copy, FILE, build_index(images, [f"{i}.png" for i in range(40)], images[:30]))
    return copy


def test_it_travels_with_the_weights(folder: Path, tiny_weights: Path) -> None:
    assert TrainingIndex.load(tiny_weights) is None
    found = TrainingIndex.load(folder)
    assert found is not None and found.names[39] == "39.png"
    config, parts = load_model_dir(folder)  # the model loads as before
    assert not list(folder.glob(".saving-*"))
    save_model_dir(
        folder, config, {part: {k: v.clone() for k, v in tensors.items()} for part, tensors in parts.items()}
    )
    assert TrainingIndex.load(folder) is None, "an index of other weights must not be believed"


def test_a_damaged_index(folder: Path) -> None:
    data = bytearray((folder / FILE).read_bytes())
    data[-1] ^= 1
    (folder / FILE).write_bytes(data)
    with pytest.raises(WeightsError, match=r"coverage\.safetensors is damaged"):
        TrainingIndex.load(folder)
    (folder / FILE).unlink()
    with pytest.raises(WeightsError, match="missing"):
        TrainingIndex.load(folder)


@pytest.mark.parametrize("change", ["names", "scale", "basis", "held", "bomb", "gone"])
def test_an_index_that_does_not_fit(folder: Path, change: str) -> None:
    import zlib

    tensors = {key: tensor.clone() for key, tensor in (load_extra(folder, FILE) or {}).items()}
    if change == "gone":
        del tensors["gap"]
    elif change == "bomb":
        tensors["names"] = torch.frombuffer(
            bytearray(zlib.compress(b"[" + b" " * 50_000_000 + b"]")), dtype=torch.uint8
        )
    else:
        tensors[change] = tensors[change][: 0 if change == "held" else 3]
    add_extra(folder, FILE, tensors)
    with pytest.raises(WeightsError, match="no index"):
        TrainingIndex.load(folder)


def test_generate_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("--num-outputs", "1", "--candidates", "1", "--device", "cpu", "--dtype", "float32", "--json")
    result = CliRunner().invoke(app, ["generate", "a lemon", *few, "--weights", str(folder)])
    assert result.exit_code == 0, result.output
    covered = json.loads(result.stdout)["coverage"]
    assert set(covered) == {"similarity", "percentile", "nearest"} and len(covered["nearest"]) == 5
    assert ("has seen little like 'a lemon'" in result.stderr) == (covered["percentile"] < 5)


@pytest.mark.parametrize("low", [True, False])
def test_generate_says_it_to_people(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, low: bool) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clipgen.weights.training_index.LOW", 1.01 if low else 0)
    few = ("--num-outputs", "1", "--candidates", "1", "--device", "cpu", "--dtype", "float32")
    result = CliRunner().invoke(app, ["generate", "a lemon", *few, "--weights", str(folder)])
    assert re.search(r"coverage \d+ of 100, nearest training pictures: \d+\.png; \d+\.png; \d+\.png\n", result.stdout)
    warned = re.search(r"little like 'a lemon'; the nearest of its training pictures is \d+\.png", result.stderr)
    assert bool(warned) == low


def test_people_read_captions_not_files() -> None:
    covered = IndexMatch(0.5, 3.0, [("7.png: red heart", 0.6), ("8.png", 0.5)])
    assert str(covered) == "coverage 3 of 100, nearest training pictures: red heart; 8.png"
    assert covered.warning("it").endswith("little like it; the nearest of its training pictures is red heart")


def test_images_have_no_gap_to_take_off(folder: Path) -> None:
    pipe = ClipGen.from_pretrained(folder, device="cpu", dtype="float32")
    image = Image.linear_gradient("L")
    assert pipe.index is not None
    assert pipe.query_index(image) == pipe.index.query(pipe.embed(image), texts=0)
    assert pipe.query_index("a") == pipe.index.query(pipe.embed("a"), texts=1)
    mixed = [("a", 1.0), (image, -3.0)]
    assert pipe.query_index(mixed) == pipe.index.query(pipe.embed(mixed), texts=0.25)


def test_the_script(root: Path, tiny_weights: Path, tmp_path: Path) -> None:
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
    assert len(found.names) == 22, "of one thing only"
    assert not len(found.things)
    things = torch.stack([embeddings, torch.zeros(48, 32)], dim=1)
    things[23] = embeddings[[5, 3]]  # the last picture shows what two others show alone
    save_file({"embeddings": things.half()}, tmp_path / "things.safetensors")
    found = TrainingIndex.load(add_index(weights, tmp_path / "things.safetensors", data).parent)
    assert found is not None and len(found.names) == 22
    assert torch.allclose(found.things, embeddings[[3, 5]], atol=0.03)
    (data / "00.png").unlink()
    wrong = subprocess.run([*command, tmp_path / "encoded.safetensors"], cwd=root, capture_output=True, text=True)
    assert wrong.returncode == 2 and "not the same set" in wrong.stderr


def test_a_sentence_takes_the_place_of_the_pictures_it_is_about() -> None:
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(40, 32, generator=generator), dim=1)
    index = TrainingIndex(build_index(images, [str(i) for i in range(40)], images[:20]))
    for i in (0, 7, 39):
        near = F.normalize(images[i] + 0.4 * F.normalize(torch.randn(32, generator=generator), dim=0), dim=0)
        [moved] = index.project(near)
        assert moved.norm().item() == pytest.approx(1, abs=1e-5)
        assert moved @ images[i] > 0.99 > near @ images[i]


def test_a_sentence_about_two_things_is_taken_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(60, 32, generator=generator), dim=1)
    images[41] = F.normalize(images[40] + 0.3 * images[41], dim=0)  # a thing and one much like it
    names, things = [str(i) for i in range(60)], range(30, 60)
    index = TrainingIndex(build_index(images, names, images[:20], things))
    for a, b in ((30, 31), (59, 45), (40, 33)):
        sentence = F.normalize(images[a] + 0.9 * images[b] + 0.5 * F.normalize(images[5], dim=0), dim=0)
        found = index.project(sentence, things=2)
        assert found.shape == (2, 32) and (found * images[[a, b]]).sum(1).min() > 0.95
        assert index.project(sentence).shape == (1, 32), "a GPT that draws one thing gets one"
    for alone in (images[3], images[50], F.normalize(images[40] + images[41], dim=0)):
        assert index.project(alone, things=2).shape == (1, 32)
    untaught = F.normalize(images[1] + images[2], dim=0)  # of these the GPT has never drawn two
    assert (index.project(untaught, things=2) @ images[[1, 2]].t()).amax(dim=0).min() < 0.9
    assert TrainingIndex(build_index(images, names, images[:20])).project(untaught, things=2).shape == (1, 32)


def test_things_survive_the_thinning_of_an_index() -> None:
    count = MOST_PICTURES + 5000
    images = points(count, 3)
    things = list(range(1, count, 1000))
    made = TrainingIndex(build_index(images, [str(i) for i in range(count)], points(40, 4), things))
    assert MOST_PICTURES <= len(made.names) <= MOST_PICTURES + len(things)
    assert (made.things @ images[things].t()).diagonal().min() > 0.99


def test_two_things_reach_the_gpt_side_by_side(tiny_weights: Path, tmp_path: Path) -> None:
    config, parts = load_model_dir(tiny_weights)
    config = replace(config, gpt=replace(config.gpt, n_things=2))
    weight = parts["gpt"]["cond_proj.weight"]
    parts["gpt"]["cond_proj.weight"] = torch.cat([weight, weight.flip(0)], dim=1)
    folder = save_model_dir(
        tmp_path / "two", config, {part: {k: v.clone() for k, v in t.items()} for part, t in parts.items()}
    )
    plain = ClipGen.from_pretrained(folder, device="cpu", dtype="float32")
    text = plain.embed("a b")
    assert torch.equal(plain.condition("a b"), torch.cat([text, torch.zeros(32)]))
    images = F.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    aside = F.normalize(images[0] - (images[0] @ text) * text, dim=0)
    images[0], images[1] = 0.8 * text + 0.6 * aside, 0.6 * text - 0.8 * aside
    add_extra(folder, FILE, build_index(images, [str(i) for i in range(40)], images[:30], [0, 1, 5]))
    pipe = ClipGen.from_pretrained(folder, device="cpu", dtype="float32")
    condition = pipe.condition("a b").unflatten(0, (2, 32))
    assert (condition * images[:2]).sum(1).min() > 0.99
    assert not pipe.condition([("a b", 1.0), ("c", 1.0)])[32:].any(), "what is mixed becomes one"
    together = pipe.generate([GenerationRequest("a b", seed=1), GenerationRequest("c", seed=2)])
    for request, result in zip(
        [GenerationRequest("a b", seed=1), GenerationRequest("c", seed=2)], together, strict=True
    ):
        assert result.images[0].tobytes() == pipe.generate([request])[0].images[0].tobytes()


def test_texts_are_moved_for_the_gpt_and_images_and_the_ranking_are_not(root: Path) -> None:
    pipe = ClipGen.from_pretrained(root / "weights" / "mini", device="cpu")
    assert pipe.index is not None
    picture = Image.new("RGB", (144, 144), (220, 40, 40))
    assert torch.equal(pipe.condition(picture), torch.cat([pipe.embed(picture), torch.zeros(384)]))
    text, (moved, nothing) = pipe.embed("a red heart"), pipe.condition("a red heart").view(2, 384)
    before, after = (pipe.index.query(place, texts=0.0) for place in (text, moved))
    assert after.similarity > before.similarity + 0.005 and not nothing.any()
    assert "red heart" in after.nearest[0][0]


def test_the_mini_model_takes_pairs_apart(root: Path) -> None:
    pipe = ClipGen.from_pretrained(root / "weights" / "mini", device="cpu")
    assert pipe.index is not None
    for prompt, names in {
        "a lemon and a dog": {"lemon", "dog"},
        "a red heart and a star": {"red heart", "star"},
    }.items():
        things = pipe.condition(prompt).view(2, 384)
        found = [pipe.index.query(thing, texts=0.0).nearest[0][0] for thing in things]
        assert {name.partition(": ")[2] for name in found} == {f"{name}, 3d on white" for name in names}
    lemon, _ = pipe.condition("a lemon with hair").view(2, 384)  # that alone is nearer than any sum of other things
    assert pipe.index.query(lemon, texts=0.0).nearest[0][0].endswith(": lemon, 3d on white")
