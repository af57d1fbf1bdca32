"""Training data of the mini model's CLIP: facts as labels, words of WordNet, and its towers."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from scene_kit import scenes
from training_kit import run

from clipgen.errors import DataError
from clipgen.models.clip import Clip
from train.loop.checkpoint import save_tensors
from train.loop.lock import lock_folder
from train.mini import image_tower, text_tower
from train.mini.describe import describe
from train.mini.facts import Facts, Thing
from train.mini.labels import NAMES, UNKNOWN, Heads, accuracy, heads_loss, label, values
from train.mini.objects import read_objects
from train.mini.text_tower import describe_rows, embed_pool, encode_tokens
from train.mini.towers import EMBED_DIM, SIZE, LabelledScenes, build_clip, embed
from train.mini.wordnet import narrower_words

DATA_NOUN = """  1 This is the licence.
00000001 05 n 02 dog 0 domestic_dog 0 003 @ 00000009 n 0000 ~ 00000002 n 0000 ~ 00000003 n 0000 | a pet; "he barked"
00000002 05 n 01 beagle 0 001 @ 00000001 n 0000 | a small hound
00000003 05 n 02 Rover 0 mutt 0 001 @ 00000001 n 0000 | a mongrel
00000004 20 n 01 tree 0 001 ~ 00000005 n 0000 | a tall plant
00000005 20 n 02 palm_tree 0 palm 0 002 @ 00000004 n 0000 ~ 00000006 n 0000 | a tropical tree
00000006 20 n 01 royal_palm 0 001 @ 00000005 n 0000 | a tall palm
00000007 07 n 01 mutt 1 000 | stupidity
00000008 05 n 01 beagle 1 000 | something else
"""
INDEX_NOUN = """  1 This is the licence.
dog n 1 1 @ 1 0 00000001
domestic_dog n 1 1 @ 1 0 00000001
beagle n 2 1 @ 2 0 00000002 00000008
mutt n 2 1 @ 2 0 00000007 00000003
rover n 1 1 @ 1 0 00000003
tree n 1 1 @ 1 0 00000004
palm_tree n 1 1 @ 1 0 00000005
palm n 1 1 @ 1 0 00000005
royal_palm n 1 1 @ 1 0 00000006
"""


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    (tmp_path / "data.noun").write_text(DATA_NOUN)
    (tmp_path / "index.noun").write_text(INDEX_NOUN)
    return tmp_path


def test_labels_hold_every_fact_and_mark_absent_ones_unknown() -> None:
    thing = Thing("lemon", "blue", "hair", ("long", "pink"))
    found = dict(zip(NAMES, label(Facts((thing,), "oil painting", "red", "teal")), strict=True))
    said = {name: values(name)[number] for name, number in found.items() if number != UNKNOWN}
    assert said == {
        "object": "lemon",
        "attachment": "hair",
        "cut": "long",
        "hair color": "pink",
        "color": "blue",
        "layout": "1",
        "style": "oil painting",
        "ground": "red",
        "second ground": "teal",
    }
    pair = dict(zip(NAMES, label(Facts((Thing("dog"), Thing("tree")), "3d", "sea", relation="on")), strict=True))
    assert values("second object")[pair["second object"]] == "tree" and values("layout")[pair["layout"]] == "on"
    assert pair["cut"] == UNKNOWN


def test_hair_colour_in_a_pencil_sketch_is_unknown() -> None:
    facts = Facts((Thing("lemon", None, "hair", ("long", "black")),), "sketch", "white")
    assert label(facts)[NAMES.index("hair color")] == UNKNOWN


def test_heads_loss_ignores_unknown_labels_and_counts_known_ones() -> None:
    torch.manual_seed(0)
    heads = Heads(8)
    x = F.normalize(torch.randn(2, 8), dim=-1)
    nothing = torch.full((2, len(NAMES)), UNKNOWN)
    assert heads_loss(heads(x), nothing).item() == 0
    labels = nothing.clone()
    labels[0, NAMES.index("style")] = 3
    expected = 0.3 * F.cross_entropy(heads(x)[NAMES.index("style")][:1], torch.tensor([3]))
    assert heads_loss(heads(x), labels).item() == pytest.approx(expected.item(), rel=1e-5)
    logits = heads(x)
    logits[NAMES.index("style")][0] = F.one_hot(torch.tensor(3), 7).float()
    assert accuracy(logits, labels) == {"style": 1.0}


def test_scenes_without_an_attachment_do_not_raise_its_accuracy() -> None:
    labels = torch.tensor([label(Facts((Thing("lemon"),), "3d", "white"))])
    assert "attachment" not in accuracy(Heads(8)(torch.zeros(1, 8)), labels)


def test_narrower_words_belong_to_the_nearest_object(wordnet: Path) -> None:
    objects = [read_objects()[name] for name in ("dog", "tree", "palm tree")]
    found = narrower_words(wordnet, objects)
    assert found["dog"] == ("beagle", "domestic dog", "mutt")  # not Rover: names begin with a capital
    assert found["palm tree"] == ("royal palm",)
    assert found["tree"] == ()  # what is left belongs to the palm tree, and "palm" is its name


def test_missing_wordnet_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="wordnet-base"):
        narrower_words(tmp_path, read_objects().values())


def test_narrower_words_replace_the_name_of_an_object_in_sentences() -> None:
    rng = random.Random(0)
    facts = Facts((Thing("dog"),), "3d", "white")
    texts = [describe(facts, rng, {"dog": ("beagle",)}) for _ in range(200)]
    assert 40 < sum("beagle" in text for text in texts) < 100
    assert not any("beagle" in describe(facts, rng, {"cat": ("beagle",)}) for _ in range(50))


def test_pool_of_embeddings_is_computed_again_for_another_image_tower(tmp_path: Path) -> None:
    file, cache, world = tmp_path / "image.safetensors", tmp_path / "pool.safetensors", LabelledScenes(scenes("20"))
    found = []
    for seed in (0, 1, 1):
        torch.manual_seed(seed)
        save_tensors(build_clip().visual.state_dict(), file)
        found.append(embed_pool(file, world, 3, cache, torch.device("cpu")))
    assert found[0].shape == (3, EMBED_DIM) and not torch.allclose(found[0], found[1], atol=0.01)
    assert torch.allclose(found[1], found[2], atol=1e-3)  # kept in half precision
    assert not torch.equal(found[1], found[2])  # read, not computed


@pytest.mark.parametrize("tower", [image_tower, text_tower])
def test_folder_in_which_a_tower_trains_is_refused(
    tower: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock_folder(tmp_path), pytest.raises(SystemExit) as stopped:
        run(tower, monkeypatch, "--out", tmp_path, "--data", tmp_path)
    assert stopped.value.code == 2 and f"is being written by process {os.getpid()}" in capsys.readouterr().err


def test_towers_load_as_an_openai_clip_with_one_embedding_space() -> None:
    torch.manual_seed(0)
    model = build_clip().eval()
    data = LabelledScenes(scenes("20"))
    pixels, labels = data.batch([3, 4])
    assert pixels.shape == (2, 3, SIZE, SIZE) and pixels.dtype == torch.uint8 and labels.shape == (2, len(NAMES))
    tokens, again = describe_rows(data, [3, 4], {}, 0)
    assert torch.equal(labels, again)
    clip = Clip.from_state_dict(model.state_dict())
    assert (clip.image_size, clip.embed_dim) == (SIZE, EMBED_DIM)
    with torch.no_grad():
        assert embed(model.visual, pixels).shape == encode_tokens(model, tokens).shape == (2, EMBED_DIM)
    weights = sum(tensor.numel() for tensor in model.state_dict().values())
    assert 2 * weights < 29e6  # bytes in half precision; 46.3 MB with VQGAN and GPT
