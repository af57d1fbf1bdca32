"""The web page without a browser: what its buttons do."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipgen.errors import DataError, RequestError
from clipgen.images.pixels import read_metadata, save_image
from clipgen.outputs.metadata import Receipt
from clipgen.webui.session import Form, Studio, View, hide_folders, plain, read_receipt
from clipgen.weights.training_index import TrainingIndex, build_index

LEMON = Form(prompt="a lemon", num_outputs=2, candidates=3, random=False, seed=7)


@pytest.fixture(scope="module")
def studio(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tiny_weights, tmp_path_factory.mktemp("page"), device="cpu", dtype="float32")


def last(views: Iterator[View]) -> View:
    return list(views)[-1]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_a_drawing_begins_shows_previews_and_ends_with_files_that_carry_receipts(studio: Studio) -> None:
    views = list(studio.draw(LEMON, "me"))
    assert views[0].note == "Drawing …"
    assert any(view.pictures for view in views[1:-1]), "no previews"
    end = views[-1]
    assert end.drawing is not None and not end.failed
    assert len(end.files) == 2 and all(file.is_relative_to(studio.folder) for file in end.files)
    for file, record in zip(end.files, end.drawing.records, strict=True):
        assert Receipt.from_file(file) == record
        assert record.candidates == 3
    assert end.files[0].name.startswith("a-lemon-7")
    assert end.drawing.captions[0].endswith(f"seed {end.drawing.records[0].image_seed}")
    assert not studio.running["me"], "nothing is under way any more"


def test_use_this_seed_draws_the_same_picture(studio: Studio) -> None:
    first = last(studio.draw(LEMON)).drawing
    assert first is not None
    for picture, record in zip(first.images, first.records, strict=True):
        again = last(studio.draw(first.form.again(record.image_seed))).drawing
        assert again is not None and len(again.images) == 1
        difference = np.abs(pixels(picture).astype(int) - pixels(again.images[0])).max()
        assert difference <= 1, "the README promises 1 of 255 levels"


def test_a_random_seed_is_told_and_differs(studio: Studio) -> None:
    one, two = (last(studio.draw(replace(LEMON, random=True))).drawing for _ in range(2))
    assert one is not None and two is not None
    assert one.form.seed == one.records[0].seed != two.form.seed


def test_the_top_stays_when_it_is_kept(studio: Studio) -> None:
    first = last(studio.draw(LEMON)).drawing
    assert first is not None
    drawing = last(studio.draw(replace(LEMON, seed=99), keep=first.images[0], keep_rows=2)).drawing
    assert drawing is not None and drawing.records[0].keep_rows == 2
    too_many = last(studio.draw(LEMON, keep=first.images[0], keep_rows=studio.rows))
    assert too_many.failed and "keep_rows" in too_many.note


def test_a_negative_prompt_is_kept_away_from(studio: Studio) -> None:
    assert LEMON.request().negative is None and replace(LEMON, negative=" \n").request().negative is None
    end = last(studio.draw(replace(LEMON, negative="a dog")))
    assert end.drawing is not None and end.drawing.records[0].text == "a lemon, not a dog"
    refused = last(studio.draw(replace(LEMON, negative="a dog", guidance=1)))
    assert refused.failed and "raise it" in refused.note


@pytest.mark.parametrize("low", [True, False])
def test_how_near_it_is_to_the_training_pictures_is_said(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, low: bool
) -> None:
    assert "nearest" not in last(studio.draw(LEMON)).note, "these weights have no index"
    images = F.normalize(torch.randn(9, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    index = TrainingIndex(build_index(images, [f"Picture {i}" for i in range(9)], images[:4]))
    monkeypatch.setattr(studio.pipe, "coverage", index)
    monkeypatch.setattr("clipgen.weights.training_index.LOW", 1.01 if low else 0)
    note = last(studio.draw(LEMON)).note
    if low:
        assert "This model has seen little like it; the nearest of its training pictures is Picture " in note
    else:
        assert re.search(
            r"TrainingIndex \d+ of 100, nearest training pictures: Picture \d; Picture \d; Picture \d\.", note
        )


def test_an_image_changes_the_point_that_is_drawn_from(studio: Studio, tmp_path: Path) -> None:
    file = save_image(Image.new("RGB", (40, 40), "red"), tmp_path / "red.png")
    points = [
        studio.pipe.embed(form.request().prompt)
        for form in (
            LEMON,
            replace(LEMON, image=str(file)),
            replace(LEMON, image=str(file), image_weight=0.1),
            replace(LEMON, prompt="", image=str(file)),
        )
    ]
    for i, one in enumerate(points):
        assert all((one - other).norm() > 1e-4 for other in points[i + 1 :])


def test_cancelling_stops_only_that_visitors_drawing(studio: Studio) -> None:
    long = replace(LEMON, num_outputs=8, candidates=64)
    mine, theirs = studio.draw(long, "me"), studio.draw(replace(LEMON, seed=1), "they")
    next(mine), next(theirs)
    assert studio.cancel("me")
    assert last(mine) == View("Cancelled.", failed=True)
    assert last(theirs).drawing is not None
    assert not studio.cancel("me") and not studio.cancel("nobody")


def test_a_page_that_is_closed_stops_its_drawing(studio: Studio) -> None:
    views = studio.draw(LEMON, "gone")
    next(views)
    [stop] = studio.running["gone"]
    studio.leave("gone")
    assert stop.is_set() and "gone" not in studio.running
    views.close()


def test_closing_stops_what_is_under_way_and_begins_no_more(tiny_weights: Path, tmp_path: Path) -> None:
    studio = Studio(tiny_weights, tmp_path, device="cpu", dtype="float32")
    views = studio.draw(replace(LEMON, num_outputs=8, candidates=64), "me")
    next(views)
    ending = threading.Timer(0.05, studio.close)
    ending.start()
    assert last(views).note in ("Cancelled.", "the engine is closed; nothing more is drawn by it")
    ending.join()
    assert last(studio.draw(LEMON, "me")).note == "the engine is closed; nothing more is drawn by it"


def test_visitors_at_once_get_their_own_pictures(studio: Studio) -> None:
    alone = {seed: last(studio.draw(replace(LEMON, seed=seed))).drawing for seed in (1, 2, 3)}
    found: dict[int, View] = {}

    def visit(seed: int) -> None:
        found[seed] = last(studio.draw(replace(LEMON, seed=seed), str(seed)))

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, drawing in alone.items():
        together = found[seed].drawing
        assert drawing is not None and together is not None
        assert [record.image_seed for record in drawing.records] == [record.image_seed for record in together.records]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"seed": None}, "seed is empty"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**40}, "whole number"),
        ({"num_outputs": None}, "num_outputs is empty"),
        ({"top_p": 0}, "above 0"),
        ({"guidance": 31}, "guidance is 31"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"temperature": -0.1}, "temperature"),
        ({"image_weight": None, "image": "x.png"}, "no such file"),
    ],
)
def test_a_mistake_is_said_in_a_sentence(studio: Studio, change: dict[str, object], said: str) -> None:
    view = last(studio.draw(replace(LEMON, **change)))  # type: ignore[arg-type]
    assert view.failed and view.drawing is None
    assert said in view.note and "Traceback" not in view.note


def test_what_no_visitor_can_help_goes_to_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert "secret" not in plain(OSError("secret path"))
    assert plain(ValueError("secret of another library")) == plain(RuntimeError())
    assert "secret" in caplog.text
    assert plain(RequestError("seed", "is x")) == "seed is x"


def test_messages_do_not_tell_where_uploads_lie() -> None:
    assert hide_folders("'/srv/a b/c/photo.png' is truncated (x)") == "'photo.png' is truncated (x)"
    assert hide_folders("prompt is empty") == "prompt is empty"
    assert hide_folders("candidates is 'x'") == "candidates is 'x'"


@pytest.mark.parametrize(
    "data", [b"", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n"]
)
def test_a_hostile_upload_is_refused(studio: Studio, tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(data)
    view = last(studio.draw(replace(LEMON, image=str(file))))
    assert view.failed and "'photo.png'" in view.note and str(tmp_path) not in view.note
    with pytest.raises((DataError, DataError)):
        read_receipt(str(file), LEMON)


def test_a_receipt_fills_the_form(studio: Studio) -> None:
    form = replace(LEMON, negative="a dog", guidance=1.5, temperature=0.8, top_k=9, top_p=0.5)
    end = last(studio.draw(form))
    assert end.drawing is not None
    filled, note = read_receipt(str(end.files[1]), Form())
    assert filled == replace(form, image=None).again(end.drawing.records[1].image_seed)
    assert note == "The settings of this picture are filled in."
    again = last(studio.draw(filled))
    assert again.drawing is not None
    assert np.abs(pixels(end.drawing.images[1]).astype(int) - pixels(again.drawing.images[0])).max() <= 1


def test_a_receipt_says_what_a_page_cannot_fill_in(studio: Studio, tmp_path: Path) -> None:
    photo = save_image(Image.new("RGB", (40, 40), "red"), tmp_path / "photo.png")
    end = last(studio.draw(replace(LEMON, image=str(photo), image_weight=0.5)))
    filled, note = read_receipt(str(end.files[0]), Form())
    assert filled.image is None and filled.image_weight == 0.5 and filled.prompt == "a lemon"
    assert "add photo.png" in note
    with pytest.raises(DataError, match="no receipt"):
        read_receipt(str(photo), Form())


def test_a_picture_written_twice_is_two_files(studio: Studio) -> None:
    drawing = last(studio.draw(LEMON)).drawing
    assert drawing is not None
    one, two = studio.files(drawing), studio.files(drawing)
    assert {*one}.isdisjoint(two) and read_metadata(one[0]) == read_metadata(two[0])
