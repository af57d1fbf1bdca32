"""A small GPT and an engine for it."""

from __future__ import annotations

import pytest
from engine_kit import sharp_gpt

from clipgen.engine.engine import Engine
from clipgen.models.gpt import GPT


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return sharp_gpt()


@pytest.fixture
def engine(gpt: GPT) -> Engine:
    return Engine(gpt)
