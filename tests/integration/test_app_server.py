"""The HTTP server of the page: files it serves, access, and refusals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from local_server import serving, wait_until
from PIL import Image
from tracebacks import has_traceback
from typer.testing import CliRunner

from clipgen.cli.main import app
from clipgen.errors import UnavailableError
from clipgen.images.pixels import save_image
from clipgen.utils.listening import usable_address
from clipgen.webui.form import Form
from clipgen.webui.session import Session

LEMON = Form(prompt="a lemon", num_outputs=2, candidates=3, random_seed=False, seed=7)
PAGE_NEEDS_GRADIO = "the page needs Gradio: `make app` or `make test-browser` installs it"


@pytest.fixture(scope="module")
def session(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(tiny_weights, tmp_path_factory.mktemp("page"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    """The page, served."""
    pytest.importorskip("gradio", reason=PAGE_NEEDS_GRADIO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(session.folder))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        from clipgen.webui.page import Page
        from clipgen.webui.server import launch

        page = Page(session)
        yield launch(page, *usable_address("127.0.0.1", 0)).rstrip("/")
        page.blocks.close(verbose=False)


def foreign(text: str) -> set[str]:
    """Hosts of other machines that a page would ask for scripts, styles, fonts or images."""
    loaded = r"""(?:src=|href=|url\(|@import|fetch\(|import\()\s*["'(]*\s*(?:https?:)?//([^/"')\s]+)"""
    return {host for host in re.findall(loaded, text) if not host.startswith(("127.0.0.1", "localhost"))}


def test_check_for_foreign_hosts_finds_them() -> None:
    assert foreign('<link href="https://fonts.googleapis.com/css2">') == {"fonts.googleapis.com"}
    assert foreign('<script src="//cdn.example/x.js">') == {"cdn.example"}


def test_page_loads_nothing_from_other_hosts(url: str) -> None:
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


def test_server_listens_on_the_loopback_interface(url: str) -> None:
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
def test_file_outside_the_page_s_folder_is_not_served(url: str, route: str, path: str) -> None:
    answer = httpx.get(url + route + path, follow_redirects=False)
    assert answer.status_code in (400, 403, 404, 307) and "root:" not in answer.text
    assert "location" not in answer.headers or "example.com" not in answer.headers["location"].split("/")[:3]


def crafted(url: str, path: str, box: str = "image", event: str = "upload") -> httpx.Response | str:
    """Claim that a file with this path was uploaded; returns the refusal, or the text of the events that follow."""
    config = httpx.get(f"{url}/config").json()
    (target,) = [part["id"] for part in config["components"] if part["props"].get("elem_id") == box]
    (call,) = [made for made in config["dependencies"] if [target, event] in made["targets"] and made["inputs"]]
    file = {"path": path, "url": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    data = [file if place == target or box == "go" else None for place in call["inputs"]]
    body = {"data": data, "fn_index": call["id"], "session_hash": uuid.uuid4().hex}
    asked = httpx.post(f"{url}/gradio_api/queue/join", json=body)
    if asked.status_code != 200:
        return asked
    return httpx.get(f"{url}/gradio_api/queue/data", params={"session_hash": body["session_hash"]}, timeout=600).text


@pytest.mark.parametrize(("box", "event"), [("image", "upload"), ("receipt", "upload"), ("go", "click")])
@pytest.mark.parametrize(
    "path", ["/etc/passwd", "pyproject.toml", "{outside}", "{folder}/../passwd.png", "/proc/self/environ"]
)
def test_crafted_request_reads_no_file_that_was_not_uploaded(
    url: str, session: Session, tmp_path: Path, box: str, event: str, path: str
) -> None:
    outside = save_image(Image.new("RGB", (9, 9)), tmp_path / "secret.png", metadata={"clipgen": "secret"})
    path = path.format(outside=outside, folder=session.folder)
    before = set(session.folder.rglob("*"))
    said = crafted(url, path, box, event)
    assert isinstance(said, str) and '"success":false' in said, said
    assert (
        not re.search("root:|dependencies|secret", said.replace(path, "")) and set(session.folder.rglob("*")) == before
    )


def test_uploaded_image_is_read(url: str, tmp_path: Path) -> None:
    with save_image(Image.new("RGB", (9, 9)), tmp_path / "a.png").open("rb") as file:
        [path] = httpx.post(f"{url}/gradio_api/upload", files={"files": file}).json()
    said = crafted(url, path)
    assert isinstance(said, str) and '"success":true' in said


@pytest.mark.parametrize(("box", "event"), [("image", "upload"), ("go", "click")])
@pytest.mark.parametrize("scheme", ["http", "HTTP", "ftp"])
def test_crafted_request_with_an_address_is_refused_and_fetches_nothing(
    url: str, box: str, event: str, scheme: str
) -> None:
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


def test_function_whose_name_looks_like_an_upload_is_guarded(url: str) -> None:
    body = {"data": [{"path": "http://example.com/secret.png"}], "fn_index": 0, "session_hash": "x"}
    for path in ("/gradio_api/run/upload", "/gradio_api/api/upload", "/gradio_api/call/upload"):
        assert httpx.post(url + path, json=body).status_code == 403
        assert httpx.post(url + path, content=b" " * (2 << 20)).status_code == 413


def test_names_address_finds_addresses_at_any_depth_and_in_any_spelling() -> None:
    guard = pytest.importorskip("clipgen.webui.middleware", exc_type=ImportError)
    assert guard.names_address(b'{"data": [[{"a": {"path": "http://x/"}}]]}')
    assert guard.names_address(b'{"path": "\\u0068ttps://x/"}') and guard.names_address(b'{"path": " HTTP://x"}')
    assert not guard.names_address(b'{"path": "/tmp/a.png", "url": "http://127.0.0.1:7860/file=/tmp/a.png"}')
    assert not guard.names_address(b"[" * 100_000) and not guard.names_address(b"\xff")


def test_request_with_a_long_body_is_refused(url: str) -> None:
    answer = httpx.post(f"{url}/gradio_api/queue/join", content=b" " * (2 << 20))
    assert answer.status_code == 413


@pytest.mark.slow
def test_server_ended_by_sigterm_leaves_no_files(tiny_weights: Path, tmp_path: Path) -> None:
    """With Ctrl-C the browser tests end theirs."""
    if find_spec("gradio") is None:
        pytest.skip(PAGE_NEEDS_GRADIO)
    host, port = usable_address("127.0.0.1", 0)
    command = [sys.executable, "-m", "clipgen", "app", "--port", str(port), "--weights", str(tiny_weights)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "CLIPGEN_DEVICE": "cpu"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        there = f"http://{host}:{port}"
        wait_until(lambda: server.poll() is not None or answers(there))
        [folder] = tmp_path.glob("clipgen-app-*")
        with save_image(Image.new("RGB", (9, 9)), tmp_path / "a.png").open("rb") as file:
            [path] = httpx.post(f"{there}/gradio_api/upload", files={"files": file}).json()
        assert Path(path).is_relative_to(folder)
        server.terminate()
        server.wait(30)
    finally:
        server.kill()
    assert not list(tmp_path.glob("clipgen-app-*"))
    assert not has_traceback((tmp_path / "log").read_text())


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def test_written_image_is_served_unchanged(url: str, session: Session) -> None:
    *_, end = session.generate(LEMON)
    assert end.result is not None
    files = session.write(end.result)
    for file in (*files.images, files.archive):
        answer = httpx.get(f"{url}/gradio_api/file={file}")
        assert answer.status_code == 200 and answer.content == file.read_bytes()


def test_files_shown_to_visitors_are_deleted_by_gradio(session: Session) -> None:
    routes = pytest.importorskip("gradio.route_utils", reason=PAGE_NEEDS_GRADIO)
    from clipgen.webui.page import Page

    *_, end = session.generate(LEMON)
    page, result = Page(session), end.result
    assert result is not None
    before = set(session.folder.rglob("*.*"))
    shown = page.on_recall({page.images: None, page.history: [result]}, SimpleNamespace(id=result.id))[page.images]
    used = page.on_use_image({page.images: shown | {"selected": 1}, page.history: [result]})[page.image]
    assert Path(used).is_file() and len(set(session.folder.rglob("*.*")) - before) == 6, "twice two images and a ZIP"
    routes.delete_files_created_by_app(page.blocks, age=3600)
    assert Path(used).is_file()
    routes.delete_files_created_by_app(page.blocks, age=None)
    assert set(session.folder.rglob("*.*")) == before


def test_upload_above_the_limit_is_refused(url: str) -> None:
    answer = httpx.post(f"{url}/gradio_api/upload", files={"files": b"\0" * (33 << 20)}, timeout=600)
    assert answer.status_code == 413


def call(url: str, box: str, event: str, values: dict[str, object], session_hash: str) -> str:
    """Send an event as a browser does, with values by the elements' ids. Returns the text of the events that follow."""
    config = httpx.get(f"{url}/config").json()
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    (dependency,) = [made for made in config["dependencies"] if [ids[box], event] in made["targets"] and made["inputs"]]
    given = {ids[name]: value for name, value in values.items()}
    defaults = {part["id"]: part["props"].get("value") for part in config["components"]}
    data = [given.get(place, defaults[place]) for place in dependency["inputs"]]
    body = {"data": data, "fn_index": dependency["id"], "session_hash": session_hash}
    httpx.post(f"{url}/gradio_api/queue/join", json=body).raise_for_status()
    return httpx.get(f"{url}/gradio_api/queue/data", params={"session_hash": session_hash}, timeout=600).text


def test_visitor_cannot_act_on_the_images_of_another(url: str, session: Session) -> None:
    one, other = uuid.uuid4().hex, uuid.uuid4().hex
    drawn = call(url, "go", "click", {"prompt": "a lemon", "num-outputs": 2, "candidates": 2}, one)
    found = re.search(r'"id": ?"([0-9a-f]{32})"', drawn)
    assert found, drawn
    shown = {"id": found[1], "selected": 1, "images": []}
    assert "is set: one image" in call(url, "use-seed", "click", {"images": shown}, one)
    assert "no longer kept" in call(url, "use-seed", "click", {"images": shown}, other)


@pytest.mark.parametrize("selected", [2, -1, 1e9, None, "0", [0]])
def test_crafted_selection_is_refused(url: str, selected: object) -> None:
    visitor = uuid.uuid4().hex
    drawn = call(url, "go", "click", {"prompt": "a lemon", "num-outputs": 2, "candidates": 2}, visitor)
    shown = {"id": re.findall(r'"id": ?"([0-9a-f]{32})"', drawn)[-1], "selected": selected}
    for button in ("use-seed", "use-image"):
        assert "no longer kept" in call(url, button, "click", {"images": shown}, visitor)


def test_port_in_use_is_reported_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason=PAGE_NEEDS_GRADIO)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["app", "--port", port, "--weights", str(tmp_path)])
    assert result.exit_code == 2
    [line] = result.stderr.strip().splitlines()
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in line


def test_page_is_served_on_an_ipv6_address(session: Session) -> None:
    pytest.importorskip("gradio", reason=PAGE_NEEDS_GRADIO)
    try:
        host, port = usable_address("::1", 0)
    except UnavailableError:
        pytest.skip("this machine has no IPv6")
    from clipgen.webui.page import Page
    from clipgen.webui.server import launch

    page = Page(session)
    address = launch(page, host, port)
    assert re.fullmatch(r"http://\[::1\]:\d+/", address)
    assert httpx.get(address).is_success
    page.blocks.close(verbose=False)
