"""Settings that visitors share: downloaded images, links and copied calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from browser_kit import WAIT, fill, generate, is_close, selected_image, status
from PIL import Image

pytestmark = pytest.mark.browser


def test_downloaded_image_fills_in_the_form_for_another_visitor(
    page: Any, browser: Any, url: str, tmp_path: Path
) -> None:
    fill(page, "a red heart")
    generate(page)
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


def test_copied_link_generates_the_image_again_for_another_visitor(page: Any, browser: Any) -> None:
    hostile = "a lemon & <b>#1</b> ${alert(1)} `x` {{y}} \\n %41"
    fill(page, hostile, images=2)
    generate(page)
    page.locator("#images [data-index='1']").click()
    receipt, image = selected_image(page)
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
    generate(other)
    again, same = selected_image(other)
    assert again.text == receipt.text and again.image_seed == receipt.image_seed and is_close(same, image)
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


def test_copied_python_call_generates_the_image_again(page: Any, root: Path, weights: Path, tmp_path: Path) -> None:
    fill(page, 'it\'s "a red heart"')
    generate(page)
    _, image = selected_image(page)
    page.locator("#share").click()
    page.locator("[data-copy=python]").click()
    page.locator("[data-copy=python]", has_text="Copied").wait_for()
    script = page.evaluate("navigator.clipboard.readText()")
    (tmp_path / "weights").symlink_to(weights.parent)
    env = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True, timeout=WAIT / 1000)
    assert is_close(Image.open(tmp_path / "image.png"), image)
    body = page.locator("#share-curl").inner_text()
    assert json.loads(body[body.index("'{") + 1 : body.rindex("'")])["input"]["prompt"] == 'it\'s "a red heart"'
