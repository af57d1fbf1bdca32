"""The web page in Chromium: its server, and what visitors do on it."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageChops
from tracebacks import has_traceback

from clipgen.outputs.metadata import Receipt
from clipgen.utils.listening import usable_address

WAIT = 1000 * float(os.environ.get("CLIPGEN_BROWSER_WAIT", "180"))
"""Milliseconds to wait for something to appear: generating takes a second on a quiet machine."""
SIZES = {"desktop": (1280, 850), "phone": (390, 844)}
EXAMPLES = ["a lemon", "a red heart", "a panda on a pink background"]


@contextmanager
def serve(root: Path, folder: Path, *options: str) -> Iterator[str]:
    """Run `clipgen app` in a process of its own, which must end without leaving files. Yields its address."""
    host, port = usable_address("127.0.0.1", 0)
    command = [sys.executable, "-m", "clipgen", "app", "--port", str(port), "--device", "cpu", *options]
    with (folder / "log").open("w") as log:
        env = os.environ | {"TMPDIR": str(folder)}
        server = subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log)
    address = f"http://{host}:{port}"
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
    """Enter a request that takes a moment."""
    page.locator("#prompt textarea").fill(prompt)
    set_number(page, "num-outputs", images)
    set_number(page, "candidates", images)


def wait_until_idle(page: Any) -> str:
    """Wait until no generation runs. Returns the status line."""
    page.locator("#go:not([disabled])").wait_for()
    return page.locator("#status").inner_text()


def generate(page: Any, button: str = "#go") -> str:
    """Press a button that generates, and wait for the result. Returns the status line."""
    page.locator(button).click()
    page.locator("#stop:not([disabled])").wait_for()
    note = wait_until_idle(page)
    assert re.search(r"seed \d+\.", note), note
    return note


def sources(page: Any) -> list[str]:
    """Addresses of the images in the gallery."""
    page.locator("#images .bar").wait_for()
    return page.locator("#images figure img").evaluate_all("found => found.map(image => image.src)")


def fetch(page: Any, address: str) -> Image.Image:
    """Fetch an image from the server."""
    return Image.open(io.BytesIO(page.request.get(address).body()))


def selected_image(page: Any) -> tuple[Receipt, Image.Image]:
    """Receipt and pixels of the image that is marked as selected."""
    selected = page.locator("#images figure.selected")
    assert selected.count() == 1
    image = fetch(page, selected.locator("img").evaluate("image => image.src"))
    receipt = Receipt.from_metadata({name: str(text) for name, text in image.info.items()})
    assert f"seed {receipt.image_seed}" in selected.inner_text()
    return receipt, image.convert("RGB")


def is_close(one: Image.Image, other: Image.Image) -> bool:
    """Whether two images differ by at most 1 of 255 levels, the documented bound."""
    difference = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    return max(high for _, high in difference.getextrema()) <= 1
