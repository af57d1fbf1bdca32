"""Quality benchmarks of the emoji model: isolation, ranks, pairs, caches, tables, and one run end to end."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import assess
import end_to_end
import measures
import mini_quality
import pytest
import sheets
import torch
from judge import Gallery, Judge, content_mask, halves, isolate, load_gallery
from originality import Neighbour, TrainingImages, summarise_originality
from PIL import Image, ImageChops, ImageDraw, ImageStat
from prompts import Prompt, read_prompts

from train.mini.captions import COLOURS

BLUE, WHITE = (50, 110, 220), (255, 255, 255)


def shape(name: str, size: int = 160) -> Image.Image:
    """A shape on a transparent background, like a render."""
    image = Image.new("RGBA", (size, size))
    pen, end = ImageDraw.Draw(image), size - 8
    if name == "disc":
        pen.ellipse((8, 8, end, end), fill=(220, 40, 40, 255))
        pen.ellipse((50, 50, 70, 70), fill=(*BLUE, 255))  # an enclosed spot in a background colour
    elif name == "square":
        pen.rectangle((20, 20, end - 12, end - 12), fill=(40, 160, 70, 255))
    elif name == "stripes":
        for x in range(8, end, 30):
            pen.rectangle((x, 8, x + 12, end), fill=(20, 20, 20, 255))
    elif name == "triangle":
        pen.polygon([(size // 2, 8), (8, end), (end, end)], fill=(250, 200, 30, 255))
    return image


def place(
    names: list[str], colour: tuple[int, int, int], side: int = 60, size: int = 144, lower: int = 20
) -> Image.Image:
    """Shapes side by side, small and off-centre, the second `lower` px further down."""
    canvas = Image.new("RGBA", (size, size), (*colour, 255))
    for i, name in enumerate(names):
        sprite = shape(name).resize((side, side), Image.Resampling.LANCZOS)
        canvas.alpha_composite(sprite, (6 + i * 70, 10 + lower * i))
    return canvas.convert("RGB")


def difference(a: Image.Image, b: Image.Image) -> float:
    return sum(ImageStat.Stat(ImageChops.difference(a, b)).mean) / 3


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of four emoji in two styles, in the format of `train.mini.emoji`."""
    folder = tmp_path_factory.mktemp("emoji")
    names = ["disc", "square", "stripes", "triangle"]
    for style in ("noto", "flat"):
        (folder / "renders" / style).mkdir(parents=True)
        for name in names:
            image = shape(name)
            image = image if style == "noto" else image.resize((120, 120)).resize((160, 160))
            image.save(folder / "renders" / style / f"{name}.png")
    for split in ("train", "stage2", "heldout", "unseen"):
        (folder / split).mkdir()
        rows = []
        for i, name in enumerate(names[:3] if split != "unseen" else names[3:]):
            place([name], WHITE, side=120).save(folder / split / f"{i}.png")
            rows.append({"file_name": f"{i}.png", "objects": [name], "style": "noto", "background": "white"})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    emoji = [{"code": name, "name": name, "keywords": [], "group": 0} for name in names]
    (folder / "emoji.jsonl").write_text("".join(json.dumps(row) + "\n" for row in emoji))
    return folder


@pytest.fixture(scope="module")
def gallery(data: Path, judge: Judge) -> Gallery:
    return load_gallery(data, judge)


def test_default_prompts_are_sixty_of_five_kinds(root: Path) -> None:
    prompts = read_prompts()
    counts = {"object": 24, "style": 10, "background": 8, "synonym": 10, "pair": 8}
    assert Counter(p.kind for p in prompts) == counts
    assert len({p.text for p in prompts}) == 60
    assert all(p.background for p in prompts if p.kind == "background")
    assert {p.text for p in prompts if p.line_art} >= {"black and white drawing of a cat", "sketch of a lemon"}
    if (root / "data/emoji/judge.safetensors").is_file():
        codes = {path.stem for path in (root / "data/emoji/renders").glob("*/*.png")}
        stub = Gallery(torch.empty(len(codes), 1), sorted(codes), [""] * len(codes))
        measures.check_prompts(prompts, stub, root / "data/emoji")


