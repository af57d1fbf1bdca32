"""Refusals of requests that the tests of the pipeline and the interfaces do not cover."""

from __future__ import annotations

import pytest

from clipgen.errors import RequestError
from clipgen.request import GenerationRequest
from clipgen.utils.text import is_blank


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \t\r\n",
        "\u200b",  # zero-width space
        "\ufeff\u200d\u2060",  # byte order mark, joiner, word joiner
        "\u202e\u2066",  # bidirectional marks
        "\u3000\u2028\u00a0",  # wide space, line separator, no-break space
        "\u3164\u115f\u2800",  # Hangul fillers, Braille's blank
        "\ufe0f\U000e0100",  # variation selectors
        "\x00\x1b",
    ],
)
def test_prompt_with_nothing_visible_is_empty(text: str) -> None:
    assert is_blank(text)
    for prompt in (text, ["a lemon", text]):
        with pytest.raises(RequestError, match="prompt is empty"):
            GenerationRequest(prompt)
    with pytest.raises(RequestError, match="negative_prompt is empty"):
        GenerationRequest("a lemon", negative_prompt=text, guidance=2)


@pytest.mark.parametrize("text", [".", "🍋", "❤️", "👩‍🍳", "\u200bx", "ﷺ", "レモン", "\u0301a"])
def test_prompt_with_one_visible_character_is_not_empty(text: str) -> None:
    assert not is_blank(text)
    assert GenerationRequest(text).prompt == text


@pytest.mark.parametrize("part", [("a",), ("a", 1.0, 2.0), ()])
def test_part_that_is_no_pair_is_refused(part: tuple) -> None:
    with pytest.raises(RequestError, match=rf"prompt has a part of {len(part)} values"):
        GenerationRequest([part])  # type: ignore[list-item]
