"""Types of argparse's arguments that check a range."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(low: int) -> Callable[[str], int]:
    """Return a type for `add_argument` that takes whole numbers from `low` on and names what else was given."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low:
            raise argparse.ArgumentTypeError(f"{text!r}; use a whole number, {low} or more")
        return number

    return parse
