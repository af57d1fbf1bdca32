"""A small GPT and an engine for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from engine_kit import sharp_gpt

from clipgen.engine.engine import Engine
from clipgen.models.gpt import GPT


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return sharp_gpt()


@pytest.fixture
def engine(gpt: GPT) -> Iterator[Engine]:
    engine = Engine(gpt)
    yield engine
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive(), "a call still runs"
