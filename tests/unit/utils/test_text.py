"""Text from users: invisible text counts as empty, and printed text cannot control the terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgen.errors import RequestError
from clipgen.request import GenerationRequest
from clipgen.utils.text import is_blank, printable

INVISIBLE = {
    "empty": "",
    "blanks": " \t\r\n\u00a0\u2003\u3000",
    "line and paragraph separator": "\u2028\u2029",
    "zero width": "\u200b\u200c\u200d\u2060\ufeff",
    "direction marks": "\u200e\u200f\u202a\u202c\u2066\u2069",
    "soft hyphen": "\u00ad",
    "control characters": "\x00\x1b\x7f\x85",
    "hangul fillers": "\u115f\u1160\u3164\uffa0",
    "blank Braille pattern": "\u2800",
    "variation selectors": "\ufe0f\U000e0100",
    "grapheme joiner": "\u034f",
    "tags": "\U000e0001\U000e0041",
}


@pytest.mark.parametrize("text", INVISIBLE.values(), ids=INVISIBLE)
def test_prompt_without_visible_character_is_refused_as_empty(text: str) -> None:
    assert is_blank(text)
    with pytest.raises(RequestError, match="prompt is empty"):
        GenerationRequest(text)
    with pytest.raises(RequestError, match="negative_prompt is empty"):
        GenerationRequest("a lemon", negative_prompt=text, guidance=3)
    assert not is_blank(f"{text}a lemon{text}")


@pytest.mark.parametrize("text", ["a", "-", ".", "日本", "🍋", "❤️", "\u0301", "\u0e33", "¿", "�"])
def test_text_with_a_visible_character_is_not_blank(text: str) -> None:
    assert not is_blank(text)


@given(st.text())
def test_text_with_numbers_or_symbols_is_not_blank(text: str) -> None:
    if any(unicodedata.category(char)[0] in "NS" and char != "\u2800" for char in text):
        assert not is_blank(text)


@given(st.text())
def test_printable_text_has_no_control_characters(text: str) -> None:
    assert printable(text).isprintable()
