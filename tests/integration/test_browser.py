"""The web page as people meet it: in Chromium, with the mini model. `make test-browser` runs these."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

pytestmark = pytest.mark.browser
WAIT = 1000 * float(os.environ.get("CLIPGEN_BROWSER_WAIT", "180"))
"""Milliseconds to wait for something to appear: drawing takes a second on a quiet machine."""
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def url(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`python -m clipgen app` in a process of its own, which must end without leaving files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "clipgen", "app", "--port", str(port), "--device", "cpu"]
    with (folder / "log").open("w") as log:
        env = os.environ | {"TMPDIR": str(folder)}
        server = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 3 * WAIT / 1000
    while True:
        assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        try:
            httpx.get(address, timeout=30).raise_for_status()
            break
        except httpx.HTTPError:
            time.sleep(0.5)
    yield address
    server.send_signal(2)  # Ctrl-C
    server.wait(60)
    said = (folder / "log").read_text()
    assert "Traceback" not in said, said
    assert not list(folder.glob("clipgen-app-*")), "files were left behind"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: Debian's, or the one that Playwright has installed."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=found, args=sandbox)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """A fresh visitor, who must not be sent to another machine."""
    hosts: set[str] = set()
    context = browser.new_context(viewport=dict(zip(("width", "height"), SIZES["desktop"], strict=True)))
    visitor = context.new_page()
    visitor.set_default_timeout(WAIT)
    visitor.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    visitor.goto(url)
    visitor.locator("#go").wait_for()
    yield visitor
    context.close()
    assert hosts <= {url.split("/")[2]}, f"asked other machines: {hosts}"


def status(page: Any, text: str) -> str:
    """Wait until the status line says so."""
    line = page.locator("#status", has_text=re.compile(text))
    line.wait_for()
    return line.inner_text()


def set_number(page: Any, name: str, value: int) -> None:
    """Type into a slider's or a number's field."""
    field = page.locator(f"#{name} input[type=number]").first
    field.fill(str(value))
    field.blur()


def few(page: Any, prompt: str = "a lemon", pictures: int = 1) -> None:
    """A request that is quick to draw."""
    page.locator("#prompt textarea").fill(prompt)
    set_number(page, "num-outputs", pictures)
    set_number(page, "candidates", pictures)


def generate(page: Any) -> str:
    """Click, wait; what the status line says in the end."""
    page.locator("#go").click()
    return status(page, r"seed \d+\.")


def drawn(page: Any) -> list[bytes]:
    """The files of the pictures on the page, as they are served."""
    page.locator("#pictures img").first.wait_for()
    sources = page.locator("#pictures img").evaluate_all("found => found.map(image => image.src)")
    return [page.request.get(source).body() for source in dict.fromkeys(sources)]


def test_generate_then_the_same_seed_again_then_another(page: Any, tmp_path: Path) -> None:
    few(page, pictures=2)
    said = generate(page)
    assert said.startswith("2 pictures")
    first = drawn(page)
    assert len(first) == 2 and all(Image.open(_file(tmp_path, data)).size == (144, 144) for data in first)

    page.locator("#use-seed").click()
    status(page, "is set")
    seed = page.locator("#seed input").input_value()
    assert not page.locator("#random input").is_checked()
    assert generate(page).startswith("1 picture")
    assert page.locator("#seed input").input_value() == seed
    with page.expect_download() as download:
        page.locator("#download").click()
    again = Image.open(download.value.path()).convert("RGB")
    best = Image.open(_file(tmp_path, first[0])).convert("RGB")
    difference = max(high for _, high in _difference(best, again).getextrema())
    assert difference <= 1, "not the same picture"

    set_number(page, "seed", int(seed) + 1)
    page.locator("#go").click()
    status(page, f"seed {int(seed) + 1}\\.")
    assert drawn(page)[0] != first[0]


def test_the_download_fills_the_form_of_another_visitor(page: Any, browser: Any, url: str, tmp_path: Path) -> None:
    few(page, "a red heart")
    generate(page)
    with page.expect_download() as download:
        page.locator("#download").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    other = browser.new_page()
    other.set_default_timeout(WAIT)
    other.goto(url)
    other.get_by_text("Settings of an earlier picture").click()
    other.locator("#receipt input[type=file]").set_input_files(file)
    status(other, "filled in")
    assert other.locator("#prompt textarea").input_value() == "a red heart"
    other.close()


def test_keep_the_top_and_redraw_then_the_history(page: Any) -> None:
    few(page)
    generate(page)
    before = drawn(page)
    page.locator("#redraw").click()
    status(page, "Drawing")
    status(page, r"seed \d+\.")
    assert drawn(page) != before
    page.get_by_text("History").click()
    page.locator("#past img").nth(1).click()
    status(page, "Drawn before")
    assert page.locator("#past img").count() == 2


def test_cancel(page: Any) -> None:
    page.locator("#prompt textarea").fill("a lemon")
    set_number(page, "num-outputs", 8)
    set_number(page, "candidates", 64)
    page.locator("#go").click()
    page.locator("#stop:not([disabled])").click()
    status(page, "Cancelled")
    page.locator("#go:not([disabled])").wait_for()


def test_reloading_while_drawing_gives_a_page_that_works(page: Any) -> None:
    few(page)
    set_number(page, "candidates", 64)
    page.locator("#go").click()
    status(page, "Drawing")
    page.reload()
    page.locator("#go:not([disabled])").wait_for()
    few(page)
    generate(page)
    assert len(drawn(page)) == 1


def test_mistakes_are_said_on_the_page(page: Any, tmp_path: Path) -> None:
    page.locator("#go").click()
    assert "prompt is empty" in status(page, "prompt")
    page.get_by_text("Start from a picture").click()
    page.locator("#image input[type=file]").set_input_files(_file(tmp_path, b"no picture"))
    assert "not an image that can be read" in status(page, "bad.png")
    page.get_by_text("Settings of an earlier picture").click()
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.locator("#receipt input[type=file]").set_input_files(tmp_path / "plain.png")
    status(page, "no receipt")


@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits(page: Any, size: str) -> None:
    width, height = SIZES[size]
    page.set_viewport_size({"width": width, "height": height})
    few(page, "a red heart", pictures=2)
    generate(page)
    drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "one has to scroll sideways"
    assert page.locator("#go").bounding_box()["height"] >= 44, "too small for a finger"
    folder = os.environ.get("CLIPGEN_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(1000)
        page.screenshot(path=f"{folder}/app-{size}.png", full_page=True)


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "bad.png"
    path.write_bytes(data)
    return path


def _difference(one: Image.Image, other: Image.Image) -> Image.Image:
    from PIL import ImageChops

    return ImageChops.difference(one, other)
