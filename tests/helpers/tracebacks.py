"""Detection of Python tracebacks in the output of programs, as plain text or in JSON strings."""

from __future__ import annotations

import re

_MARK = re.compile(r'Traceback \(most recent call last\):(\s|[|+]|\\n)+File \\?"')


def has_traceback(text: str) -> bool:
    """Whether a text contains a traceback. The word alone does not count: an input may have that name."""
    return _MARK.search(text) is not None
