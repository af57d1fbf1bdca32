"""The "parameters" text in images, from which other web UIs read prompt and settings."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from receipt_kit import RECEIPT

from clipgen import ClipGen
from clipgen.images.pixels import save_image
from clipgen.outputs.metadata import PromptPart, Receipt, receipts

FORMATS = ("png", "webp", "jpg")


@pytest.fixture(scope="module")
def pipe(tiny_weights: Path) -> ClipGen:
    return ClipGen.from_pretrained(tiny_weights, device="cpu", dtype="float32")


def parse_parameters(text: str) -> dict[str, str]:
    """Parse the parameters as AUTOMATIC1111's stable-diffusion-webui does in modules/infotext_utils.py."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3, "with fewer, the line counts as part of the prompt"
    sides = {"prompt": [], "negative": []}
    side = "prompt"
    for line in lines:
        if line.startswith("Negative prompt:"):
            side, line = "negative", line.removeprefix("Negative prompt:")
        sides[side].append(line.strip())
    return {name: "\n".join(found) for name, found in sides.items()} | dict(pairs)


@pytest.mark.parametrize("suffix", FORMATS)
def test_web_uis_find_prompt_and_settings_in_every_format(pipe: ClipGen, tmp_path: Path, suffix: str) -> None:
    result = pipe([("a lemon,\n  a red: sofa 🍋", 1.0), ("a cat", 0.5)], seed=3, guidance=2.5, negative_prompt="a dog")
    (written,) = receipts(pipe, result, "a" * 64)
    path = save_image(result.images[0], tmp_path / f"a.{suffix}", metadata=written.to_metadata())
    with Image.open(path) as image:
        if suffix == "png":
            text = image.info["parameters"]
        else:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
            assert comment.startswith(b"UNICODE\0")
            text = comment[8:].decode("utf-16-be")
    found = parse_parameters(text)
    assert found["prompt"] == "a lemon, a red: sofa 🍋, (a cat:0.5)" and found["negative"] == "a dog"
    assert (found["Seed"], found["CFG scale"], found["Size"], found["Steps"]) == ("3", "2.5", "32x32", "16")
    assert (found["Model"], found["Model hash"]) == ("tiny", "a" * 10)
    assert Receipt.from_file(path) == written


def test_parameters_that_do_not_fit_into_exif_are_left_out(tmp_path: Path) -> None:
    prompt, negative = (PromptPart(1.0, "🍋" * 3_000),), (PromptPart(1.0, "🍋" * 1_150),)
    written = replace(RECEIPT, prompt=prompt, negative=negative)
    path = save_image(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", metadata=written.to_metadata())
    assert Receipt.from_file(path) == written
    with Image.open(path) as image:
        assert ExifTags.Base.UserComment not in image.getexif().get_ifd(ExifTags.IFD.Exif)


@pytest.mark.parametrize("model", ["plain", 'a, "b": c', "a\nNegative prompt: x"])
def test_values_with_separators_are_quoted(model: str) -> None:
    found = parse_parameters(replace(RECEIPT, model=model).to_metadata()["parameters"])
    value = found["Model"]
    assert (json.loads(value) if value.startswith('"') else value) == model and found["Seed"] == "9"
