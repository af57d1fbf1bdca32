"""Screenshots of the web page for docs/: on a desktop and a phone, light and dark, with a generated example.

    clipgen app --port 7860 &
    python benchmarks/page_screenshots.py http://127.0.0.1:7860 --out docs

Needs Chromium and Playwright, as `make test-browser` installs them.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import io
import os
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from clipgen.utils.entry_point import entry_point

SIZES = {"desktop": (1280, 850), "phone": (390, 844)}
COLOURS = 256
"""Of a palette, which makes the files a third as large."""


def drawn_page(browser: Any, url: str, size: tuple[int, int], scheme: str, example: int) -> Any:
    """A page on which one of the example prompts has been generated."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(600_000)
    page.goto(url)
    page.locator("#examples button").nth(example).click()
    page.locator("#images .bar").wait_for()
    page.locator("#go:not([disabled])").wait_for()
    page.wait_for_timeout(1500)  # for the smooth scrolling
    return page


@entry_point()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="address of a running page")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for app-*.png")
    parser.add_argument("--example", type=int, default=0, help="index of the example prompt")
    options = parser.parse_args()
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=sandbox)
        for name, size in SIZES.items():
            for scheme in ("light", "dark"):
                page = drawn_page(browser, options.url, size, scheme, options.example)
                image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
                file = options.out / f"app-{name}-{scheme}.png"
                image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
                print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
                page.context.close()
        browser.close()


if __name__ == "__main__":
    main()
