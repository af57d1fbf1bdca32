"""`clipgen sheet` and `clipgen morph`: cells equal the images of `generate`, labels fit, mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_kit import Run, assert_refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import Result

from clipgen.cli.morph import arc
from clipgen.errors import DataError
from clipgen.images.grids import labelled_grid, save_gif
from clipgen.images.pixels import read_metadata
from clipgen.outputs.metadata import KEY

HERE = ("--seed", 7, "--device", "cpu", "--dtype", "float32", "--json")


def record(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def near(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()) <= 1


def test_cell_of_a_sheet_equals_the_image_of_generate(run: Run) -> None:
    found = record(run("sheet", "a lemon", "--guidance", "1,3", "--top-k", "4,8,16", "--temperature", "0.9", *HERE))
    assert found["axes"] == {"guidance": [1, 3], "top_k": [4, 8, 16]} and len(found["clip_scores"]) == 6
    sheet = Image.open(found["file"]).convert("RGB")
    cells = json.loads(read_metadata(found["file"])[KEY])
    assert [(cell["guidance"], cell["top_k"]) for cell in cells] == [(g, k) for g in (1, 3) for k in (4, 8, 16)]
    assert {cell["seed"] for cell in cells} == {7} and {cell["temperature"] for cell in cells} == {0.9}
    one = ("--num-outputs", 1, "--candidates", 1, "--guidance", 3, "--top-k", 8, "--temperature", 0.9)
    (file,) = record(run("generate", "a lemon", *one, *HERE))["files"]
    left, top = sheet.width - (3 * 34 - 2), sheet.height - (2 * 34 - 2)
    assert near(sheet.crop((left + 34, top + 34, left + 66, top + 66)), Image.open(file).convert("RGB"))


def test_negative_prompt_applies_to_every_cell(run: Run) -> None:
    found = record(run("sheet", "a lemon", "--guidance", "2,3", "--negative", "a dog", *HERE))
    cells = json.loads(read_metadata(found["file"])[KEY])
    assert [[part["text"] for part in cell["negative"]] for cell in cells] == [["a dog"]] * 2
    refused = run("sheet", "a lemon", "--guidance", "1,2", "--negative", "a dog", *HERE)
    assert refused.exit_code == 2 and "guidance is 1" in refused.stderr


def test_sheet_of_one_setting_is_a_row(run: Run) -> None:
    found = record(run("sheet", "a lemon", "--guidance", "1,2,4,8", *HERE))
    assert found["axes"] == {"guidance": [1, 2, 4, 8]}
    assert Image.open(found["file"]).width == 4 * 34 - 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["a"], ["must vary", "none"]),
        (["a", "--guidance", "1"], ["must vary", "none"]),
        (["a", "--guidance", "1,2", "--top-k", "1,2", "--top-p", "0.5,1"], ["guidance, top_k, top_p"]),
        (["a", "--guidance", "1,x"], ["--guidance", "1,x"]),
        (["a", "--guidance", "1,"], ["--guidance", "1,"]),
        (["a", "--guidance", "1,1"], ["repeats a value"]),
        (["a", "--top-k", "1.5,2"], ["whole numbers"]),
        (["a", "--guidance", "1,99"], ["guidance", "99"]),
        (["a", "--guidance", "1,nan"], ["guidance", "nan"]),
        (["a", "--top-k", ",".join(map(str, range(101)))], ["101 cells"]),
        (["", "--guidance", "1,2"], ["empty"]),
        (["\udcff", "--guidance", "1,2"], ["UTF-8"]),
    ],
)
def test_mistake_in_sheet_is_one_line(run: Run, args: list[str], words: list[str]) -> None:
    assert_refused(run("sheet", *args), *words)


def test_sheet_too_wide_for_webp_is_refused_before_it_is_drawn(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipgen.cli.sheet.MAX_WEBP", 90)  # three cells of 32 px
    flags = ("sheet", "a lemon", "--guidance", "1,2,3", "--device", "cpu")
    result = run(*flags, "--format", "webp")
    assert result.exit_code == 2 and "more than 96 px wide; WebP has 90: use --format png" in result.stderr
    assert run(*flags).exit_code == 0


def test_morph_strip_ends_with_the_images_of_generate(run: Run) -> None:
    found = record(run("morph", "a lemon", "a heart", "--steps", 5, *HERE))
    strip, cells = Image.open(found["file"]), json.loads(read_metadata(found["file"])[KEY])
    assert strip.width == 5 * 34 - 2 and len(found["clip_scores"]) == len(cells) == 5
    assert [len(cell["prompt"]) for cell in cells] == [1, 2, 2, 2, 1]
    assert {cell["image_seed"] for cell in cells} == {7}
    (file,) = record(run("generate", "a heart", "--num-outputs", 1, "--candidates", 1, *HERE))["files"]
    box = (strip.width - 32, strip.height - 32, strip.width, strip.height)
    assert near(strip.convert("RGB").crop(box), Image.open(file).convert("RGB"))


def test_gif_of_a_morph_plays_forward_and_back(run: Run) -> None:
    found = record(run("morph", "a lemon", "a heart", "--steps", 4, "--gif", *HERE))
    with Image.open(found["file"]) as animation:
        assert animation.format == "GIF" and animation.info["loop"] == 0
        assert len(json.loads(animation.info["comment"])) == 4
        times = []
        for i in range(animation.n_frames):  # frames that are alike become one, shown longer
            animation.seek(i)
            times.append(animation.info["duration"])
        assert sum(times) == 250 * (4 + 2 + 2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["a", "b", "--steps", "1"], ["--steps", "1"]),
        (["a", "b", "--steps", "65"], ["--steps", "65"]),
        (["a"], ["TO"]),
        (["a", " "], ["empty"]),
        (["a", "\udcff"], ["UTF-8"]),
    ],
)
def test_mistake_in_morph_is_one_line(run: Run, args: list[str], words: list[str]) -> None:
    assert_refused(run("morph", *args), *words)


@given(st.integers(0, 10_000), st.integers(2, 64))
def test_arc_has_equal_angles(seed: int, steps: int) -> None:
    a, b = F.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(seed)).double(), dim=1)
    points = torch.stack([x * a + y * b for x, y in arc(a, b, steps)])
    assert torch.allclose(points.norm(dim=1), torch.ones(steps).double(), atol=1e-6)
    assert torch.allclose(points[0], a, atol=1e-6) and torch.allclose(points[-1], b, atol=1e-6)
    turns = (points[1:] * points[:-1]).sum(1).clamp(-1, 1).arccos()
    assert float(turns.max() - turns.min()) < 1e-4


def test_arc_is_linear_between_equal_or_opposite_ends() -> None:
    a = F.normalize(torch.ones(4), dim=0)
    assert arc(a, a, 3) == arc(a, -a, 3) == [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]


@given(st.lists(st.text(max_size=30), min_size=1, max_size=3), st.lists(st.text(max_size=9), min_size=1, max_size=3))
def test_labelled_grid_accepts_any_label(columns: list[str], rows: list[str]) -> None:
    images = [Image.new("RGB", (32, 32))] * (len(columns) * len(rows))
    assert labelled_grid(images, columns, rows, "日本 🍋 " * 9).width >= len(columns) * 34 - 2


def test_grid_and_gif_refuse_wrong_counts_and_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="do not fill"):
        labelled_grid([Image.new("RGB", (8, 8))], ["a", "b"], [""])
    with pytest.raises(DataError, match="at least one"):
        save_gif([], tmp_path / "a.gif")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        save_gif([Image.new("RGB", (8, 8))], tmp_path / "file" / "a.gif")
