"""Receipts: complete, small enough for every format, and nothing that a hostile file says gets past the reading."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from clipgen import ClipGen, GenerationOutput, GenerationRequest, __version__
from clipgen.utils.text import is_blank
from clipgen.errors import DataError
from clipgen.images.pixels import load_image, read_metadata, save_image
from clipgen.models.capabilities import cpu_dtypes
from clipgen.outputs.metadata import KEY, MAX_TEXT, PromptPart, Receipt, image_digest, receipts, together
from clipgen.outputs.metadata import weights_digest as digest
from clipgen.request import MAX_CANDIDATES, MAX_PARTS, MAX_SEED, SAMPLING, SamplingParams

FORMATS = ("png", "webp", "jpg")


@pytest.fixture(scope="module")
def pipe(tiny_weights: Path) -> ClipGen:
    return ClipGen.from_pretrained(tiny_weights, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def drawn(pipe: ClipGen) -> GenerationOutput:
    return pipe("a", seed=1)


def a_receipt(**changes: Any) -> Receipt:
    made = Receipt(
        prompt=(PromptPart(1.0, "a lemon"), PromptPart(-0.5, image="0" * 64, name="photo.jpg")),
        seed=7,
        image_seed=9,
        index=1,
        num_outputs=2,
        candidates=4,
        guidance=3.0,
        temperature=1.0,
        top_k=256,
        top_p=0.9,
        keep="",
        keep_rows=0,
        score=0.25,
        model="tiny",
        weights="a" * 64,
        dtype="float32",
        device="cpu AVX512",
        torch="2.11.0",
        software=__version__,
    )
    return replace(made, **changes)


def record(**changes: Any) -> dict[str, Any]:
    """A receipt's JSON object as it is written, with changes."""
    return json.loads(a_receipt().to_metadata()[KEY]) | changes


def read(value: Any) -> Receipt:
    return Receipt.from_metadata({KEY: value if isinstance(value, str) else json.dumps(value)})


def test_a_receipt_covers_every_setting() -> None:
    """A new setting of a request or of the sampling must find its way into receipts, or replaying would lose it."""
    assert {field.name for field in fields(SamplingParams)} == set(SAMPLING)
    known = {"prompt", "negative_prompt", "num_outputs", "candidates", "seed", "keep", "keep_rows", *SAMPLING}
    budgets = {"target_score", "seconds"}  # they change how many candidates there are, which the receipt counts
    assert {field.name for field in fields(GenerationRequest)} - budgets == known
    assert known - {"negative_prompt"} | {"negative"} <= {field.name for field in fields(Receipt)}


def test_what_a_result_says(pipe: ClipGen, tiny_weights: Path) -> None:
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
def test_through_a_file(tmp_path: Path, suffix: str) -> None:
    written = a_receipt(prompt=(PromptPart(1.0, 'Zitrone ü 日本 🍋 "\\ \n'),))
    path = save_image(Image.new("RGB", (8, 8)), tmp_path / f"a.{suffix}", metadata=written.to_metadata())
    assert Receipt.from_file(path) == written


TEXTS = st.text(st.characters(codec=None), min_size=1, max_size=200).filter(lambda text: not is_blank(text))


@given(st.lists(st.tuples(TEXTS, st.floats(-100, 100)), min_size=1, max_size=MAX_PARTS), st.integers(0, MAX_SEED))
def test_any_request_comes_back_as_it_was(parts: list[tuple[str, float]], seed: int) -> None:
    """Lone surrogates, quotes and control characters too."""
    written = a_receipt(
        prompt=tuple(PromptPart(weight, text) for text, weight in parts), seed=seed, image_seed=seed + 3
    )
    found = Receipt.from_metadata(written.to_metadata())
    assert found == written
    request = found.request()
    assert request.prompt == parts
    assert seed + 3 in range(request.seed or 0, (request.seed or 0) + request.num_candidates)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("text", ["🍋" * 4_000_000, "a lemon " * 1000, '"\\\x00' * 40_000])
