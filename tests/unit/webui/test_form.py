"""The page's form: its request, and the links and receipts that fill it in."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image
from receipt_kit import RECEIPT

from clipgen.errors import DataError, RequestError
from clipgen.images.pixels import save_image
from clipgen.outputs.metadata import PromptPart, Receipt
from clipgen.request import MAX_SEED
from clipgen.webui.form import LINKED, MAX_PROMPT, Form, from_link, read_receipt, settings_of, to_link
from clipgen.webui.snippets import as_python

LEMON = Form(prompt="a lemon", num_outputs=2, candidates=3, random_seed=False, seed=7)


def write(folder: Path, record: Receipt) -> str:
    return str(save_image(Image.new("RGB", (8, 8)), folder / "image.png", metadata=record.to_metadata()))


def test_random_seed_differs_between_requests() -> None:
    form = replace(LEMON, random_seed=True)
    assert LEMON.request().seed == 7
    assert form.request().seed != form.request().seed


def test_blank_negative_prompt_is_none() -> None:
    assert LEMON.request().negative_prompt is None
    assert replace(LEMON, negative_prompt=" \n\u200b").request().negative_prompt is None


def test_fewer_candidates_than_outputs_are_raised_to_the_outputs() -> None:
    assert replace(LEMON, num_outputs=5, candidates=1).request().candidates == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "\u200b\u200d\ufeff"}, "prompt is empty"),
        ({"seed": None}, "seed is empty"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**40}, "whole number"),
        ({"num_outputs": None}, "num_outputs is empty"),
        ({"num_outputs": 9}, "num_outputs is 9; on this page it must be from 1 to 8"),
        ({"candidates": 65}, "candidates is 65; on this page it must be from 1 to 64"),
        ({"candidates": float("nan")}, "candidates is nan"),
        ({"top_p": 0}, "above 0"),
        ({"guidance": 31}, "guidance is 31"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"temperature": -0.1}, "temperature"),
    ],
)
def test_value_out_of_range_names_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        replace(LEMON, **change).request()  # type: ignore[arg-type]


def test_link_of_an_image_restores_its_settings() -> None:
    record = replace(RECEIPT, prompt=(PromptPart(1.0, "50% & a #1 “lemon”\n+ 🍋"),), negative=(PromptPart(1.0, "a=b"),))
    form = from_link("#" + to_link(settings_of(record)), Form(image_weight=2.0))
    assert (form.prompt, form.negative_prompt) == (record.prompt[0].text, "a=b")
    assert (form.random_seed, form.seed, form.num_outputs, form.candidates) == (False, 9, 1, 1)
    assert (form.guidance, form.temperature, form.top_k, form.top_p) == (1.5, 0.8, 9, 0.5)
    assert form.image_weight == 2.0, "links leave other fields as they are"


def test_image_whose_own_seed_is_too_large_is_made_again_among_its_candidates() -> None:
    record = replace(RECEIPT, seed=MAX_SEED - 1, image_seed=MAX_SEED + 1, index=1, num_outputs=2, candidates=4)
    form = LEMON.with_receipt(record)
    assert (form.seed, form.candidates, form.num_outputs) == (MAX_SEED - 1, 4, 2)
    assert form.request().seed == MAX_SEED - 1
    settings = settings_of(record)
    assert from_link(to_link(settings), LEMON).request().candidates == 4
    assert "seed=2147483646" in as_python(record, "mini") and "output.images[1]" in as_python(record, "mini")


def test_link_holds_the_longest_prompts_in_any_script() -> None:
    form = Form(prompt="🍋" * MAX_PROMPT, negative_prompt="レ" * MAX_PROMPT, guidance=2.0)
    link = to_link({"prompt": form.prompt, "negative_prompt": form.negative_prompt, "guidance": 2.0})
    assert from_link(link, Form()) == form


def test_link_holds_every_setting_of_the_form_but_files_and_the_page_s_own() -> None:
    assert set(asdict(Form())) - set(LINKED) == {"image", "image_weight", "random_seed", "previews"}


def test_link_without_seed_keeps_the_random_seed() -> None:
    assert from_link("prompt=a+lemon", Form()) == Form(prompt="a lemon")


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("prompt=x&image=/etc/passwd", "holds 'image', which is no setting"),
        ("prompt=x&seed=1.5", "seed is '1.5'; it must be a number"),
        ("prompt=x&seed=99999999999", "seed is 99999999999"),
        ("prompt=x&guidance=inf", "guidance is inf"),
        ("prompt=x&top_k=nan", "top_k is 'nan'"),
        ("prompt=x&candidates=1000", "candidates is 1000; on this page"),
        ("prompt=" + "x" * 2001, "prompt has 2001 characters"),
        ("prompt=" + "x" * 20_000, "prompt has 20000 characters"),
        ("num_outputs=" + "9" * 400, r"num_outputs is 9{100}\.\.\.; on this page"),
        ("num_outputs=" + "9" * 5000, "num_outputs is '9{40}'; it must be a number"),
    ],
)
def test_hostile_link_is_refused(link: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        from_link(link, Form())


def test_receipt_fills_in_the_form(tmp_path: Path) -> None:
    record = replace(RECEIPT, negative=(PromptPart(1.0, "a dog"),))
    form, note = read_receipt(write(tmp_path, record), LEMON)
    expected = replace(LEMON, negative_prompt="a dog", guidance=1.5, temperature=0.8, top_k=9, top_p=0.5)
    assert form == expected.with_receipt(record)
    assert note == "The settings of this image are filled in."


def test_receipt_with_settings_that_the_page_lacks_names_them(tmp_path: Path) -> None:
    image = PromptPart(0.5, image="0" * 64, name="photo.png")
    record = replace(
        RECEIPT,
        prompt=(image, PromptPart(1.0, "a lemon"), PromptPart(2.0, "a hat")),
        negative=(PromptPart(1.0, "a dog"), PromptPart(1.0, "a cat")),
        keep="1" * 64,
        keep_rows=2,
    )
    form, note = read_receipt(write(tmp_path, record), Form())
    assert (form.prompt, form.negative_prompt, form.image, form.image_weight) == ("a lemon", "a dog", None, 0.5)
    for missing in (
        "add photo.png under",
        "a hat (2) has no field",
        "a cat was avoided too",
        "its top 2 rows came from",
    ):
        assert missing in note


@pytest.mark.parametrize("data", [b"", b"no image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n"])
def test_file_that_is_no_image_is_refused_as_receipt(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"photo\.png"):
        read_receipt(str(file), LEMON)


def test_image_without_receipt_is_refused(tmp_path: Path) -> None:
    file = save_image(Image.new("RGB", (8, 8)), tmp_path / "plain.png")
    with pytest.raises(DataError, match="no receipt"):
        read_receipt(str(file), LEMON)
