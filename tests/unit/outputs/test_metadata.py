"""Receipts in files: complete, small enough for every format, and sufficient to generate the image again."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from receipt_kit import RECEIPT, parse

from clipgen import ClipGen, GenerationOutput, GenerationRequest, __version__
from clipgen.errors import DataError
from clipgen.images.pixels import load_image, read_metadata, save_image
from clipgen.models.capabilities import cpu_dtypes
from clipgen.outputs.metadata import KEY, MAX_TEXT, PromptPart, Receipt, image_digest, receipts, together
from clipgen.outputs.metadata import weights_digest as digest
from clipgen.request import MAX_PARTS, MAX_SEED, SAMPLING, SamplingParams
from clipgen.utils.text import is_blank

FORMATS = ("png", "webp", "jpg")


@pytest.fixture(scope="module")
def pipe(tiny_weights: Path) -> ClipGen:
    return ClipGen.from_pretrained(tiny_weights, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def output(pipe: ClipGen) -> GenerationOutput:
    return pipe("a", seed=1)


def test_receipt_has_every_setting_of_requests_and_sampling() -> None:
    """A new setting of requests or sampling must be added to receipts, or replay would lose it."""
    assert {field.name for field in fields(SamplingParams)} == set(SAMPLING)
    known = {"prompt", "negative_prompt", "num_outputs", "candidates", "seed", "keep", "keep_rows", *SAMPLING}
    budgets = {"target_score", "seconds"}  # change the number of candidates, which the receipt holds
    assert {field.name for field in fields(GenerationRequest)} - budgets == known
    assert known - {"negative_prompt"} | {"negative"} <= {field.name for field in fields(Receipt)}


def test_receipts_of_a_result_hold_its_prompt_settings_and_scores(pipe: ClipGen, tiny_weights: Path) -> None:
    photo = Image.linear_gradient("L").convert("RGB")
    photo.info["name"] = "photo.jpg"
    result = pipe.generate([GenerationRequest([("a lemon", 1.0), (photo, -0.5)], 2, 4, seed=7, top_k=5)])[0]
    first, second = receipts(pipe, result, digest(tiny_weights))
    assert (first.seed, first.index, second.index, first.candidates, first.num_outputs) == (7, 0, 1, 4, 2)
    assert [first.image_seed, second.image_seed] == result.seeds
    assert first.score == pytest.approx(result.scores[0], abs=1e-6)
    assert (first.guidance, first.temperature, first.top_k, first.top_p) == (2.0, 1.0, 5, 0.95)
    assert (first.model, first.dtype, first.software) == ("tiny", "float32", __version__)
    assert first.device.startswith("cpu ") and first.weights == digest(tiny_weights)
    assert first.prompt == (PromptPart(1.0, "a lemon"), PromptPart(-0.5, "", image_digest(photo), "photo.jpg"))
    assert first.text == "a lemon + photo.jpg (-0.5)" and not first.shortened


@pytest.mark.parametrize("suffix", FORMATS)
def test_receipt_is_read_back_from_every_format(tmp_path: Path, suffix: str) -> None:
    written = replace(RECEIPT, prompt=(PromptPart(1.0, 'Zitrone ü 日本 🍋 "\\ \n'),))
    path = save_image(Image.new("RGB", (8, 8)), tmp_path / f"a.{suffix}", metadata=written.to_metadata())
    assert Receipt.from_file(path) == written


TEXTS = st.text(st.characters(codec=None), min_size=1, max_size=200).filter(lambda text: not is_blank(text))


@given(st.lists(st.tuples(TEXTS, st.floats(-100, 100)), min_size=1, max_size=MAX_PARTS), st.integers(0, MAX_SEED))
def test_any_request_is_restored_from_its_receipt(parts: list[tuple[str, float]], seed: int) -> None:
    """Lone surrogates, quotes and control characters too."""
    written = replace(
        RECEIPT, prompt=tuple(PromptPart(weight, text) for text, weight in parts), seed=seed, image_seed=seed + 3
    )
    found = Receipt.from_metadata(written.to_metadata())
    assert found == written
    request = found.request()
    assert request.prompt == parts
    assert seed + 3 in range(request.seed or 0, (request.seed or 0) + request.num_candidates)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("text", ["🍋" * 4_000_000, "a lemon " * 1000, '"\\\x00' * 40_000])
def test_receipt_of_an_endless_prompt_fits_into_every_format(
    pipe: ClipGen, output: GenerationOutput, tmp_path: Path, suffix: str, text: str
) -> None:
    result = replace(output, request=GenerationRequest([(text, 1.0), (text, -1.0), "a"]))
    (written,) = receipts(pipe, result, "a" * 64)
    path = save_image(result.images[0], tmp_path / f"a.{suffix}", metadata=written.to_metadata())
    assert path.stat().st_size < 80_000
    found = Receipt.from_file(path)
    assert found == written and found.text.startswith(text[:200])
    if found.shortened:
        with pytest.raises(DataError, match="too long"):
            found.request()
    assert found.shortened == ("🍋" in text)


def test_receipt_of_a_long_prompt_generates_the_same_image(pipe: ClipGen) -> None:
    text = "a  lemon \n" + "and  hair " * 2000
    result = pipe(text, seed=3)
    (written,) = receipts(pipe, result, "a" * 64)
    assert len(written.prompt[0].text) == MAX_TEXT
    assert pipe.generate([written.request()])[0].images[0].tobytes() == result.images[0].tobytes()


def max_difference(a: Image.Image, b: Image.Image) -> int:
    """Largest difference of two images, in 8-bit levels."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


