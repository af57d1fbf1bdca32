"""The quality benchmark of the mini model: prompts, right and wrong verdicts, copies, training of the judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from judge import PARTS, POSITIONS, Judge, Verdict, crop, is_right, load_judge, soften, stands_as_said
from mini_quality import (
    COPY_SIDE,
    Drawn,
    ceiling,
    differences,
    draw_failures,
    draw_samples,
    near_copies,
    nearest_psnr,
    seen_instead,
    small,
    summarise,
    to_markdown,
)
from PIL import Image
from prompts import KINDS, Prompt, draw_prompts
from scene_kit import RENDERS, draw, scenes
from sheets import CELL, draw_row, draw_sheet

from clipgen import ClipGen
from train.mini.facts import RELATIONS, Facts, Thing, is_held_out
from train.mini.labels import NAMES, UNKNOWN, label, values
from train.mini.scene import Composer
from train.mini.source import Scenes

WORDS = {"dog": ("beagle",), "house": ("old manor",)}
PAIR = Facts((Thing("dog"), Thing("lemon")), "3d", "white", relation="left of")


def verdict(facts: Facts, **changes: str | None) -> Verdict:
    """A verdict with every fact right, with changes."""
    numbers = zip(NAMES, label(facts), strict=True)
    said = {name: None if number == UNKNOWN else values(name)[number] for name, number in numbers}
    return Verdict({**said, **{name.replace("_", " "): value for name, value in changes.items()}})


def test_prompts_are_reproducible_and_differ_between_splits() -> None:
    prompts = draw_prompts("development", 20, WORDS)
    assert prompts == draw_prompts("development", 20, WORDS)
    kinds = [kind for kind in KINDS for _ in range(4 if kind == "example" else 20)]
    assert [prompt.kind for prompt in prompts] == kinds
    same = {prompt.text for prompt in prompts} & {prompt.text for prompt in draw_prompts("test", 20, WORDS)}
    assert len(same) < 60  # of 220: single objects and words are few


def test_prompts_of_held_out_kinds_are_held_out_and_the_others_are_not() -> None:
    for prompt in draw_prompts("test", 30, WORDS)[4:]:
        assert is_held_out(prompt.facts) == prompt.kind.endswith("held out"), prompt
        if prompt.kind == "word":
            assert prompt.text in ("a beagle", "an old manor")


def test_checked_facts_depend_on_the_kind_of_prompt() -> None:
    facts = Facts((Thing("dog", "blue", "hair", ("long", "pink")),), "flat", "beach")
    assert all(is_right(verdict(facts), facts, kind) for kind in KINDS if not kind.startswith(("pair", "count")))
    other = verdict(facts, object="cat")
    assert not any(is_right(other, facts, kind) for kind in ("object", "color held out", "example"))
    changes = {"color": None, "attachment": "bow", "style": "3d"}
    assert not any(is_right(verdict(facts, **{name: value}), facts, "example") for name, value in changes.items())
    assert is_right(other, facts, "style") and is_right(other, facts, "ground")
    assert not is_right(verdict(facts, attachment="bow"), facts, "attachment trained")
    three = Facts((Thing("dog"),), "3d", "white", count=3)
    assert is_right(verdict(three), three, "count") and not is_right(verdict(three, layout="2"), three, "count")


def pair_verdict(**parts: str) -> Verdict:
    """A verdict on a pair: an owl wherever nothing else is said."""
    return replace(verdict(PAIR), parts=dict.fromkeys(PARTS, "owl") | parts)


def test_pair_is_recognised_in_either_order_and_direction_and_stands_as_said_in_one() -> None:
    beside, swapped = pair_verdict(left="dog", right="lemon"), pair_verdict(left="lemon", right="dog")
    stacked = pair_verdict(upper="dog", lower="lemon")
    assert all(is_right(v, PAIR, "pair trained") for v in (beside, swapped, stacked))
    assert [stands_as_said(v, PAIR) for v in (beside, swapped, stacked)] == [True, False, False]
    expected = {"left of": beside, "right of": swapped, "above": stacked, "on": stacked}
    for relation in RELATIONS:
        below = pair_verdict(upper="lemon", lower="dog")
        assert stands_as_said(expected.get(relation, below), replace(PAIR, relation=relation)), relation
    for wrong in (
        pair_verdict(left="dog"),
        pair_verdict(left="dog", lower="lemon"),
        pair_verdict(left="dog", right="dog"),
    ):
        assert not is_right(wrong, PAIR, "pair trained")


def test_each_object_of_a_pair_lies_in_its_part_of_the_image() -> None:
    composer = Composer(RENDERS)
    for relation, places in POSITIONS.items():
        image = Image.fromarray(composer.compose(replace(PAIR, relation=relation), 0))
        covered = {part: (np.asarray(crop(image, box)).min(2) < 235).mean() for part, box in PARTS.items()}
        assert set(sorted(covered, key=lambda part: covered[part])[-2:]) == set(places), (relation, covered)


def test_summary_counts_images_best_images_and_placed_pairs() -> None:
    prompt = next(p for p in draw_prompts("test", 1, WORDS) if p.kind == "pair trained")
    images = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    names = [thing.object for thing in prompt.facts.things]
    right = pair_verdict(**dict(zip(POSITIONS[prompt.facts.relation or ""], names, strict=True)))
    rows = summarise([Drawn(prompt, images, [right, pair_verdict()])])
    expected = {"prompts": 1, "images": 0.5, "best": 1.0, "differences": 1.0, "as_said": 1.0}
    assert rows == {"pair trained": expected}


def test_difference_of_candidates_is_the_mean_over_pairs() -> None:
    images = [Image.new("RGB", (4, 4), (v, v, v)) for v in (0, 51, 102)]
    assert differences(images) == pytest.approx((0.2 + 0.4 + 0.2) / 3, abs=1e-6)


def test_training_scene_is_a_near_copy_and_noise_is_not() -> None:
    source = scenes("40")
    itself = Image.fromarray(source.image(17))
    noise = Image.fromarray(torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy())
    assert near_copies([itself], source, 40) == 1.0
    assert near_copies([itself, noise], source, 40) == 0.5
    assert small([itself]).shape == (1, 3 * COPY_SIDE**2)
    flat = torch.zeros(1, 4)
    assert nearest_psnr(flat, [torch.ones(2, 4), torch.full((1, 4), 0.1)]).item() == pytest.approx(20, abs=1e-3)


def test_ceiling_judges_real_scenes_of_the_prompts_before_and_after_the_tokenizer(tiny_weights: Path) -> None:
    one = Facts((Thing("lemon"),), "3d", "white")
    prompts = [Prompt(kind, "", PAIR if kind.startswith("pair") else one) for kind in KINDS for _ in range(2)]
    pipe = ClipGen.from_pretrained(tiny_weights, dtype="float32")
    found = ceiling(Judge().eval(), pipe.vqgan, Composer(RENDERS, 64), prompts)
    assert list(found) == list(KINDS)
    assert all(0 <= row["tokenizer"] <= 1 and 0 <= row["real"] <= 1 and row["psnr"] > 0 for row in found.values())
    kinds = {kind: {"prompts": 2, "images": 0.5, "best": 1.0, "differences": 0.1} for kind in KINDS}
    report = {"split": "test", "kinds": kinds, "ceiling": found, "scenes": 40, "near_copies": 0.25}
    lines = to_markdown(report).splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert lines[-1] == "Near copies among 40 composed scenes: 25%."


def test_sheet_marks_right_and_wrong_images_and_failures_say_what_is_seen(tmp_path: Path) -> None:
    prompt = next(p for p in draw_prompts("test", 1, WORDS) if p.kind == "attachment trained")
    images = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    wrong = verdict(prompt.facts, attachment=None, object="owl")
    drawn = Drawn(prompt, images, [wrong, verdict(prompt.facts)])
    row = draw_row(images, drawn.right, prompt.text)
    bars = [row.getpixel((x, CELL + 2)) for x in (CELL // 2, CELL + CELL // 2)]
    assert drawn.right == [False, True] and bars[0][0] > bars[0][1] and bars[1][1] > bars[1][0]
    failed, fine = draw_failures([drawn]), draw_failures([replace(drawn, verdicts=drawn.verdicts[::-1])])
    assert len(failed) == 1 and not fine and failed[0].height > row.height
    assert seen_instead(wrong, prompt.kind) == "owl, nothing on it"
    assert seen_instead(verdict(prompt.facts, color=None, object="owl"), "color trained") == "owl, its own color"
    assert seen_instead(pair_verdict(left="dog"), "pair trained") == "dog and owl"
    assert len(draw_samples([drawn] * 5)) == 4
    assert draw_sheet([row] * 4, columns=2).size == (2 * row.width, 2 * row.height)
    assert draw_row(images, drawn.right, "word " * 100).size == row.size


def test_every_second_scene_of_the_judge_is_softened() -> None:
    images = [Image.fromarray(scenes("20").image(row)) for row in range(20)]
    softened = [soften(image, row) for row, image in enumerate(images)]
    for row, (before, after) in enumerate(zip(images, softened, strict=True)):
        assert after.size == before.size and after.mode == before.mode
        assert (after.tobytes() == before.tobytes()) == bool(row % 2)
        assert after.tobytes() == soften(before, row).tobytes()


@pytest.mark.slow
def test_judge_learns_styles_and_grounds_and_is_cached(tmp_path: Path) -> None:
    source = Scenes(RENDERS, draw, seed=7)
    judge = load_judge(source, tmp_path / "judge.safetensors", count=600, epochs=120)
    unseen = [10_000 + i for i in range(100)]
    images = [Image.fromarray(source.image(row)) for row in unseen]
    seen = judge.judge(images)
    right = sum(v.said["style"] == source.facts(row).style for v, row in zip(seen, unseen, strict=True))
    things = sum(v.said["object"] == source.facts(row).things[0].object for v, row in zip(seen, unseen, strict=True))
    assert right > 70 and things > 60  # of 7 styles and 4 objects
    again = load_judge(source, tmp_path / "judge.safetensors", count=600, epochs=120)
    assert again.judge(images[:8]) == seen[:8]
