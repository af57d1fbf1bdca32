"""Numbers on the command lines of scripts: out-of-range values are refused in one line."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tracebacks import has_traceback

from train.loop.arguments import at_least


@given(st.integers(), st.integers(0, 10))
def test_at_least_accepts_only_its_range(number: int, low: int) -> None:
    if number >= low:
        assert at_least(low)(str(number)) == number
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=f"use a whole number, {low} or more"):
            at_least(low)(str(number))


@pytest.mark.parametrize("text", ["", "x", "1.5", "inf", "0x10", "1e3"])
def test_text_that_is_no_whole_number_is_refused_by_name(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r}; use a whole number, 1 or more"):
        at_least(1)(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "option"),
    [
        (["train.mini.sheet"], "--scenes"),
        (["train.all", ".", "--out", "nowhere"], "--processes"),
    ],
)
@pytest.mark.parametrize("value", ["0", "-3"])
def test_scripts_refuse_numbers_below_one(program: list[str], option: str, value: str) -> None:
    command = [sys.executable, "-m", *program, f"{option}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and not has_traceback(done.stderr)
    assert f"{option}: '{value}'; use a whole number, 1 or more" in done.stderr