def test_endless_prompts_fit_into_every_format(
    pipe: ClipGen, drawn: GenerationOutput, tmp_path: Path, suffix: str, text: str
) -> None:
    result = replace(drawn, request=GenerationRequest([(text, 1.0), (text, -1.0), "a"]))
    (written,) = receipts(pipe, result, "a" * 64)
    path = save_image(result.images[0], tmp_path / f"a.{suffix}", metadata=written.to_metadata())
    assert path.stat().st_size < 80_000
    found = Receipt.from_file(path)
    assert found == written and found.text.startswith(text[:200])
    if found.shortened:
        with pytest.raises(DataError, match="too long"):
            found.request()
    assert found.shortened == ("🍋" in text)


def test_a_long_prompt_draws_the_same_from_its_receipt(pipe: ClipGen) -> None:
    text = "a  lemon \n" + "and  hair " * 2000
    result = pipe(text, seed=3)
    (written,) = receipts(pipe, result, "a" * 64)
    assert len(written.prompt[0].text) == MAX_TEXT
    assert pipe.generate([written.request()])[0].images[0].tobytes() == result.images[0].tobytes()


def farthest(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


@pytest.mark.parametrize("dtype", cpu_dtypes())
def test_alone_it_is_the_same_picture(tiny_weights: Path, dtype: str) -> None:
    """What replaying rests on: its own seed with one candidate gives a picture that was drawn among others.

    The tokens are the same; the sums of the decoder's convolutions are made in another order in a batch.
    """
    pipe = ClipGen.from_pretrained(tiny_weights, device="cpu", dtype=dtype)
    result = pipe("a lemon", num_outputs=8, candidates=8, seed=11)
    for image, written in zip(result.images, receipts(pipe, result, "a" * 64), strict=True):
        again = pipe.generate([written.request()])[0]
        assert again.seeds == [written.image_seed] and farthest(again.images[0], image) <= 1


def test_the_last_seeds_of_all(pipe: ClipGen) -> None:
    result = pipe("a lemon", num_outputs=3, candidates=3, seed=MAX_SEED - 1)
    for image, written in zip(result.images, receipts(pipe, result, "a" * 64), strict=True):
        again = pipe.generate([written.request()])[0]
        assert farthest(again.images[again.seeds.index(written.image_seed)], image) <= 1


def test_an_image_is_asked_for_by_its_digest(pipe: ClipGen, tmp_path: Path) -> None:
    photo = Image.linear_gradient("L").convert("RGB")
    for name in ("a.png", "b.bmp"):
        photo.save(tmp_path / name)
    picture = load_image(tmp_path / "a.png")
    result = pipe(picture, seed=3)
    (written,) = receipts(pipe, result, "a" * 64)
    assert written.prompt[0].name == "a.png"
    with pytest.raises(DataError, match=r"a\.png.*not here"):
        written.request()
    twin = load_image(tmp_path / "b.bmp")
    request = written.request({image_digest(twin): twin})
    assert pipe.generate([request])[0].images[0].tobytes() == result.images[0].tobytes()


def test_kept_rows_come_back(pipe: ClipGen) -> None:
    photo = Image.linear_gradient("L").convert("RGB")
    result = pipe("a lemon", num_outputs=2, candidates=2, seed=3, keep=photo, keep_rows=2)
    written = receipts(pipe, result, "a" * 64)[1]
    assert (written.keep, written.keep_rows) == (image_digest(photo), 2)
    with pytest.raises(DataError, match="not here"):
        written.request()
    again = pipe.generate([written.request({written.keep: photo})])[0]
    assert farthest(again.images[0], result.images[1]) <= 1


def test_a_negative_prompt_comes_back(pipe: ClipGen) -> None:
    photo = Image.linear_gradient("L").convert("RGB")
    plain = pipe("a lemon", seed=3)
    result = pipe("a lemon", seed=3, negative_prompt=[("a dog", 1.0), (photo, 0.5)])
    (written,) = receipts(pipe, result, "a" * 64)
    assert written.negative == (PromptPart(1.0, "a dog"), PromptPart(0.5, image=image_digest(photo)))
    assert written.text == "a lemon, not a dog + an image (0.5)"
    with pytest.raises(DataError, match="not here"):
        written.request()
    again = pipe.generate([read(json.loads(written.to_metadata()[KEY])).request({image_digest(photo): photo})])[0]
    assert farthest(again.images[0], result.images[0]) <= 1 < farthest(again.images[0], plain.images[0])


def test_receipts_from_before_there_were_negative_prompts() -> None:
    old = record(version=1)
    del old["negative"]
    assert read(old) == a_receipt()
    with pytest.raises(DataError, match="'negative' is missing"):
        read(old | {"version": 2})


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


def parse_as_web_uis_do(text: str) -> dict[str, str]:
    """What AUTOMATIC1111's stable-diffusion-webui does in modules/infotext_utils.py, as far as it concerns us."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3, "otherwise the line counts as part of the prompt"
    sides = {"prompt": [], "negative": []}
    side = "prompt"
    for line in lines:
        if line.startswith("Negative prompt:"):
            side, line = "negative", line.removeprefix("Negative prompt:")
        sides[side].append(line.strip())
    return {name: "\n".join(found) for name, found in sides.items()} | dict(pairs)


@pytest.mark.parametrize("suffix", FORMATS)
def test_web_uis_find_prompt_and_settings_where_they_look(pipe: ClipGen, tmp_path: Path, suffix: str) -> None:
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
    found = parse_as_web_uis_do(text)
    assert found["prompt"] == "a lemon, a red: sofa 🍋, (a cat:0.5)" and found["negative"] == "a dog"
    assert (found["Seed"], found["CFG scale"], found["Size"], found["Steps"]) == ("3", "2.5", "32x32", "16")
    assert (found["Model"], found["Model hash"]) == ("tiny", "a" * 10)
    assert Receipt.from_file(path) == written


def test_parameters_that_do_not_fit_into_exif_are_left_out(tmp_path: Path) -> None:
    prompt, negative = (PromptPart(1.0, "🍋" * 3_000),), (PromptPart(1.0, "🍋" * 1_150),)
    written = a_receipt(prompt=prompt, negative=negative)
    path = save_image(Image.new("RGB", (8, 8)), tmp_path / "a.jpg", metadata=written.to_metadata())
    assert Receipt.from_file(path) == written
    with Image.open(path) as image:
        assert ExifTags.Base.UserComment not in image.getexif().get_ifd(ExifTags.IFD.Exif)


@pytest.mark.parametrize("model", ["plain", 'a, "b": c', "a\nNegative prompt: x"])
def test_values_with_separators_are_quoted(model: str) -> None:
    found = parse_as_web_uis_do(a_receipt(model=model).to_metadata()["parameters"])
    value = found["Model"]
    assert (json.loads(value) if value.startswith('"') else value) == model and found["Seed"] == "9"


def test_the_digest_of_weights_changes_with_them(tiny_weights: Path, tmp_path: Path) -> None:
    manifest = json.loads((tiny_weights / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert digest(tmp_path) == digest(tiny_weights)
    manifest["files"]["gpt.safetensors"]["sha256"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert digest(tmp_path) != digest(tiny_weights)


def test_many_pictures_in_one_file(tmp_path: Path) -> None:
    many = [a_receipt(index=i % 2, prompt=(PromptPart(1.0, "x" * 3000),)) for i in range(40)]
    path = save_image(Image.new("RGB", (8, 8)), tmp_path / "grid.jpg", metadata=together(many))
    with pytest.raises(DataError, match=r"grid\.jpg.*holds \d+ images"):
        Receipt.from_file(path)
    assert json.loads(read_metadata(path)[KEY])[0] == json.loads(many[0].to_metadata()[KEY])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        (record(guidance=float("nan")), "guidance is nan"),
        (record(score=float("-inf")), "score is -inf"),
        ('{"version": 1, "version": 1}', "twice"),
        ("x" * 300_000, "300,000 characters"),
        ("null", "no JSON object"),
        ("{}", "missing"),
        (record(version=3), "upgrade"),
        (record(version="1"), "version"),
        (record(version=True), "version"),
        (record(extra=1), "'extra' is not known"),
        (record(prompt=[]), "prompt"),
        (record(prompt="a lemon"), "prompt"),
        (record(prompt=[1]), "prompt is a list"),
        (record(prompt=[{"weight": 1.0, "text": "a"}]), "missing"),
        (record(prompt=[asdict(PromptPart(1.0, "a", "0" * 64))]), "one of them"),
        (record(prompt=[asdict(PromptPart(1.0, " "))]), "one of them"),
        (record(prompt=[asdict(PromptPart(101.0, "a"))]), "weight"),
        (record(prompt=[asdict(PromptPart(1.0, image="../../etc/passwd"))]), "image"),
        (record(prompt=[asdict(PromptPart(1.0, "a"))] * 65), "prompt"),
        (record(negative=None), "negative is None"),
        (record(negative=[asdict(PromptPart(1.0, " "))]), "part of the negative"),
        (record(negative=[asdict(PromptPart(-101.0, "a"))]), "negative's weight"),
        (record(negative=[asdict(PromptPart(1.0, "a"))], guidance=1), "negative and guidance"),
        (record(seed=-1), "seed is -1"),
        (record(seed=True), "seed is True"),
        (record(seed=10**400), "seed"),
        (record(seed=7.0), "seed is 7.0"),
        (record(image_seed=6), "fit together"),
        (record(image_seed=11), "fit together"),
        (record(index=2), "fit together"),
        (record(candidates=10**9), "candidates"),
        (record(guidance=31), "guidance is 31"),
        (record(guidance=10**400), "guidance"),
        (record(temperature="1"), "temperature is '1'"),
        (record(top_k=-1), "top_k"),
        (record(top_p=0), "top_p is 0"),
        (record(weights="A" * 64), "weights"),
        (record(weights="a" * 64 + "\n"), "weights"),
        (record(model=["tiny"]), "model is a list"),
        (record(device="x" * 101), "device"),
        (record(shortened=0), "shortened"),
        (record(keep="../../etc/passwd", keep_rows=1), "keep is"),
        (record(keep="0" * 64), "keep_rows do not fit"),
        (record(keep_rows=2), "keep_rows do not fit"),
    ],
)
def test_hostile_receipts(value: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(value)
    assert len(str(caught.value)) < 250


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*record(), "other"]), ANYTHING, max_size=4), st.data())
@settings(max_examples=300)
def test_whatever_stands_in_a_receipt_it_is_usable_or_refused(changes: dict[str, Any], data: st.DataObject) -> None:
    part = data.draw(st.dictionaries(st.sampled_from([*asdict(PromptPart(1.0)), "other"]), ANYTHING, max_size=2))
    text = json.dumps(record(prompt=[asdict(PromptPart(1.0, "a")) | part]) | changes)
    try:
        found = read(text)
    except DataError:
        return
    try:
        request = found.request()
    except DataError:
        assert found.shortened or any(part.image for part in found.prompt)
    else:
        assert request.num_candidates <= MAX_CANDIDATES and found.text


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        read(text)


def test_files_without_a_receipt(tmp_path: Path) -> None:
    plain = save_image(Image.new("RGB", (8, 8)), tmp_path / "plain.png")
    with pytest.raises(DataError, match=r"plain\.png.*no receipt"):
        Receipt.from_file(plain)
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: b"ASCII\0\0\0[1, 2"}
    Image.new("RGB", (8, 8)).save(tmp_path / "camera.jpg", exif=exif)
    with pytest.raises(DataError, match="no receipt"):
        Receipt.from_file(tmp_path / "camera.jpg")
    (tmp_path / "text.png").write_text("a lemon")
    with pytest.raises(DataError, match="not an image"):
        Receipt.from_file(tmp_path / "text.png")
    with pytest.raises(DataError, match="no such file"):
        Receipt.from_file(tmp_path / "missing.png")
    with pytest.raises(DataError, match="cannot be read"):
        Receipt.from_file(tmp_path)


def test_a_bomb_in_a_text_chunk(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, "[" * 50_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=info)
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises((DataError, DataError)):
        Receipt.from_file(tmp_path / "bomb.png")


@given(st.data())
@settings(max_examples=150)
def test_damaged_files_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    path = folder / f"a.{data.draw(st.sampled_from(FORMATS))}"
    content = bytearray(save_image(Image.new("RGB", (8, 8)), path, metadata=a_receipt().to_metadata()).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert isinstance(Receipt.from_file(path), Receipt)
    except DataError as error:
        assert path.name in str(error)
