"""Python's tracebacks in what programs say, whether plain or as a JSON string."""

from __future__ import annotations

import re

_MARK = re.compile(r'Traceback \(most recent call last\):(\s|[|+]|\\n)+File \\?"')


def has_traceback(text: str) -> bool:
    """Whether a traceback is in a text. The word alone is none: an input may be called so, and be named."""
    return _MARK.search(text) is not None