@pytest.mark.parametrize(
    ("name", "kind", "count"), [("words", "synonym", 42), ("mixes", "pair", 12), ("backgrounds", "background", 80)]
)
def test_other_prompt_files_have_the_counts_of_the_model_card(root: Path, name: str, kind: str, count: int) -> None:
    prompts = read_prompts(root / "benchmarks" / f"{name}.txt")
    assert {p.kind for p in prompts} == {kind} and len({p.text for p in prompts}) == len(prompts) == count
    assert {p.background for p in prompts} == ({None} if kind != "background" else {*COLOURS} - {"white"})


@pytest.mark.parametrize("line", ["animal\ta cat\t1f408", "object\ta cat", "object", "pair\ta\tb", "object\ta\tb\tc"])
def test_malformed_prompt_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"# comment\n\n{line}\n")
    with pytest.raises(ValueError, match=r"prompts\.txt:3"):
        read_prompts(path)


def test_prompts_for_unknown_or_unseen_emoji_are_refused(gallery: Gallery, data: Path) -> None:
    measures.check_prompts([Prompt("object", "a disc", (("disc",),))], gallery, data)
    for code, reason in (("triangle", "unseen"), ("cube", "no render")):
        with pytest.raises(ValueError, match=reason):
            measures.check_prompts([Prompt("object", "x", ((code,),))], gallery, data)


@pytest.mark.parametrize("colour", [WHITE, BLUE, (20, 20, 22), (250, 220, 60)])
def test_isolation_removes_place_size_and_background(colour: tuple[int, int, int]) -> None:
    for name in ("disc", "square"):
        canonical = Image.new("RGBA", (160, 160), WHITE)
        canonical.alpha_composite(shape(name))
        assert difference(isolate(place([name], colour)), isolate(canonical)) < 6
        assert difference(place([name], colour).resize((128, 128)), isolate(canonical)) > 30


def test_isolation_keeps_enclosed_areas_and_images_without_a_plain_background() -> None:
    disc = isolate(place(["disc"], BLUE, side=120), 128)
    assert sum(abs(a - b) for a, b in zip(disc.getpixel((46, 46)), BLUE, strict=True)) < 60
    noise = Image.effect_noise((64, 64), 120).convert("RGB")
    assert content_mask(noise).all()
    blank = Image.new("RGB", (64, 64), BLUE)
    assert isolate(blank, 32).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("turn", [None, Image.Transpose.ROTATE_90, Image.Transpose.FLIP_LEFT_RIGHT])
@pytest.mark.parametrize("lower", [20, 70])
def test_halves_separate_two_objects(turn: Image.Transpose | None, lower: int) -> None:
    """Side by side, one above the other, and in opposite corners."""

    def turned(names: list[str], colour: tuple[int, int, int]) -> Image.Image:
        image = place(names, colour, lower=lower)
        return image if turn is None else image.transpose(turn)

    found = [isolate(half) for half in halves(turned(["disc", "square"], BLUE))]
    alone = [isolate(turned([name], WHITE)) for name in ("disc", "square")]
    assert min(difference(found[0], alone[0]), difference(found[1], alone[0])) < 6
    assert min(difference(found[0], alone[1]), difference(found[1], alone[1])) < 6


