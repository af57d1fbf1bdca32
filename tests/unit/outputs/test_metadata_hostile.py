"""Hostile, damaged and missing receipts: parsed or refused in a short message, never a crash."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin
from receipt_kit import RECEIPT, as_json, parse

from clipgen.errors import DataError
from clipgen.images.pixels import save_image
from clipgen.outputs.metadata import KEY, PromptPart, Receipt
from clipgen.request import MAX_CANDIDATES

FORMATS = ("png", "webp", "jpg")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (as_json(guidance=float("nan")), "guidance is nan"),
        (as_json(score=float("-inf")), "score is -inf"),
        ('{"version": 1, "version": 1}', "duplicate key"),
        ("x" * 300_000, "300,000 characters"),
        ("null", "not a JSON object"),
        ("{}", "missing"),
        (as_json(version=3), "upgrade"),
        (as_json(version="1"), "version"),
        (as_json(version=True), "version"),
        (as_json(extra=1), "'extra' is unknown"),
        (as_json(prompt=[]), "prompt"),
        (as_json(prompt="a lemon"), "prompt"),
        (as_json(prompt=[1]), "prompt is a list"),
        (as_json(prompt=[{"weight": 1.0, "text": "a"}]), "missing"),
        (as_json(prompt=[asdict(PromptPart(1.0, "a", "0" * 64))]), "either a text or an image"),
        (as_json(prompt=[asdict(PromptPart(1.0, " "))]), "either a text or an image"),
        (as_json(prompt=[asdict(PromptPart(101.0, "a"))]), "weight"),
        (as_json(prompt=[asdict(PromptPart(1.0, image="../../etc/passwd"))]), "image"),
        (as_json(prompt=[asdict(PromptPart(1.0, "a"))] * 65), "prompt"),
        (as_json(negative=None), "negative is None"),
        (as_json(negative=[asdict(PromptPart(1.0, " "))]), "part of the negative"),
        (as_json(negative=[asdict(PromptPart(-101.0, "a"))]), "negative's weight"),
        (as_json(negative=[asdict(PromptPart(1.0, "a"))], guidance=1), "negative and guidance"),
        (as_json(seed=-1), "seed is -1"),
        (as_json(seed=True), "seed is True"),
        (as_json(seed=10**400), "seed"),
        (as_json(seed=7.0), "seed is 7.0"),
        (as_json(image_seed=6), "contradict each other"),
        (as_json(image_seed=11), "contradict each other"),
        (as_json(index=2), "contradict each other"),
        (as_json(candidates=10**9), "candidates"),
        (as_json(guidance=31), "guidance is 31"),
        (as_json(guidance=10**400), "guidance"),
        (as_json(temperature="1"), "temperature is '1'"),
        (as_json(top_k=-1), "top_k"),
        (as_json(top_p=0), "top_p is 0"),
        (as_json(weights="A" * 64), "weights"),
        (as_json(weights="a" * 64 + "\n"), "weights"),
        (as_json(model=["tiny"]), "model is a list"),
        (as_json(device="x" * 101), "device"),
        (as_json(shortened=0), "shortened"),
        (as_json(keep="../../etc/passwd", keep_rows=1), "keep is"),
        (as_json(keep="0" * 64), "keep_rows contradict"),
        (as_json(keep_rows=2), "keep_rows contradict"),
    ],
)
def test_hostile_receipt_is_refused_with_its_fault(value: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        parse(value)
    assert len(str(caught.value)) < 250


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*as_json(), "other"]), ANYTHING, max_size=4), st.data())
@settings(max_examples=300)
def test_receipt_with_random_values_is_usable_or_refused(changes: dict[str, Any], data: st.DataObject) -> None:
    part = data.draw(st.dictionaries(st.sampled_from([*asdict(PromptPart(1.0)), "other"]), ANYTHING, max_size=2))
    text = json.dumps(as_json(prompt=[asdict(PromptPart(1.0, "a")) | part]) | changes)
    try:
        found = parse(text)
    except DataError:
        return
    try:
        request = found.request()
    except DataError:
        assert found.shortened or any(part.image for part in found.prompt)
    else:
        assert request.num_candidates <= MAX_CANDIDATES and found.text


@given(st.text())
def test_random_text_is_refused_as_receipt(text: str) -> None:
    with pytest.raises(DataError):
        parse(text)


def test_file_without_a_receipt_is_refused(tmp_path: Path) -> None:
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


def test_decompression_bomb_in_a_text_chunk_is_refused(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, "[" * 50_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=info)
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(DataError):
        Receipt.from_file(tmp_path / "bomb.png")


@given(st.data())
@settings(max_examples=150)
def test_damaged_file_is_read_or_refused_by_name(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    path = folder / f"a.{data.draw(st.sampled_from(FORMATS))}"
    content = bytearray(save_image(Image.new("RGB", (8, 8)), path, metadata=RECEIPT.to_metadata()).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert isinstance(Receipt.from_file(path), Receipt)
    except DataError as error:
        assert path.name in str(error)
