"""The page without a browser: requests of its visitors, with a tiny model."""

from __future__ import annotations

import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tracebacks import has_traceback

from clipgen.errors import RequestError
from clipgen.images.pixels import read_metadata, save_image
from clipgen.outputs.metadata import Receipt
from clipgen.webui.form import Form, read_receipt
from clipgen.webui.session import Result, Session, Update, describe_error, hide_folders
from clipgen.weights.training_index import TrainingIndex
from train.index import build_index

LEMON = Form(prompt="a lemon", num_outputs=2, candidates=3, random_seed=False, seed=7)


@pytest.fixture(scope="module")
def session(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    session = Session(tiny_weights, tmp_path_factory.mktemp("page"), device="cpu", dtype="float32")
    yield session
    session.close()


def last(updates: Iterator[Update]) -> Update:
    return list(updates)[-1]


def drawn(session: Session, form: Form, **settings: object) -> Result:
    """Result of a successful request."""
    update = last(session.generate(form, **settings))  # type: ignore[arg-type]
    assert update.result is not None, update.note
    return update.result


def difference(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of two images, in 8-bit levels."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def test_request_reports_progress_then_previews_then_the_result(session: Session) -> None:
    first, *running, end = session.generate(LEMON, "me")
    assert first.note == "Starting …" and first.progress == 0
    shares = [update.progress for update in running]
    assert shares == sorted(shares) and shares[-1] == 1  # type: ignore[type-var]
    assert running[-1].note.startswith("Decoding and ranking 3 images · ")
    previews = [update for update in running if update.previews]
    assert previews and all(len(update.previews) == 2 for update in previews)  # type: ignore[arg-type]
    assert re.fullmatch(r"Drawing 3 images · \d+% · \d+ s, about \d+ s left", previews[0].note)
    assert end.result is not None and not end.error and end.progress is None
    assert re.match(r"2 images, the best of 3, in \d+\.\d s; seed 7\.", end.note)
    assert not session.running, "nothing is under way any more"


def test_previews_can_be_switched_off(session: Session) -> None:
    assert not any(update.previews for update in session.generate(replace(LEMON, previews=False)))


def test_previews_are_on_by_default_where_decoding_is_cheap(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.default_form().previews
    monkeypatch.setattr(session.pipe.config.vqgan, "image_size", 256)
    assert not session.default_form().previews, "large images on a CPU"


def test_written_images_carry_receipts_and_are_all_in_the_archive(session: Session) -> None:
    result = drawn(session, LEMON)
    files = session.write(result)
    assert len(files.images) == 2 and all(file.is_relative_to(session.folder) for file in files.images)
    for file, record in zip(files.images, result.receipts, strict=True):
        assert Receipt.from_file(file) == record
        assert record.candidates == 3
    assert [file.name for file in files.images] == ["a-lemon-7-1.png", "a-lemon-7-2.png"]
    with zipfile.ZipFile(files.archive) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            file.name: file.read_bytes() for file in files.images
        }


def test_result_written_twice_is_two_sets_of_files(session: Session) -> None:
    result = drawn(session, LEMON)
    one, two = session.write(result), session.write(result)
    assert {*one.images, one.archive}.isdisjoint({*two.images, two.archive})
    assert read_metadata(one.images[0]) == read_metadata(two.images[0])


def test_form_with_the_seed_of_an_image_generates_it_again(session: Session) -> None:
    first = drawn(session, LEMON)
    for image, record in zip(first.images, first.receipts, strict=True):
        again = drawn(session, first.form.with_receipt(record))
        assert len(again.images) == 1
        assert difference(image, again.images[0]) <= 1, "the documented bound is 1 of 255 levels"


def test_random_seed_is_in_the_result_s_form(session: Session) -> None:
    one, two = (drawn(session, replace(LEMON, random_seed=True)) for _ in range(2))
    assert one.form.seed == one.receipts[0].seed != two.form.seed


def test_kept_rows_are_in_the_receipt_and_too_many_are_refused(session: Session) -> None:
    first = drawn(session, LEMON)
    result = drawn(session, replace(LEMON, seed=99), keep=first.images[0], keep_rows=2)
    assert result.receipts[0].keep_rows == 2
    refused = last(session.generate(LEMON, keep=first.images[0], keep_rows=session.pipe.config.vqgan.grid))
    assert refused.error and "keep_rows" in refused.note


def test_negative_prompt_is_in_the_receipt_and_needs_guidance(session: Session) -> None:
    assert drawn(session, replace(LEMON, negative_prompt="a dog")).receipts[0].text == "a lemon, not a dog"
    refused = last(session.generate(replace(LEMON, negative_prompt="a dog", guidance=1)))
    assert refused.error and "raise it" in refused.note


@pytest.mark.parametrize("is_far", [True, False])
def test_note_describes_the_distance_to_the_training_images(
    session: Session, monkeypatch: pytest.MonkeyPatch, is_far: bool
) -> None:
    assert "training" not in last(session.generate(LEMON)).note, "these weights have no index"
    images = F.normalize(torch.randn(9, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    index = TrainingIndex(build_index(images, [f"{i}.png: image {i}" for i in range(9)], images[:4]))
    monkeypatch.setattr(session.pipe, "index", index)
    monkeypatch.setattr("clipgen.weights.training_index.OUT_OF_DISTRIBUTION", 1.01 if is_far else 0)
    note = last(session.generate(LEMON)).note
    if is_far:
        assert re.search(r"Unlike anything this model was trained on; the nearest it has seen is image \d\.$", note)
    else:
        assert re.search(r"Nearest training images: image \d; image \d; image \d\.$", note)


def test_image_to_start_from_changes_the_embedding(session: Session, tmp_path: Path) -> None:
    file = save_image(Image.new("RGB", (40, 40), "red"), tmp_path / "red.png")
    embeddings = [
        session.pipe.embed(form.request().prompt)
        for form in (
            LEMON,
            replace(LEMON, image=str(file)),
            replace(LEMON, image=str(file), image_weight=0.1),
            replace(LEMON, prompt="", image=str(file)),
        )
    ]
    for i, one in enumerate(embeddings):
        assert all((one - other).norm() > 1e-4 for other in embeddings[i + 1 :])


def test_receipt_of_a_written_image_generates_it_again(session: Session) -> None:
    result = drawn(session, replace(LEMON, negative_prompt="a dog", guidance=1.5, temperature=0.8, top_k=9, top_p=0.5))
    form, _ = read_receipt(str(session.write(result).images[1]), Form())
    assert difference(result.images[1], drawn(session, form).images[0]) <= 1


def test_cancel_stops_only_that_visitor_s_request(session: Session) -> None:
    long = replace(LEMON, num_outputs=8, candidates=64)
    mine, theirs = session.generate(long, "me"), session.generate(replace(LEMON, seed=1), "they")
    next(mine), next(theirs)
    session.cancel("me")
    assert last(mine) == Update("Cancelled.", error=True)
    assert last(theirs).result is not None
    session.cancel("me"), session.cancel("nobody")  # nothing to stop


def test_second_request_of_a_visitor_is_ignored_while_the_first_runs(session: Session) -> None:
    first = session.generate(LEMON, "me")
    next(first)
    [refused] = session.generate(LEMON, "me")
    assert refused.ignored and not refused.error and "Still drawing" in refused.note
    assert last(first).result is not None
    assert drawn(session, LEMON, visitor="me")


def test_visitor_who_leaves_stops_the_request(session: Session) -> None:
    updates = session.generate(replace(LEMON, num_outputs=8, candidates=64), "gone")
    next(updates)
    stop = session.running["gone"]
    updates.close()  # type: ignore[attr-defined]
    assert stop.is_set() and "gone" not in session.running


def test_closed_session_stops_running_and_refuses_new_requests(tiny_weights: Path, tmp_path: Path) -> None:
    session = Session(tiny_weights, tmp_path, device="cpu", dtype="float32")
    updates = session.generate(replace(LEMON, num_outputs=8, candidates=64), "me")
    next(updates)
    ending = threading.Timer(0.05, session.close)
    ending.start()
    stopped = last(updates)
    assert stopped.note == "Cancelled." or "closed" in stopped.note
    ending.join()
    assert "closed" in last(session.generate(LEMON, "me")).note


def test_visitors_at_once_get_their_own_images(session: Session) -> None:
    alone = {seed: drawn(session, replace(LEMON, seed=seed)) for seed in (1, 2, 3)}
    together: dict[int, Result] = {}

    def visit(seed: int) -> None:
        together[seed] = drawn(session, replace(LEMON, seed=seed), visitor=str(seed))

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, result in alone.items():
        seeds = [record.image_seed for record in result.receipts]
        assert seeds == [record.image_seed for record in together[seed].receipts]


@pytest.mark.parametrize(
    ("change", "message"), [({"prompt": "  "}, "prompt is empty"), ({"image": "/srv/x.png"}, "'x.png': no such file")]
)
def test_mistake_is_reported_in_one_sentence(session: Session, change: dict[str, object], message: str) -> None:
    update = last(session.generate(replace(LEMON, **change)))  # type: ignore[arg-type]
    assert update.error and update.result is None
    assert message in update.note and "\n" not in update.note and not has_traceback(update.note)


@pytest.mark.parametrize("data", [b"", b"no image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n"])
def test_hostile_upload_is_refused_without_naming_folders(session: Session, tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(data)
    update = last(session.generate(replace(LEMON, image=str(file))))
    assert update.error and "'photo.png'" in update.note and str(tmp_path) not in update.note


def test_errors_that_no_visitor_can_change_go_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    assert "secret" not in describe_error(OSError("secret path"))
    assert describe_error(ValueError("secret of another library")) == describe_error(RuntimeError())
    assert "secret" in caplog.text
    assert describe_error(RequestError("seed", "is x")) == "seed is x"


def test_messages_do_not_name_the_server_s_folders() -> None:
    assert hide_folders("'/srv/a b/c/photo.png' is truncated (x)") == "'photo.png' is truncated (x)"
    assert hide_folders("prompt is empty") == "prompt is empty"
    assert hide_folders("candidates is 'x'") == "candidates is 'x'"


def test_examples_come_from_the_folder_of_weights(session: Session, tiny_weights: Path, tmp_path: Path) -> None:
    assert session.examples() == [], "these weights suggest none"
    folder = shutil.copytree(tiny_weights, tmp_path / "weights")
    (folder / "examples.txt").write_text("a lemon\r\n\n  une pêche \n" + "more\n" * 20, encoding="utf-8")
    suggesting = Session(folder, tmp_path, device="cpu", dtype="float32")
    assert suggesting.examples() == ["a lemon", "une pêche", *["more"] * 6]
    (folder / "examples.txt").write_bytes(b"\xff")
    assert suggesting.examples() == []
    suggesting.close()


def test_examples_of_the_mini_model_are_in_distribution(root: Path) -> None:
    from clipgen.pipeline import ClipGen

    pipe = ClipGen.from_pretrained(root / "weights" / "mini", device="cpu", dtype="float32")
    prompts = (root / "weights" / "mini" / "examples.txt").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == 8 and len(set(prompts)) == 8
    for prompt in prompts:
        match = pipe.query_index(prompt)
        assert match is not None and not match.is_out_of_distribution, f"{prompt!r} is unlike its training images"
