"""Emoji art for the mini model: from npm packages to images with captions."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from train.mini import emoji as emoji_script
from train.mini.captions import COLOURS, STYLES, article, caption, plural
from train.mini.clip_data import augment, build_mini_clip, recall
from train.mini.clip_image import Heads, heads_loss
from train.mini.clip_text import encode_tokens, name_places
from train.mini.emoji import SETS, WEBP_SET, normalise, plan_drawn, read_emoji
from train.mini.words import picture_captions
from train.mini.words import read_emoji as read_written_emoji

LEMON, HEART, DOG, STAR = "1f34b", "2764", "1f436", "2b50"
NAMES = {LEMON: "lemon", HEART: "red-heart", DOG: "dog-face", STAR: "star"}


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node_modules folder with four emoji in every set, and entries that must be left out."""
    root = tmp_path_factory.mktemp("npm")
    colours = {"lemon": "gold", "red-heart": "red", "dog-face": "brown", "star": "orange"}
    icons = {name: {"body": f'<circle cx="16" cy="16" r="12" fill="{c}"/>'} for name, c in colours.items()}
    for package in SETS.values():
        folder = root / package
        folder.mkdir(parents=True)
        (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 32, "height": 32}))
        (folder / "chars.json").write_text(json.dumps({f"{code}-fe0f": name for code, name in NAMES.items()}))
    assets = root / WEBP_SET / "assets"
    assets.mkdir(parents=True)
    for code in (*NAMES, "1f1e9-1f1ea"):  # a flag too
        Image.new("RGBA", (64, 64), (9, 99, 199, 255)).save(assets / f"{code}.webp")
    data = [
        {"hexcode": "1F34B", "label": "lemon", "tags": ["citrus", "fruit"], "group": 4},
        {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"], "group": 0},
        {"hexcode": "1F436", "label": "dog face", "tags": ["pet"], "group": 3},
        {"hexcode": "2B50", "label": "star", "tags": [], "group": 3},
        {"hexcode": "1F468-200D-2695-FE0F", "label": "man health worker", "tags": [], "group": 1, "gender": 1},
        {"hexcode": "1F1E9-1F1EA", "label": "flag: Germany", "tags": [], "group": 9},
        {"hexcode": "1F3FB", "label": "light skin tone", "tags": [], "group": 2},
    ]
    (root / "emojibase-data/en").mkdir(parents=True)
    (root / "emojibase-data/en/data.json").write_text(json.dumps(data))
    return root


@pytest.fixture(scope="module")
def data(npm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the script: one emoji unseen, one held out in Noto's drawing."""
    out = tmp_path_factory.mktemp("emoji")
    counts = ["--views", "3", "--pairs", "4", "--drawn-pairs", "5", "--heldout", "1", "--unseen", "1"]
    arguments = ["--size", "48", *counts, "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["emoji", "--npm", str(npm), "--out", str(out), *arguments])
        emoji_script.main()
    return out


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_only_base_emoji_are_read(npm: Path) -> None:
    assert [e.code for e in read_emoji(npm)] == [LEMON, HEART, DOG, STAR]
    assert normalise("2764-FE0F") == HEART


def test_splits_share_no_drawing_and_unseen_emoji_are_in_none_other(data: Path) -> None:
    train, heldout, unseen = (records(data / name) for name in ("train", "heldout", "unseen"))
    assert len(train) == 3 * (3 * 6 - 1) + 4
    drawn = {(r["style"], code) for r in train for code in r["objects"]}
    assert not drawn & {(r["style"], code) for r in heldout for code in r["objects"]}
    assert not {code for _, code in drawn} & {code for r in unseen for code in r["objects"]}
    stage2 = records(data / "stage2")
    assert {(r["style"], code) for r in stage2 for code in r["objects"]} <= drawn
    single, pairs = [[r for r in stage2 if len(r["objects"]) == count] for count in (1, 2)]
    assert len(single) + len(pairs) == len(stage2) and len(pairs) == 3 + 5
    assert sum(len(set(r["objects"])) == 1 for r in pairs) == 3
    assert {(r["style"], r["background"]) for r in pairs} == {("3d", "white")}
    assert [r["style"] for r in single].count("3d") == 3 * 12 and [r["style"] for r in single].count("line") == 3 * 2
    assert len({(r["objects"][0], r["style"], r["background"]) for r in single}) == len(single)
    assert sum(r["background"] == "white" for r in single) == 3 * 2
    assert {r["style"] for r in heldout} == {"noto"} and {r["style"] for r in unseen} == set(STYLES)


def test_pairs_lie_in_opposite_corners_and_for_clip_side_by_side(data: Path) -> None:
    drawn, seen = records(data / "stage2"), records(data / "seen")
    assert [r["objects"] for r in drawn] == [r["objects"] for r in seen]
    for there, here in zip(drawn, seen, strict=True):
        assert there["file_name"] == here["file_name"]
        masks = [np.asarray(Image.open(data / split / there["file_name"])).min(2) < 250 for split in ("stage2", "seen")]
        if len(there["objects"]) == 1:
            assert (masks[0] == masks[1]).all()
            continue
        diagonal, level = masks  # of 48 px
        assert not diagonal[:20, 28:].any() and not diagonal[28:, :20].any()
        assert diagonal[:28, :28].any() and diagonal[28:, 28:].any()
        assert not level[:10].any() and not level[-10:].any() and level[:, :24].any() and level[:, 24:].any()


def test_people_are_in_no_pair() -> None:
    renders = [("3d", code) for code in "abcdef"]
    pairs = [r["objects"] for r in plan_drawn(renders, {"a", "b"}, 30, 0) if len(r["objects"]) == 2]
    assert {code for objects in pairs for code in objects} == set("cdef")


def test_images_have_the_background_that_their_metadata_names(data: Path) -> None:
    for record in records(data / "train"):
        image = Image.open(data / "train" / record["file_name"])
        assert image.size == (48, 48) and image.mode == "RGB"
        if len(record["objects"]) == 1:
            corner = np.median(np.asarray(image)[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
            assert np.abs(corner - COLOURS[record["background"]]).max() <= 12 or record["style"] == "3d"


def test_renders_keep_the_artists_colours(data: Path) -> None:
    centre = Image.open(data / "renders" / "noto" / f"{LEMON}.png").getpixel((80, 80))
    assert centre == (255, 215, 0, 255)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["emoji", "--npm", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        emoji_script.main()
    assert stop.value.code == 2 and "emojibase-data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_captions_name_objects_style_and_colour(data: Path) -> None:
    emoji = read_written_emoji(data)
    rng = random.Random(0)
    lemon, dog = emoji[LEMON], emoji[DOG]
    texts = [caption([lemon, dog], "line", "blue", rng) for _ in range(200)]
    words = {"lemon", "citrus", "fruit"}
    assert all(any(w in t for w in words) and any(w in t for w in ("dog", "pet")) for t in texts)
    assert all("blue" in t for t in texts)
    assert all("sketch" in t or "drawing" in t or "line art" in t for t in texts)
    plain = [caption([lemon], "3d", "white", rng) for _ in range(200)]
    assert 0 < sum("white" in t for t in plain) < 50 < sum("3d" in t for t in plain) < 150
    twice = [caption([lemon, lemon], "3d", "white", rng) for _ in range(200)]
    assert all(" and a" not in t and any(w in t for w in ("lemons", "citruses", "fruits")) for t in twice)
    assert any(t == "two lemons" for t in twice)
    assert [plural(noun) for noun in ("lemon", "box", "cherry", "toy", "scissors")] == [
        "lemons",
        "boxes",
        "cherries",
        "toys",
        "scissors",
    ]
    assert [article(noun) for noun in ("lemon", "apple", "glass", "scissors")] == [
        "a lemon",
        "an apple",
        "a glass",
        "scissors",
    ]


def test_captions_are_the_same_for_the_same_seed(data: Path) -> None:
    emoji = read_written_emoji(data)
    assert picture_captions(data, "train", emoji, 3, seed=1) == picture_captions(data, "train", emoji, 3, seed=1)


def test_training_pass_of_the_mini_clip_equals_its_text_tower() -> None:
    torch.manual_seed(0)
    model = build_mini_clip().eval()
    tokens = torch.zeros(2, 32, dtype=torch.long)
    tokens[0, :4] = torch.tensor([49406, 320, 7184, 49407])
    tokens[1, :6] = torch.tensor([49406, 320, 1929, 593, 320, 49407])
    with torch.no_grad():
        expected = F.normalize(model.encode_text(tokens), dim=-1)
        assert torch.allclose(encode_tokens(model, tokens[:, :6]), expected, atol=1e-5)


def test_loss_of_image_heads_is_low_at_the_prototypes_only() -> None:
    names = F.normalize(torch.randn(5, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    heads = Heads(names)
    labels = torch.tensor([[i, i, 0, 0] for i in range(5)])
    right, *_ = heads_loss(heads(names), labels)
    wrong, *_ = heads_loss(heads(names.roll(1, 0)), labels)
    assert right < 0.01 and wrong > 10


def test_place_of_a_name_is_its_glossy_image_on_white() -> None:
    looks = [(LEMON, "3d", "red"), (LEMON, "3d", "white"), (LEMON, "line", "white"), (DOG, "line", "white")]
    records = [{"objects": [code], "style": style, "background": ground} for code, style, ground in looks]
    records.append({"objects": [LEMON, DOG], "style": "3d", "background": "white"})
    embeddings = torch.eye(5)
    assert name_places(records, embeddings, {LEMON: 0, DOG: 1}).equal(embeddings[[1, 3]])


def test_recall_counts_ranks() -> None:
    images = F.normalize(torch.eye(12) + 0.01, dim=1)
    codes = [str(i) for i in range(12)]
    assert recall(images, images, codes, codes) == {"recall_1": 1.0, "recall_5": 1.0, "recall_10": 1.0}
    shifted = recall(images.roll(1, 0), images, codes, codes)
    assert shifted["recall_1"] == 0.0


def test_augment_moves_pixels_and_keeps_colours() -> None:
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    moved = augment(pixels, torch.Generator().manual_seed(0))
    assert moved.shape == pixels.shape and moved.dtype == torch.uint8
    assert set(moved.unique().tolist()) <= set(pixels.unique().tolist())
    assert not torch.equal(moved, pixels)