def test_rank_counts_nearer_classes() -> None:
    features = torch.eye(4)[[0, 1, 1, 2]] + 0.0
    gallery = Gallery(features, ["a", "b", "a", "c"], ["flat", "flat", "noto", "noto"])
    query = torch.nn.functional.normalize(torch.tensor([[0.1, 0.9, 0.5, 0.0]]), dim=-1)
    assert gallery.ranks(query, [["c"]]) == [2]
    assert gallery.ranks(query, [["a"]]) == [0]  # as near as b, by its second style
    assert gallery.ranks(query, [["a"]], without=[("noto", "a")]) == [2]
    assert gallery.ranks(query, [["c", "b"]]) == [0]
    with pytest.raises(ValueError, match="z"):
        gallery.ranks(query, [["z"]])


def test_judge_recognises_shapes_on_colours_and_in_pairs(judge: Judge, gallery: Gallery) -> None:
    names = ["disc", "square", "stripes", "triangle"]
    features = judge.features([place([name], BLUE) for name in names])
    assert features.norm(dim=-1) == pytest.approx(torch.ones(4), abs=1e-4)
    assert gallery.ranks(features, [[name] for name in names]) == [0, 0, 0, 0]
    pair = place(["disc", "square"], WHITE)
    for groups in ((["disc"], ["square"]), (["square"], ["disc"])):
        assert measures.pair_ranks(gallery, measures.half_features(judge, [pair, pair]), groups) == [0, 0]
    assert measures.pair_ranks(gallery, measures.half_features(judge, [pair]), (["disc"], ["disc"]))[0] > 0


def test_real_pairs_are_composed_in_both_orders_and_recognised(judge: Judge, gallery: Gallery, data: Path) -> None:
    prompt = Prompt("pair", "a disc and something", (("disc",), ("square", "triangle", "nowhere")))
    drawn = measures.compose_pairs(prompt, data / "renders" / "flat", 144)
    assert len(drawn) == 4 and drawn[0].tobytes() != drawn[1].tobytes()
    assert measures.pair_ranks(gallery, measures.half_features(judge, drawn), prompt.groups[:1] * 2) != [0] * 4
    groups = [["disc"], ["square", "triangle"]]
    assert measures.pair_ranks(gallery, measures.half_features(judge, drawn), groups) == [0] * 4
    assert measures.compose_pairs(prompt, data / "renders" / "nowhere", 144) == []


def test_gallery_is_cached_until_its_renders_change(
    judge: Judge, data: Path, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judge, "features", lambda *_: pytest.fail("computed again"))
    assert torch.equal(load_gallery(data, judge).features, gallery.features)
    extra = data / "renders" / "flat" / "extra.png"
    shape("square").save(extra)
    try:
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            load_gallery(data, judge)
    finally:
        extra.unlink()


def test_missing_renders_are_refused_with_the_command_that_makes_them(tmp_path: Path, judge: Judge) -> None:
    with pytest.raises(ValueError, match="make emoji"):
        load_gallery(tmp_path, judge)


def test_psnr_is_relative_to_the_pixel_range() -> None:
    x = torch.zeros(2, 3, 4, 4)
    y = x + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)  # 0.1 and 0.01 of the range
    assert measures.psnr(x, y, 2).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)


def test_look_is_checked_only_if_the_prompt_names_it() -> None:
    blue, white = place(["square"], (60, 100, 210)), place(["square"], WHITE)
    lines = place(["stripes"], WHITE)
    on_blue = Prompt("background", "a square on a blue background", (("square",),))
    sketch = Prompt("style", "sketch of stripes", (("stripes",),))
    assert assess.check_look(on_blue, [blue, white]) == [True, False]
    assert assess.check_look(sketch, [lines, blue]) == [True, False]
    assert assess.check_look(Prompt("object", "a square", (("square",),)), [blue]) is None
    assert assess.background_name(Image.effect_noise((64, 64), 120).convert("RGB")) is None


