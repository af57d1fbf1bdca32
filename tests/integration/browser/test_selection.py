"""Buttons act on the image that is marked as selected, whatever refreshed the gallery before."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from browser_kit import fetch, fill, generate, is_close, selected_image, set_number, sources, status, wait_until_idle

from clipgen.outputs.metadata import Receipt, image_digest

pytestmark = pytest.mark.browser


def select_third(page: Any) -> None:
    page.locator("#images [data-index='2']").click()
    page.locator("#images figure:nth-child(3).selected").wait_for()


def no_refresh(page: Any) -> None:
    select_third(page)


def refresh_by_generate(page: Any) -> None:
    select_third(page)
    generate(page)


def refresh_by_generate_then_select(page: Any) -> None:
    refresh_by_generate(page)
    select_third(page)


def refresh_by_redraw(page: Any) -> None:
    select_third(page)
    generate(page, "#redraw")


def refresh_by_example(page: Any) -> None:
    select_third(page)
    generate(page, "#examples button >> nth=1")


def refresh_by_cancel(page: Any) -> None:
    select_third(page)
    set_number(page, "candidates", 64)
    page.locator("#go").click()
    page.locator("#stop:not([disabled])").click()
    status(page, "Cancelled")
    wait_until_idle(page)
    page.locator("#images figure:nth-child(3).selected").wait_for()
    set_number(page, "candidates", 4)


def refresh_by_error(page: Any) -> None:
    select_third(page)
    page.locator("#prompt textarea").fill(" ")
    page.locator("#go").click()
    status(page, "prompt is empty")
    wait_until_idle(page)
    page.locator("#images figure:nth-child(3).selected").wait_for()
    page.locator("#prompt textarea").fill("a lemon")


def refresh_by_history(page: Any) -> None:
    select_third(page)
    generate(page)
    page.locator("#history [data-id]").nth(1).click()
    status(page, "Drawn before")


def refresh_by_zoom(page: Any) -> None:
    select_third(page)
    page.locator("#images [data-index='2']").click()
    page.locator("#images .zoomed").wait_for()
    assert page.locator("#images figure:visible").count() == 1


REFRESHES = [
    no_refresh,
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
    generate(page)
    refresh(page)
    receipt, image = selected_image(page)
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
    assert is_close(fetch(page, page.locator("#start img").evaluate("image => image.src")), image)
    page.locator("#image [aria-label='Clear'], #image [aria-label='Remove this file']").first.click()

    page.locator("#use-seed").click()
    status(page, f"Seed {seed} is set")
    assert page.locator("#seed input").input_value() == str(seed)
    assert not page.locator("#random input").is_checked()

    generate(page, "#redraw")  # with rows of the selected image on top
    redrawn, _ = selected_image(page)
    assert redrawn.keep == image_digest(image) and redrawn.image_seed == seed


def test_selection_is_made_with_the_keyboard(page: Any) -> None:
    fill(page, images=2)
    generate(page)
    page.locator("#images [data-index='1']").focus()
    page.keyboard.press("Enter")
    page.locator("#images figure:nth-child(2).selected").wait_for()
    assert page.locator("#images [data-index='1']").get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.activeElement.dataset.index") == "1"
