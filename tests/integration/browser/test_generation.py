"""Generating on the page: seeds, examples, keyboard, progress, history and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser_kit import (
    EXAMPLES,
    WAIT,
    fill,
    generate,
    is_close,
    selected_image,
    serve,
    set_number,
    sources,
    status,
    wait_until_idle,
)
from PIL import Image

pytestmark = pytest.mark.browser


def test_used_seed_gives_the_same_image_and_another_seed_another(page: Any) -> None:
    fill(page, images=2)
    assert generate(page).startswith("2 images")
    assert len(sources(page)) == 2
    receipt, image = selected_image(page)
    assert image.size == (128, 128)
    page.locator("#use-seed").click()
    status(page, "is set")
    assert generate(page).startswith("1 image")
    again, same = selected_image(page)
    assert again.image_seed == receipt.image_seed and is_close(same, image)
    set_number(page, "seed", receipt.image_seed + 1)
    generate(page)
    assert not is_close(selected_image(page)[1], image)


def test_example_is_generated_with_one_click(page: Any) -> None:
    assert page.locator("#examples button").all_inner_texts() == EXAMPLES
    set_number(page, "num-outputs", 1)
    set_number(page, "candidates", 1)
    generate(page, "#examples button >> nth=2")
    assert page.locator("#prompt textarea").input_value() == EXAMPLES[2]
    assert selected_image(page)[0].prompt[0].text == EXAMPLES[2]


def test_enter_generates_and_shift_enter_breaks_the_line(page: Any) -> None:
    fill(page)
    prompt = page.locator("#prompt textarea")
    prompt.fill("a red")
    prompt.press("End")
    prompt.press("Shift+Enter")
    prompt.press_sequentially("heart")
    assert prompt.input_value() == "a red\nheart"
    prompt.press("Enter")
    page.locator("#stop:not([disabled])").wait_for()
    assert "seed" in wait_until_idle(page)
    assert prompt.input_value() == "a red\nheart"
    assert selected_image(page)[0].prompt[0].text == "a red\nheart"


def test_progress_bar_and_previews_appear_while_generating(page: Any) -> None:
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
    wait_until_idle(page)
    assert page.locator("#status progress").count() == 0
    assert page.locator("#images img").count() == 0, "there was no result before"


def test_page_works_after_reloading_while_generating(page: Any) -> None:
    fill(page)
    set_number(page, "candidates", 64)
    page.locator("#go").click()
    status(page, "Drawing")
    page.reload()
    page.locator("#go:not([disabled])").wait_for()
    fill(page)
    generate(page)
    assert len(sources(page)) == 1


def test_history_restores_images_and_settings(page: Any) -> None:
    fill(page, "a red heart")
    generate(page)
    receipt, image = selected_image(page)
    fill(page, "a lemon")
    generate(page)
    assert page.locator("#history img").count() == 2
    assert page.locator("#history button").first.bounding_box()["width"] <= 80
    page.locator("#history [data-id]").nth(1).click()
    status(page, "Drawn before")
    assert page.locator("#prompt textarea").input_value() == "a red heart"
    assert selected_image(page)[0] == receipt and is_close(selected_image(page)[1], image)


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


def test_mini_model_generates_its_own_example(browser: Any, root: Path, tmp_path: Path) -> None:
    with serve(root, tmp_path, "--weights", "mini") as address:
        visitor = browser.new_page()
        visitor.set_default_timeout(WAIT)
        visitor.goto(address)
        examples = (root / "weights" / "mini" / "examples.txt").read_text(encoding="utf-8").splitlines()
        visitor.locator("#examples button").first.wait_for()
        assert visitor.locator("#examples button").all_inner_texts() == examples
        set_number(visitor, "num-outputs", 1)
        set_number(visitor, "candidates", 1)
        generate(visitor, "#examples button >> nth=0")
        receipt, image = selected_image(visitor)
        assert receipt.model == "mini" and receipt.prompt[0].text == examples[0] and len(set(image.size)) == 1
        visitor.close()
