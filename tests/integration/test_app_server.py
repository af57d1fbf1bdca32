"""What the web page's server hands out, and to whom."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from local_server import serving, wait_until
from PIL import Image

from clipgen.images.pixels import save_image
from clipgen.webui.session import Form, Studio

LEMON = Form(prompt="a lemon", num_outputs=2, candidates=3, random=False, seed=7)


@pytest.fixture(scope="module")
def studio(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tiny_weights, tmp_path_factory.mktemp("page"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def url(studio: Studio) -> Iterator[str]:
    """The page, served."""
    pytest.importorskip("gradio", reason="the page needs Gradio: `make app` or `make test-browser` installs it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(studio.folder))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        from clipgen.webui.page import Page, launch

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
    guard = pytest.importorskip("clipgen.webui.middleware", exc_type=ImportError)
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
    *_, end = studio.draw(LEMON)
    answer = httpx.get(f"{url}/gradio_api/file={end.files[0]}")
    assert answer.status_code == 200 and answer.content == end.files[0].read_bytes()
