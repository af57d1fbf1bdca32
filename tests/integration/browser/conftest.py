"""A server with a tiny model, Chromium, and a fresh visitor for each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser_kit import EXAMPLES, SIZES, WAIT, serve
from tiny_weights import write_tiny_weights

from clipgen.config import ModelConfig


@pytest.fixture(scope="session")
def weights(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its example prompts. Its many steps take long enough for a busy browser to notice them."""
    vqgan, gpt = replace(tiny_config.vqgan, image_size=128), replace(tiny_config.gpt, block_size=256)
    folder = write_tiny_weights(
        tmp_path_factory.mktemp("weights") / "small", replace(tiny_config, vqgan=vqgan, gpt=gpt)
    )
    (folder / "examples.txt").write_text("\n".join(EXAMPLES))
    return folder


@pytest.fixture(scope="session")
def url(root: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page with a tiny model."""
    with serve(root, tmp_path_factory.mktemp("served"), "--weights", str(weights)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: Debian's, or the one that Playwright has installed. Its event loop must not outlive these tests."""
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
