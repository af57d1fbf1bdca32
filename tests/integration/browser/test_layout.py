"""The layout of results on desktop and phone."""

from __future__ import annotations

from typing import Any

import pytest
from browser_kit import SIZES, fill, generate, sources

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 4, 8])
def test_results_are_in_view_after_a_click(page: Any, size: str, count: int) -> None:
    width, height = SIZES[size]
    page.set_viewport_size({"width": width, "height": height})
    fill(page, "a red heart", images=count)
    generate(page)
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
