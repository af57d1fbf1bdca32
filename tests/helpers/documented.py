"""The commands of a Markdown page: fenced sh, bash and console blocks, statement by statement, as they are printed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

LANGUAGES = ("sh", "bash", "console", "shell")
MARKER = re.compile(r"<!--\s*not run:\s*(.+?)\s*-->")
_FENCE = re.compile(r"^```(\w*)\s*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One statement of a page."""

    page: str
    line: int
    text: str
    not_run: str = ""
    """Why it is not run: the text of `<!-- not run: why -->` on the line before its block."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def read_commands(page: str, markdown: str) -> Iterator[Command]:
    """Yield the commands of all shell blocks of a page, in order."""
    for block in _FENCE.finditer(markdown):
        if block[1] not in LANGUAGES:
            continue
        before = markdown[: block.start()].rstrip().rsplit("\n", 1)[-1]
        marker = MARKER.fullmatch(before.strip())
        first = markdown.count("\n", 0, block.start(2)) + 1
        for line, text in split_statements(block[2], prompt=block[1] == "console"):
            yield Command(page, first + line, text, marker[1] if marker else "")


def read_code(markdown: str, language: str) -> list[str]:
    """Return the blocks of another language."""
    return [block[2] for block in _FENCE.finditer(markdown) if block[1] == language]


def split_statements(block: str, prompt: bool = False) -> Iterator[tuple[int, str]]:
    """Split a block into statements with their first lines, from 0: several lines where quotes or a backslash say so.

    Args:
        prompt: the block shows a session, in which commands follow "$ " and everything else is output.
    """
    text, start = "", 0
    for number, line in enumerate(block.splitlines()):
        if prompt and not text:
            if not line.startswith("$ "):
                continue
            line = line[2:]
        if not text:
            start = number
        text += line + "\n"
        if not text.strip() or text.lstrip().startswith("#"):
            text = ""
        elif _is_complete(text):
            yield start, text.strip()
            text = ""
    if text.strip():
        raise ValueError(f"a statement that does not end: {text!r}")


def _is_complete(text: str) -> bool:
    if text.rstrip().endswith("\\"):
        return False
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return not re.search("unexpected (EOF|end of file)|here-document", done.stderr)
