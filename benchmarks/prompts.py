"""The prompts of mini_quality.py, and the emoji that count as right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from clipgen.errors import DataError

PROMPTS = Path(__file__).parent / "prompts.txt"
KINDS = ("object", "style", "background", "synonym", "pair")

_LINE_ART = re.compile(r"\b(sketch|drawing|line art)\b")
_BACKGROUND = re.compile(r"\bon an? ([a-z ]+) background\b")


@dataclass(frozen=True)
class Prompt:
    """One prompt; `groups` holds, for each object that it names, the codes of the emoji that show it."""

    kind: str
    text: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def line_art(self) -> bool:
        """Whether the prompt asks for black lines."""
        return self.kind == "style" and bool(_LINE_ART.search(self.text))

    @property
    def background(self) -> str | None:
        """Background colour in the prompt's words, or None."""
        found = _BACKGROUND.search(self.text)
        return found.group(1) if found else None


def read_prompts(path: Path = PROMPTS) -> list[Prompt]:
    """Read tab-separated prompts; lines that start with # are comments.

    Raises:
        DataError: a line with an unknown kind, no prompt, or a number of groups that does not fit its kind.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        kind, text, *groups = line.split("\t") + [""] * (2 - len(line.split("\t")))
        codes = tuple(tuple(group.split()) for group in groups)
        if kind not in KINDS or not text or len(codes) != 1 + (kind == "pair") or not all(codes):
            raise DataError(
                f"{path}:{number} reads {line!r}; a line is kind ({', '.join(KINDS)}), prompt and codes, separated by "
                "tabs, with two groups of codes for a pair"
            )
        prompts.append(Prompt(kind, text, codes))
    return prompts