def test_summary_has_shares_by_kind() -> None:
    def drawn(kind: str, ranks: list[int], look: list[bool] | None = None) -> assess.Drawn:
        image, neighbours = (
            Image.new("RGB", (8, 8), BLUE),
            [Neighbour(25.0 - 10 * i, "a disc") for i in range(len(ranks))],
        )
        return assess.Drawn(Prompt(kind, "x", (("a",),)), [image] * len(ranks), [], ranks, ["b"], look, neighbours)

    rows = [drawn("object", [7, 4, 0, 5]), drawn("object", [0, 0, 0, 0]), drawn("style", [9] * 4, [True, False] * 2)]
    table = assess.summarise(rows)
    expected = {"prompts": 2, "images": 6 / 8, "nearest": 5 / 8, "best": 0.5, "any": 1.0}
    assert table["object"] == expected | {"median_psnr": 5.0, "near_copies": 1 / 4}
    assert table["style"]["look"] == 0.5
    assert table["all"]["images"] == 6 / 12
    assert "pair" not in table
    failures = sheets.draw_failures(rows, columns=1)
    assert failures is not None and failures.height == 2 * sheets.draw_failures(rows[:1], columns=1).height
    assert sheets.draw_failures(rows[1:2]) is None


def test_copy_moved_by_a_pixel_is_found_and_another_drawing_is_not(data: Path) -> None:
    training = TrainingImages(data)
    copy = ImageChops.offset(place(["square"], WHITE, side=120), 1, 0)
    small = place(["square"], WHITE, side=50)
    found = training.nearest([copy, small, place(["triangle"], BLUE)])
    assert found[0].shows == "square, noto, white" and found[0].psnr > 20
    assert [n.near_copy for n in found] == [True, False, False]
    assert summarise_originality([found[:1], found[1:]])["near_copies"] == pytest.approx(1 / 3)


def test_run_measures_all_kinds_and_writes_grid_and_reports(
    tiny_weights: Path, data: Path, tmp_path: Path, gallery: Gallery
) -> None:
    prompts = tmp_path / "prompts.txt"
    lines = ["object\ta disc\tdisc", "style\tsketch of stripes\tstripes", "pair\ta disc and a square\tdisc\tsquare"]
    prompts.write_text("\n".join([*lines, "background\ta disc on a red background\tdisc square"]))
    report = mini_quality.run(tiny_weights, data, tmp_path / "out", prompts)
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    assert [len(row["ranks"]) for row in report["prompts"]] == [4] * 4
    assert report["kinds"]["all"]["images"] <= 1 and report["judge"]["classes"] == 4
    assert report["retrieval"]["recall_10"] == 1  # of three images
    assert math.isfinite(report["reconstruction"]["unseen"]["psnr"])
    assert 0 < report["reconstruction"]["codes_used"] <= 1 <= report["reconstruction"]["perplexity"] <= 64
    grid = Image.open(tmp_path / "out/grid.png")
    assert grid.width > 3 * 4 * sheets.CELL and grid.height > 2 * sheets.CELL
    assert "| pair | 1 |" in (tmp_path / "out/report.md").read_text()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_prompts_of_pairs_only_are_measured(tiny_weights: Path, data: Path, tmp_path: Path, gallery: Gallery) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("pair\ta disc and a square\tdisc\tsquare")
    report = mini_quality.run(tiny_weights, data, tmp_path / "out", prompts)
    assert "known_style_pairs" in report["judge"] and "prompted_emoji_after_vqgan" not in report["judge"]
    assert all(" and " in taken_for for taken_for in report["prompts"][0]["nearest"])


@pytest.mark.slow
def test_end_to_end_measures_a_fresh_process_and_reports_its_failure(tiny_weights: Path, tmp_path: Path) -> None:
    cold = end_to_end.time_cold(tiny_weights)
    assert 0 < cold["first_image"] <= cold["exit"] < end_to_end.TIMEOUT
    warm = end_to_end.time_warm(tiny_weights, repeats=2)
    assert {"decode_tokens", "rank", "save", "total"} <= set(warm["next_call"])
    with pytest.raises(ValueError, match="no such folder"):
        end_to_end.time_cold(tmp_path / "nowhere")
