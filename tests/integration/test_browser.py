"""The web page as people meet it, in Chromium. `make test-browser` runs these."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageChops
from tiny_weights import write_tiny_weights
from tracebacks import has_traceback

from clipgen.config import ModelConfig
from clipgen.outputs.metadata import Receipt, image_digest

pytestmark = pytest.mark.browser
WAIT = 1000 * float(os.environ.get("CLIPGEN_BROWSER_WAIT", "180"))
"""Milliseconds to wait for something to appear: drawing takes a second on a quiet machine."""
SIZES = {"desktop": (1280, 850), "phone": (390, 844)}
EXAMPLES = ["a lemon", "a red heart", "a panda on a pink background"]


@contextmanager
def serve(root: Path, folder: Path, *options: str) -> Iterator[str]:
    """Run `clipgen app` in a process of its own, which must end without leaving files. Yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "clipgen", "app", "--port", str(port), "--device", "cpu", *options]
    with (folder / "log").open("w") as log:
        env = os.environ | {"TMPDIR": str(folder)}
        server = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + max(600, WAIT / 1000)
    try:
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            try:
                httpx.get(address, timeout=600).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield address
        server.send_signal(2)  # Ctrl-C
        server.wait(60)
    finally:
        server.kill()
    log_text = (folder / "log").read_text()
    assert not has_traceback(log_text), log_text
    assert not list(folder.glob("clipgen-app-*")), "files were left behind"