@pytest.mark.parametrize("dtype", cpu_dtypes())
def test_receipt_generates_the_image_alone_that_was_generated_in_a_batch(tiny_weights: Path, dtype: str) -> None:
    """Replay depends on this: the image's own seed with one candidate gives an image that was generated among others.

    The tokens are the same; in a batch, the decoder's convolutions add up in another order.
    """
    pipe = ClipGen.from_pretrained(tiny_weights, device="cpu", dtype=dtype)
    result = pipe("a lemon", num_outputs=8, candidates=8, seed=11)
    for image, written in zip(result.images, receipts(pipe, result, "a" * 64), strict=True):
        again = pipe.generate([written.request()])[0]
        assert again.seeds == [written.image_seed] and max_difference(again.images[0], image) <= 1


def test_receipts_of_the_largest_seeds_generate_the_same_images(pipe: ClipGen) -> None:
    result = pipe("a lemon", num_outputs=3, candidates=3, seed=MAX_SEED - 1)
    for image, written in zip(result.images, receipts(pipe, result, "a" * 64), strict=True):
        again = pipe.generate([written.request()])[0]
        assert max_difference(again.images[again.seeds.index(written.image_seed)], image) <= 1


def test_receipt_of_an_image_prompt_needs_the_image_with_its_digest(pipe: ClipGen, tmp_path: Path) -> None:
    photo = Image.linear_gradient("L").convert("RGB")
    for name in ("a.png", "b.bmp"):
        photo.save(tmp_path / name)
    image = load_image(tmp_path / "a.png")
    result = pipe(image, seed=3)
    (written,) = receipts(pipe, result, "a" * 64)
    assert written.prompt[0].name == "a.png"
    with pytest.raises(DataError, match=r"a\.png.*not here"):
        written.request()
    same = load_image(tmp_path / "b.bmp")
    request = written.request({image_digest(same): same})
    assert pipe.generate([request])[0].images[0].tobytes() == result.images[0].tobytes()


