"""Text that comes from outside or goes to a terminal: prompt files, lists, paths with "~", names, errors."""

from __future__ import annotations

import codecs
import re
import sys
import unicodedata
from pathlib import Path

from clipgen.errors import ConfigError, DataError

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LINE_END = re.compile(r"\r\n|\n|\r")
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode's categories of control and format characters (zero-width space, bidirectional marks) and of spaces."""
_BLANK_CHARACTERS = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
    + "".join(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
)
"""Letters, marks and symbols that are drawn as nothing: fillers, variation selectors, Braille's blank."""


def expand_home(path: str | Path) -> Path:
    """Replace a leading "~" by the user's home folder, as a shell does; other paths stay as they are.

    Raises:
        ConfigError: the user has no home folder, as in many containers.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, KeyError):
        message = f"'{path}' begins with ~, but this user has no home folder; set HOME or give a full path"
        raise ConfigError(message) from None


def read_lines(path: Path, errors: str = "strict") -> list[str]:
    """Read the lines of a text file, or of stdin for "-", without their ends and without surrounding blanks.

    Blank lines are kept as "": line i + 1 of the file is at index i. A byte-order mark is dropped; with one, UTF-16
    (what PowerShell's `>` writes) is understood as well as UTF-8.

    Args:
        errors: "surrogateescape" keeps bytes that are not UTF-8, as file names need it.

    Raises:
        DataError: the file cannot be read or is not such text.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else expand_home(path).read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-16") if data.startswith(_UTF16) else data.decode("utf-8-sig", errors)
    except UnicodeDecodeError:
        raise DataError(f"'{path}' is not UTF-8 text; save it as UTF-8") from None
    if "\0" in text:
        raise DataError(f"'{path}' is not a text file: it contains zero bytes")
    # `str.splitlines` also splits at U+2028, form feeds and others, which may stand inside a prompt or a file name.
    lines = _LINE_END.split(text)
    return [line.strip() for line in (lines[:-1] if lines[-1] == "" else lines)]


def is_blank(text: str) -> bool:
    """Check whether a text shows nothing: only spaces, control and format characters, fillers, variation selectors."""
    return all(unicodedata.category(char) in _INVISIBLE or char in _BLANK_CHARACTERS for char in set(text))


def printable(text: str) -> str:
    r"""One line without control characters, safe for a terminal and for every encoding of stdout.

    Bytes of file names that are not UTF-8 are shown as \xff.
    """
    text = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) & 0xFF:02x}", text)
    return "".join(char if char.isprintable() else " " for char in text).strip()


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