@pytest.fixture(scope="module")
def weights(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that draws in a moment, yet in enough steps to be cancelled, and its example prompts."""
    vqgan, gpt = replace(tiny_config.vqgan, image_size=64), replace(tiny_config.gpt, block_size=64)
    folder = write_tiny_weights(
        tmp_path_factory.mktemp("weights") / "small", replace(tiny_config, vqgan=vqgan, gpt=gpt)
    )
    (folder / "examples.txt").write_text("\n".join(EXAMPLES))
    return folder


@pytest.fixture(scope="module")
def url(root: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page with a tiny model."""
    with serve(root, tmp_path_factory.mktemp("served"), "--weights", str(weights)) as address:
        yield address


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
    """A fresh visitor, whose browser must not ask other machines nor report script errors."""
    hosts: set[str] = set()
    errors: list[str] = []
    context = browser.new_context(viewport=dict(zip(("width", "height"), SIZES["desktop"], strict=True)))
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
    visitor = context.new_page()
    visitor.set_default_timeout(WAIT)
    visitor.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    visitor.on("pageerror", lambda error: errors.append(str(error)))
    visitor.goto(url)
    visitor.locator("#go").wait_for()
    yield visitor
    context.close()
    assert hosts <= {url.split("/")[2]}, f"asked other machines: {hosts}"
    assert not errors


def status(page: Any, text: str) -> str:
    """Wait until the status line matches. Returns it."""
    line = page.locator("#status", has_text=re.compile(text))
    line.wait_for()
    return line.inner_text()


def set_number(page: Any, name: str, value: int) -> None:
    """Type into the field of a slider or a number."""
    field = page.locator(f"#{name} input[type=number]").first
    field.fill(str(value))
    field.blur()


def fill(page: Any, prompt: str = "a lemon", images: int = 1) -> None:
    """Enter a request that is quick to draw."""
    page.locator("#prompt textarea").fill(prompt)
    set_number(page, "num-outputs", images)
    set_number(page, "candidates", images)


def idle(page: Any) -> str:
    """Wait until nothing is drawn any more. Returns the status line."""
    page.locator("#go:not([disabled])").wait_for()
    return page.locator("#status").inner_text()


def draw(page: Any, button: str = "#go") -> str:
    """Press a button that draws, and wait for the result. Returns the status line."""
    page.locator(button).click()
    page.locator("#stop:not([disabled])").wait_for()
    note = idle(page)
    assert re.search(r"seed \d+\.", note), note
    return note


def sources(page: Any) -> list[str]:
    """The addresses of the images in the gallery."""
    page.locator("#images .bar").wait_for()
    return page.locator("#images figure img").evaluate_all("found => found.map(image => image.src)")


def fetch(page: Any, address: str) -> Image.Image:
    """An image as it is served."""
    return Image.open(io.BytesIO(page.request.get(address).body()))


def shown(page: Any) -> tuple[Receipt, Image.Image]:
    """The image that is marked as selected: its receipt and its pixels."""
    selected = page.locator("#images figure.selected")
    assert selected.count() == 1
    image = fetch(page, selected.locator("img").evaluate("image => image.src"))
    receipt = Receipt.from_metadata({name: str(text) for name, text in image.info.items()})
    assert f"seed {receipt.image_seed}" in selected.inner_text()
    return receipt, image.convert("RGB")


def alike(one: Image.Image, other: Image.Image) -> bool:
    """Whether two images differ by at most 1 of 255 levels, the documented bound."""
    difference = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    return max(high for _, high in difference.getextrema()) <= 1


# --- what is shown is what buttons act on


def select_third(page: Any) -> None:
    page.locator("#images [data-index='2']").click()
    page.locator("#images figure:nth-child(3).selected").wait_for()


def refresh_not(page: Any) -> None:
    select_third(page)


def refresh_by_generate(page: Any) -> None:
    select_third(page)
    draw(page)


def refresh_by_generate_then_select(page: Any) -> None:
    refresh_by_generate(page)
    select_third(page)


def refresh_by_redraw(page: Any) -> None:
    select_third(page)
    draw(page, "#redraw")


def refresh_by_example(page: Any) -> None:
    select_third(page)
    draw(page, "#examples button >> nth=1")


def refresh_by_cancel(page: Any) -> None:
    select_third(page)
    set_number(page, "candidates", 64)
    page.locator("#go").click()
    page.locator("#stop:not([disabled])").click()
    status(page, "Cancelled")
    idle(page)
    page.locator("#images figure:nth-child(3).selected").wait_for()
    set_number(page, "candidates", 4)


def refresh_by_error(page: Any) -> None:
    select_third(page)
    page.locator("#prompt textarea").fill(" ")
    page.locator("#go").click()
    status(page, "prompt is empty")
    idle(page)
    page.locator("#images figure:nth-child(3).selected").wait_for()
    page.locator("#prompt textarea").fill("a lemon")


def refresh_by_history(page: Any) -> None:
    select_third(page)
    draw(page)
    page.locator("#history [data-id]").nth(1).click()
    status(page, "Drawn before")


def refresh_by_zoom(page: Any) -> None:
    select_third(page)
    page.locator("#images [data-index='2']").click()
    page.locator("#images .zoomed").wait_for()
    assert page.locator("#images figure:visible").count() == 1


REFRESHES = [
    refresh_not,
    refresh_by_generate,
    refresh_by_generate_then_select,
    refresh_by_redraw,
    refresh_by_example,
    refresh_by_cancel,
    refresh_by_error,
    refresh_by_history,
    refresh_by_zoom,
]


@pytest.mark.parametrize("refresh", REFRESHES)
def test_every_button_acts_on_the_selected_image(page: Any, tmp_path: Path, refresh: Any) -> None:
    fill(page, images=4)
    draw(page)
    refresh(page)
    receipt, image = shown(page)
    seed = receipt.image_seed

    with page.expect_download() as download:
        page.locator("#download").click()
    assert Receipt.from_file(download.value.path()) == receipt

    with page.expect_download() as download:
        page.locator("#download-all").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert {archive.read(name) for name in archive.namelist()} == {
            page.request.get(source).body() for source in sources(page)
        }

    page.locator("#share").click()
    for name in ("link", "curl", "python"):
        assert re.search(rf'seed(": |=){seed}\b', page.locator(f"#share-{name}").inner_text()), name
    page.locator("#share").click()
    page.locator("#share-link").wait_for(state="detached")

    page.locator("#use-image").click()
    status(page, "set to start from")
    page.locator("#start img").wait_for()
    assert alike(fetch(page, page.locator("#start img").evaluate("image => image.src")), image)
    page.locator("#image [aria-label='Clear'], #image [aria-label='Remove this file']").first.click()

    page.locator("#use-seed").click()
    status(page, f"Seed {seed} is set")
    assert page.locator("#seed input").input_value() == str(seed)
    assert not page.locator("#random input").is_checked()

    draw(page, "#redraw")  # with rows of the selected image on top
    redrawn, _ = shown(page)
    assert redrawn.keep == image_digest(image) and redrawn.image_seed == seed


def test_selection_is_made_with_the_keyboard(page: Any) -> None:
    fill(page, images=2)
    draw(page)
    page.locator("#images [data-index='1']").focus()
    page.keyboard.press("Enter")
    page.locator("#images figure:nth-child(2).selected").wait_for()
    assert page.locator("#images [data-index='1']").get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.activeElement.dataset.index") == "1"


# --- drawing


def test_used_seed_generates_the_same_image_and_another_seed_another(page: Any) -> None:
    fill(page, images=2)
    assert draw(page).startswith("2 images")
    assert len(sources(page)) == 2
    receipt, image = shown(page)
    assert image.size == (64, 64)
    page.locator("#use-seed").click()
    status(page, "is set")
    assert draw(page).startswith("1 image")
    again, same = shown(page)
    assert again.image_seed == receipt.image_seed and alike(same, image)
    set_number(page, "seed", receipt.image_seed + 1)
    draw(page)
    assert not alike(shown(page)[1], image)


def test_example_is_drawn_with_one_click(page: Any) -> None:
    assert page.locator("#examples button").all_inner_texts() == EXAMPLES
    set_number(page, "num-outputs", 1)
    set_number(page, "candidates", 1)
    draw(page, "#examples button >> nth=2")
    assert page.locator("#prompt textarea").input_value() == EXAMPLES[2]
    assert shown(page)[0].prompt[0].text == EXAMPLES[2]


def test_enter_draws_and_shift_enter_breaks_the_line(page: Any) -> None:
    fill(page)
    prompt = page.locator("#prompt textarea")
    prompt.fill("a red")
    prompt.press("End")
    prompt.press("Shift+Enter")
    prompt.press_sequentially("heart")
    assert prompt.input_value() == "a red\nheart"
    prompt.press("Enter")
    page.locator("#stop:not([disabled])").wait_for()
    assert "seed" in idle(page)
    assert prompt.input_value() == "a red\nheart"
    assert shown(page)[0].prompt[0].text == "a red\nheart"


def test_progress_bar_and_previews_appear_while_drawing(page: Any) -> None:
    fill(page, images=4)
    set_number(page, "candidates", 64)
    page.locator("#go").click()
    note = status(page, r"Drawing 64 images · \d+% · \d+ s, about \d+ s left")
    assert 0 < float(page.locator("#status progress").get_attribute("value")) < 1, note
    page.locator("#images figcaption", has_text="unfinished").first.wait_for()
    assert page.locator("#images img").count() == 4
    for button in ("#go", "#use-seed", "#use-image", "#redraw", "#examples button >> nth=0"):
        assert page.locator(button).is_disabled()
    page.locator("#stop").click()
    status(page, "Cancelled")
    idle(page)
    assert page.locator("#status progress").count() == 0
    assert page.locator("#images img").count() == 0, "there was no result before"


def test_page_works_after_reloading_while_drawing(page: Any) -> None:
    fill(page)
    set_number(page, "candidates", 64)
    page.locator("#go").click()
    status(page, "Drawing")
    page.reload()
    page.locator("#go:not([disabled])").wait_for()
    fill(page)
    draw(page)
    assert len(sources(page)) == 1


def test_history_brings_back_images_and_settings(page: Any) -> None:
    fill(page, "a red heart")
    draw(page)
    receipt, image = shown(page)
    fill(page, "a lemon")
    draw(page)
    assert page.locator("#history img").count() == 2
    assert page.locator("#history button").first.bounding_box()["width"] <= 80
    page.locator("#history [data-id]").nth(1).click()
    status(page, "Drawn before")
    assert page.locator("#prompt textarea").input_value() == "a red heart"
    assert shown(page)[0] == receipt and alike(shown(page)[1], image)


# --- settings that travel


def test_downloaded_image_fills_in_the_form_for_another_visitor(
    page: Any, browser: Any, url: str, tmp_path: Path
) -> None:
    fill(page, "a red heart")
    draw(page)
    with page.expect_download() as download:
        page.locator("#download").click()
    file = tmp_path / download.value.suggested_filename
    assert file.name.startswith("a-red-heart-") and file.suffix == ".png"
    download.value.save_as(file)
    other = browser.new_page()
    other.set_default_timeout(WAIT)
    other.goto(url)
    other.get_by_text("Settings of an earlier image").click()
    other.locator("#receipt input[type=file]").set_input_files(file)
    status(other, "filled in")
    assert other.locator("#prompt textarea").input_value() == "a red heart"
    other.close()


def test_copied_link_draws_the_image_again_for_another_visitor(page: Any, browser: Any) -> None:
    hostile = "a lemon & <b>#1</b> ${alert(1)} `x` {{y}} \\n %41"
    fill(page, hostile, images=2)
    draw(page)
    page.locator("#images [data-index='1']").click()
    receipt, image = shown(page)
    page.locator("#share").click()
    page.locator("[data-copy=link]").click()
    page.locator("[data-copy=link]", has_text="Copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    other = browser.new_page()
    other.set_default_timeout(WAIT)
    requested: list[str] = []
    other.on("request", lambda request: requested.append(request.url))
    other.on("dialog", lambda dialog: pytest.fail(f"a script of the prompt ran: {dialog.message}"))
    other.goto(link)
    status(other, "settings of the link")
    assert not any("lemon" in address.partition("#")[0] for address in requested), "prompts end in servers' logs"
    assert other.locator("#prompt textarea").input_value() == hostile
    draw(other)
    again, same = shown(other)
    assert again.text == receipt.text and again.image_seed == receipt.image_seed and alike(same, image)
    assert other.locator("#images figure img").get_attribute("alt") == hostile
    assert other.locator("#history button").get_attribute("title") == hostile
    other.close()


def test_link_with_a_wrong_setting_is_reported(browser: Any, url: str) -> None:
    visitor = browser.new_page()
    visitor.set_default_timeout(WAIT)
    visitor.goto(f"{url}/#prompt=x&guidance=99")
    assert "guidance is 99" in status(visitor, "guidance")
    assert visitor.locator("#prompt textarea").input_value() == ""
    visitor.close()


def test_copied_python_call_draws_the_image_again(page: Any, root: Path, weights: Path, tmp_path: Path) -> None:
    fill(page, 'it\'s "a red heart"')
    draw(page)
    _, image = shown(page)
    page.locator("#share").click()
    page.locator("[data-copy=python]").click()
    page.locator("[data-copy=python]", has_text="Copied").wait_for()
    script = page.evaluate("navigator.clipboard.readText()")
    (tmp_path / "weights").symlink_to(weights.parent)
    env = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True, timeout=WAIT / 1000)
    assert alike(Image.open(tmp_path / "image.png"), image)
    body = page.locator("#share-curl").inner_text()
    assert json.loads(body[body.index("'{") + 1 : body.rindex("'")])["input"]["prompt"] == 'it\'s "a red heart"'


def test_mistakes_are_reported_on_the_page(page: Any, tmp_path: Path) -> None:
    page.locator("#go").click()
    assert "prompt is empty" in status(page, "prompt is")
    page.get_by_text("Start from an image").click()
    (tmp_path / "bad.png").write_bytes(b"no image")
    page.locator("#image input[type=file]").set_input_files(tmp_path / "bad.png")
    assert "not an image that can be read" in status(page, "bad.png")
    page.get_by_text("Settings of an earlier image").click()
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.locator("#receipt input[type=file]").set_input_files(tmp_path / "plain.png")
    status(page, "no receipt")


# --- screens


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 4, 8])
def test_results_are_in_view_after_a_click(page: Any, size: str, count: int) -> None:
    width, height = SIZES[size]
    page.set_viewport_size({"width": width, "height": height})
    fill(page, "a red heart", images=count)
    draw(page)
    sources(page)
    page.wait_for_timeout(1500)  # for the smooth scrolling
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "one has to scroll sideways"
    assert page.locator("#go").bounding_box()["height"] >= 44, "too small for a finger"
    boxes = [image.bounding_box() for image in page.locator("#images figure img").all()]
    captions = [caption.bounding_box() for caption in page.locator("#images figcaption").all()]
    assert len(boxes) == count
    for i, (box, caption) in enumerate(zip(boxes, captions, strict=True)):
        assert caption["y"] >= box["y"] + box["height"], "the caption covers the image"
        assert box["y"] >= 0
        if size == "desktop" or i < 4:
            assert caption["y"] + caption["height"] <= height, "cut off"
    if size == "desktop":
        download = page.locator("#download").bounding_box()
        assert download["y"] + download["height"] <= height
        assert page.evaluate("scrollY") == 0, "everything fits without scrolling"


def test_mini_model_draws_its_own_example(browser: Any, root: Path, tmp_path: Path) -> None:
    with serve(root, tmp_path, "--weights", "mini") as address:
        visitor = browser.new_page()
        visitor.set_default_timeout(WAIT)
        visitor.goto(address)
        examples = (root / "weights" / "mini" / "examples.txt").read_text(encoding="utf-8").splitlines()
        visitor.locator("#examples button").first.wait_for()
        assert visitor.locator("#examples button").all_inner_texts() == examples
        set_number(visitor, "num-outputs", 1)
        set_number(visitor, "candidates", 1)
        draw(visitor, "#examples button >> nth=0")
        receipt, image = shown(visitor)
        assert receipt.model == "mini" and receipt.prompt[0].text == examples[0] and len(set(image.size)) == 1
        visitor.close()
