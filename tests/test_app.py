"""The web page without a browser: what its buttons do, and what its server hands out."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from local_server import serving, wait_until
from PIL import Image

from clipgen.app_actions import Form, Studio, View, hide_folders, plain, read_receipt
from clipgen.coverage import Coverage, build_index
from clipgen.images import ImageError, read_metadata, save_image
from clipgen.receipt import Receipt, ReceiptError
from clipgen.request import RequestError

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
    index = Coverage(build_index(images, [f"Picture {i}" for i in range(9)], images[:4]))
    monkeypatch.setattr(studio.pipe, "coverage", index)
    monkeypatch.setattr("clipgen.coverage.LOW", 1.01 if low else 0)
    note = last(studio.draw(LEMON)).note
    if low:
        assert "This model has seen little like it; the nearest of its training pictures is Picture " in note
    else:
        assert re.search(r"Coverage \d+ of 100, nearest training pictures: Picture \d; Picture \d; Picture \d\.", note)


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
    with pytest.raises((ImageError, ReceiptError)):
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
    with pytest.raises(ReceiptError, match="no receipt"):
        read_receipt(str(photo), Form())


def test_a_picture_written_twice_is_two_files(studio: Studio) -> None:
    drawing = last(studio.draw(LEMON)).drawing
    assert drawing is not None
    one, two = studio.files(drawing), studio.files(drawing)
    assert {*one}.isdisjoint(two) and read_metadata(one[0]) == read_metadata(two[0])


# --- the server ---


@pytest.fixture(scope="module")
def url(studio: Studio) -> Iterator[str]:
    """The page, served."""
    pytest.importorskip("gradio", reason="the page needs Gradio: `make app` or `make test-browser` installs it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(studio.folder))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        from clipgen.app import Page, launch

        page = Page(studio)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        yield launch(page, "127.0.0.1", port, block=False).rstrip("/")
        page.blocks.close(verbose=False)


def foreign(text: str) -> set[str]:
    """Hosts of other machines that a page would ask for scripts, styles, fonts or pictures."""
    loaded = r"""(?:src=|href=|url\(|@import|fetch\(|import\()\s*["'(]*\s*(?:https?:)?//([^/"')\s]+)"""
    return {host for host in re.findall(loaded, text) if not host.startswith(("127.0.0.1", "localhost"))}


def test_the_check_for_foreign_hosts_finds_them() -> None:
    assert foreign('<link href="https://fonts.googleapis.com/css2">') == {"fonts.googleapis.com"}
    assert foreign('<script src="//cdn.example/x.js">') == {"cdn.example"}


def test_nothing_on_the_page_comes_from_elsewhere(url: str) -> None:
    page, config, theme = (httpx.get(url + path).raise_for_status() for path in ("/", "/config", "/theme.css"))
    for answer in (page, theme):
        assert foreign(answer.text) == set()
    assert "Generate" in page.text
    told = config.json()
    assert told["stylesheets"] == [] or not foreign(" ".join(f"url({s})" for s in told["stylesheets"]))
    assert not told["analytics_enabled"]
    assert not told.get("share_url")
    for host in ("googleapis", "gstatic", "cloudflare", "jsdelivr"):
        assert host not in theme.text + config.text


def test_the_server_listens_on_the_loopback_interface(url: str) -> None:
    assert url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "//etc/passwd",
        "../../../../../../etc/passwd",
        "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "pyproject.toml",
        "weights/mini/config.yaml",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
        "https://example.com/",
        "~/.bashrc",
    ],
)
@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/gradio_api/proxy="])
def test_no_other_file_is_served(url: str, route: str, path: str) -> None:
    answer = httpx.get(url + route + path, follow_redirects=False)
    assert answer.status_code in (400, 403, 404, 307) and "root:" not in answer.text
    assert "location" not in answer.headers or "example.com" not in answer.headers["location"].split("/")[:3]


def crafted(url: str, path: str, box: str = "image", event: str = "upload") -> httpx.Response | str:
    """Tell the page that a file with this path was uploaded; its refusal, or all that its server says to that."""
    config = httpx.get(f"{url}/config").json()
    (target,) = [part["id"] for part in config["components"] if part["props"].get("elem_id") == box]
    (call,) = [made for made in config["dependencies"] if [target, event] in made["targets"]]
    file = {"path": path, "url": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    data = [file if place == target or box == "go" else None for place in call["inputs"]]
    body = {"data": data, "fn_index": call["id"], "session_hash": uuid.uuid4().hex}
    asked = httpx.post(f"{url}/gradio_api/queue/join", json=body)
    if asked.status_code != 200:
        return asked
    return httpx.get(f"{url}/gradio_api/queue/data", params={"session_hash": body["session_hash"]}, timeout=30).text


@pytest.mark.parametrize(("box", "event"), [("image", "upload"), ("receipt", "upload"), ("go", "click")])
@pytest.mark.parametrize(
    "path", ["/etc/passwd", "pyproject.toml", "{outside}", "{folder}/../passwd.png", "/proc/self/environ"]
)
def test_a_crafted_request_reads_no_file_that_was_not_uploaded(
    url: str, studio: Studio, tmp_path: Path, box: str, event: str, path: str
) -> None:
    outside = save_image(Image.new("RGB", (9, 9)), tmp_path / "secret.png", metadata={"clipgen": "secret"})
    path = path.format(outside=outside, folder=studio.folder)
    before = set(studio.folder.rglob("*"))
    said = crafted(url, path, box, event)
    assert isinstance(said, str) and '"success":false' in said, said
    assert (
        not re.search("root:|dependencies|secret", said.replace(path, "")) and set(studio.folder.rglob("*")) == before
    )


def test_what_was_uploaded_is_read(url: str, tmp_path: Path) -> None:
    with save_image(Image.new("RGB", (9, 9)), tmp_path / "a.png").open("rb") as file:
        [path] = httpx.post(f"{url}/gradio_api/upload", files={"files": file}).json()
    said = crafted(url, path)
    assert isinstance(said, str) and '"success":true' in said


@pytest.mark.parametrize(("box", "event"), [("image", "upload"), ("go", "click")])
@pytest.mark.parametrize("scheme", ["http", "HTTP", "ftp"])
def test_a_crafted_request_makes_the_page_fetch_nothing(url: str, box: str, event: str, scheme: str) -> None:
    with serving() as inside, pytest.MonkeyPatch.context() as patch:
        import gradio.processing_utils as gradio

        fetched: list[str] = []
        patch.setattr(gradio.sh, "get", lambda address, **_: fetched.append(address))  # whatever protection there is
        address = inside.put("/secret.png", b"secret").replace("http", scheme, 1)
        said = crafted(url, address, box, event)
        assert not isinstance(said, str) and said.status_code == 403 and "not fetched" in said.text
        for place in ("file=", "proxy="):
            assert httpx.get(f"{url}/gradio_api/{place}{address}").status_code in (403, 404)
        assert inside.requests == [] and fetched == []


def test_addresses_are_found_at_any_depth_and_however_they_are_written() -> None:
    guard = pytest.importorskip("clipgen.app_guard", exc_type=ImportError)
    assert guard.names_address(b'{"data": [[{"a": {"path": "http://x/"}}]]}')
    assert guard.names_address(b'{"path": "\\u0068ttps://x/"}') and guard.names_address(b'{"path": " HTTP://x"}')
    assert not guard.names_address(b'{"path": "/tmp/a.png", "url": "http://127.0.0.1:7860/file=/tmp/a.png"}')
    assert not guard.names_address(b"[" * 100_000) and not guard.names_address(b"\xff")


def test_endless_requests_are_refused(url: str) -> None:
    answer = httpx.post(f"{url}/gradio_api/queue/join", content=b" " * (2 << 20))
    assert answer.status_code == 413


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_stopped(url: str, tiny_weights: Path, tmp_path: Path, sign: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "clipgen", "app", "--port", str(port), "--weights", str(tiny_weights)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "CLIPGEN_DEVICE": "cpu"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        there = f"http://127.0.0.1:{port}"
        wait_until(lambda: server.poll() is not None or answers(there))
        [folder] = tmp_path.glob("clipgen-app-*")
        with save_image(Image.new("RGB", (9, 9)), tmp_path / "a.png").open("rb") as file:
            [path] = httpx.post(f"{there}/gradio_api/upload", files={"files": file}).json()
        assert Path(path).is_relative_to(folder)
        server.send_signal(sign)
        server.wait(30)
    finally:
        server.kill()
    assert not list(tmp_path.glob("clipgen-app-*"))
    assert "Traceback" not in (tmp_path / "log").read_text()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def test_a_drawn_picture_is_served_as_it_was_written(url: str, studio: Studio) -> None:
    end = last(studio.draw(LEMON))
    answer = httpx.get(f"{url}/gradio_api/file={end.files[0]}")
    assert answer.status_code == 200 and answer.content == end.files[0].read_bytes()