def test_receipt_with_kept_rows_generates_the_same_image(pipe: ClipGen) -> None:
    photo = Image.linear_gradient("L").convert("RGB")
    result = pipe("a lemon", num_outputs=2, candidates=2, seed=3, keep=photo, keep_rows=2)
    written = receipts(pipe, result, "a" * 64)[1]
    assert (written.keep, written.keep_rows) == (image_digest(photo), 2)
    with pytest.raises(DataError, match="not here"):
        written.request()
    again = pipe.generate([written.request({written.keep: photo})])[0]
    assert max_difference(again.images[0], result.images[1]) <= 1


def test_receipt_with_a_negative_prompt_generates_the_same_image(pipe: ClipGen) -> None:
    photo = Image.linear_gradient("L").convert("RGB")
    plain = pipe("a lemon", seed=3)
    result = pipe("a lemon", seed=3, negative_prompt=[("a dog", 1.0), (photo, 0.5)])
    (written,) = receipts(pipe, result, "a" * 64)
    assert written.negative == (PromptPart(1.0, "a dog"), PromptPart(0.5, image=image_digest(photo)))
    assert written.text == "a lemon, not a dog + an image (0.5)"
    with pytest.raises(DataError, match="not here"):
        written.request()
    again = pipe.generate([parse(json.loads(written.to_metadata()[KEY])).request({image_digest(photo): photo})])[0]
    assert max_difference(again.images[0], result.images[0]) <= 1 < max_difference(again.images[0], plain.images[0])


def test_receipt_of_version_1_without_negative_prompt_is_read() -> None:
    mixed = replace(RECEIPT, prompt=(*RECEIPT.prompt, PromptPart(-0.5, image="0" * 64, name="photo.jpg")))
    old = json.loads(mixed.to_metadata()[KEY]) | {"version": 1}
    del old["negative"]
    assert parse(old) == mixed
    with pytest.raises(DataError, match="'negative' is missing"):
        parse(old | {"version": 2})


@pytest.mark.parametrize("name", ["mixed.png", "mixed.jpg", "mixed.webp"])
def test_receipts_written_by_commit_43da29e_are_read(name: str, golden: Path) -> None:
    found = Receipt.from_file(golden / "receipts_43da29e" / name)
    assert found.prompt == (PromptPart(1.0, "a lemon on a red sofa"), PromptPart(0.5, "a cat"))
    assert found.negative == (PromptPart(1.0, "a dog"),)
    assert (found.seed, found.num_outputs, found.candidates, found.guidance) == (7, 2, 2, 3.0)
    assert found.image_seed in (7, 8) and found.index == int(name == "mixed.jpg") and not found.shortened
    assert found.request().seed == found.image_seed


def test_receipt_with_kept_rows_written_by_commit_43da29e_is_read(golden: Path) -> None:
    folder = golden / "receipts_43da29e"
    found, kept = Receipt.from_file(folder / "kept_rows.jpg"), load_image(folder / "photo.png")
    assert (found.text, found.keep, found.keep_rows) == ("a lemon", image_digest(kept), 4)
    assert found.request({image_digest(kept): kept}).keep_rows == 4
    with pytest.raises(DataError, match=r"grid\.webp.*holds 2 images"):
        Receipt.from_file(folder / "grid.webp")


def test_digest_of_weights_changes_with_them(tiny_weights: Path, tmp_path: Path) -> None:
    manifest = json.loads((tiny_weights / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert digest(tmp_path) == digest(tiny_weights)
    manifest["files"]["gpt.safetensors"]["sha256"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert digest(tmp_path) != digest(tiny_weights)


def test_file_with_receipts_of_several_images_is_refused_as_one(tmp_path: Path) -> None:
    written = [replace(RECEIPT, index=i % 2, prompt=(PromptPart(1.0, "x" * 3000),)) for i in range(40)]
    path = save_image(Image.new("RGB", (8, 8)), tmp_path / "grid.jpg", metadata=together(written))
    with pytest.raises(DataError, match=r"grid\.jpg.*holds \d+ images"):
        Receipt.from_file(path)
    assert json.loads(read_metadata(path)[KEY])[0] == json.loads(written[0].to_metadata()[KEY])
