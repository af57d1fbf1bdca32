"""The prior of the shipped weights: texts move to the training images they are about, also for old folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

from clipgen import ClipGen, GenerationRequest
from clipgen.config import load_model_config
from clipgen.errors import WeightsError
from clipgen.images.pixels import to_clip
from clipgen.weights.model_dir import load_model_dir, save_model_dir
from clipgen.weights.prior import IndexPrior
from clipgen.weights.training_index import TrainingIndex
from train.index import build_index, write_index


def random_images(count: int, d: int = 32) -> Tensor:
    return F.normalize(torch.randn(count, d, generator=torch.Generator().manual_seed(0)), dim=1)


def make_index(images: Tensor) -> TrainingIndex:
    return TrainingIndex(build_index(images, [str(i) for i in range(len(images))], images[:20]))


def test_prior_moves_a_text_to_images_of_its_subject() -> None:
    images = random_images(40)
    prior = IndexPrior(make_index(images))
    for i in (0, 7, 39):
        noise = F.normalize(torch.randn(32, generator=torch.Generator().manual_seed(100 + i)), dim=0)
        near = F.normalize(images[i] + 0.4 * noise, dim=0)
        [moved] = prior.project(near)
        assert moved.norm().item() == pytest.approx(1, abs=1e-5)
        assert moved @ images[i] > 0.99 > near @ images[i]


def test_text_about_two_objects_becomes_two_embeddings() -> None:
    images = random_images(60)
    images[41] = F.normalize(images[40] + 0.3 * images[41], dim=0)  # a thing and one much like it
    index = make_index(images)
    pair = F.normalize(images[30] + 0.9 * images[31], dim=0)
    assert IndexPrior(index, num_slots=2).project(pair, num_things=2).shape == (1, 32), "no things, no pairs"
    index.things = torch.arange(30, 60)
    prior = IndexPrior(index, num_slots=2)
    for a, b in ((30, 31), (59, 45), (40, 33)):
        sentence = F.normalize(images[a] + 0.9 * images[b] + 0.5 * images[5], dim=0)
        found = prior.project(sentence, num_things=2)
        assert found.shape == (2, 32) and (found * images[[a, b]]).sum(1).min() > 0.95
        assert prior.project(sentence).shape == (1, 32)
    for single in (images[3], images[50], F.normalize(images[40] + images[41], dim=0)):
        assert prior.project(single, num_things=2).shape == (1, 32)
    unknown = F.normalize(images[1] + images[2], dim=0)  # the GPT has never learned two of these
    assert (prior.project(unknown, num_things=2) @ images[[1, 2]].t()).amax(dim=0).min() < 0.9


@pytest.fixture
def old_folder(tiny_weights: Path, tmp_path: Path) -> Path:
    """A folder as version 0.1.0 wrote it: `gpt.n_things` in its config.yaml, no `prior`."""
    config, parts = load_model_dir(tiny_weights)
    config.gpt.n_cond, config.prior = 64, "training_index"
    weight = parts["gpt"]["cond_proj.weight"]
    parts["gpt"]["cond_proj.weight"] = torch.cat([weight, weight.flip(0)], dim=1)
    tensors = {part: {name: tensor.clone() for name, tensor in tensors.items()} for part, tensors in parts.items()}
    folder = save_model_dir(tmp_path / "old", config, tensors)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    del values["prior"]
    values["gpt"] |= {"n_cond": 32, "n_things": 2}
    config.gpt.n_cond = 32
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_old_configuration_becomes_a_prior_and_a_condition_size(old_folder: Path, tiny_weights: Path) -> None:
    config = load_model_config(old_folder / "config.yaml")
    assert config.prior == "training_index" and config.gpt.n_cond == 64
    plain = load_model_config(tiny_weights / "config.yaml")
    assert plain.prior == "" and plain.gpt.n_cond == 32


def test_missing_index_of_a_prior_is_named(tiny_weights: Path, tmp_path: Path) -> None:
    config, parts = load_model_dir(tiny_weights)
    for prior, message in (("training_index", "needs coverage.safetensors"), ("magic", "prior is 'magic'")):
        config.prior = prior
        tensors = {part: {name: tensor.clone() for name, tensor in t.items()} for part, t in parts.items()}
        folder = save_model_dir(tmp_path / prior, config, tensors)
        with pytest.raises(WeightsError, match=message):
            ClipGen.from_pretrained(folder, device="cpu")
    config.prior = ""


def test_two_embeddings_reach_the_gpt_concatenated(tiny_weights: Path, tmp_path: Path) -> None:
    config, parts = load_model_dir(tiny_weights)
    config.gpt.n_cond, config.prior = 64, "training_index"
    weight = parts["gpt"]["cond_proj.weight"]
    parts["gpt"]["cond_proj.weight"] = torch.cat([weight, weight.flip(0)], dim=1)
    tensors = {part: {name: tensor.clone() for name, tensor in t.items()} for part, t in parts.items()}
    folder = save_model_dir(tmp_path / "two", config, tensors)
    text = ClipGen.from_pretrained(tiny_weights, device="cpu", dtype="float32").embed("a b")
    images = random_images(40)
    aside = F.normalize(images[0] - (images[0] @ text) * text, dim=0)
    images[0], images[1] = 0.8 * text + 0.6 * aside, 0.6 * text - 0.8 * aside
    tensors = build_index(images, [str(i) for i in range(40)], images[:30])
    write_index(folder, tensors | {"things": torch.tensor([0, 1, 5])})
    pipe = ClipGen.from_pretrained(folder, device="cpu", dtype="float32")
    condition = pipe.condition("a b").unflatten(0, (2, 32))
    assert (condition * images[:2]).sum(1).min() > 0.99
    assert not pipe.condition([("a b", 1.0), ("c", 1.0)])[32:].any(), "a mix becomes one embedding"
    requests = [GenerationRequest("a b", seed=1), GenerationRequest("c", seed=2)]
    for request, output in zip(requests, pipe.generate(requests), strict=True):
        alone = pipe.generate([request])[0].images[0]
        assert np.abs(np.asarray(output.images[0], int) - np.asarray(alone, int)).max() <= 1


# --- the shipped weights ---


@pytest.fixture(scope="module")
def mini(root: Path) -> ClipGen:
    return ClipGen.from_pretrained(root / "weights" / "mini", device="cpu")


def test_prior_of_the_mini_model_changes_neither_images_nor_the_ranking(mini: ClipGen) -> None:
    assert mini.index is not None
    image = Image.new("RGB", (144, 144), (220, 40, 40))
    assert torch.equal(mini.condition(image), torch.cat([mini.embed(image), torch.zeros(384)]))
    text, (moved, unused) = mini.embed("a red heart"), mini.condition("a red heart").view(2, 384)
    before, after = (mini.index.query(place, text_share=0.0) for place in (text, moved))
    assert after.similarity > before.similarity + 0.005 and not unused.any()
    assert "red heart" in after.nearest[0][0]
    result = mini("a red heart", num_outputs=2, seed=0)
    found = mini.clip.encode_image(to_clip(result.images, mini.clip.image_size)).float()
    assert torch.allclose(found @ text, torch.tensor(result.scores), atol=0.03)  # 8-bit rounding, bfloat16


def test_prior_of_the_mini_model_splits_pairs(mini: ClipGen) -> None:
    assert mini.index is not None
    for prompt, names in {
        "a lemon and a dog": {"lemon", "dog"},
        "a red heart and a star": {"red heart", "star"},
    }.items():
        things = mini.condition(prompt).view(2, 384)
        found = [mini.index.query(thing, text_share=0.0).nearest[0][0] for thing in things]
        assert {name.partition(": ")[2] for name in found} == {f"{name}, 3d on white" for name in names}
    lemon, _ = mini.condition("a lemon with hair").view(2, 384)  # nearer alone than any sum of other things
    assert mini.index.query(lemon, text_share=0.0).nearest[0][0].endswith(": lemon, 3d on white")
