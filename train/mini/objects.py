"""The objects of the world, their names, and what can be put on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

OBJECTS_FILE = Path(__file__).parent / "objects.txt"
_SECTIONS = {"[with a face]": True, "[without a face]": False}


@dataclass(frozen=True)
class Object:
    """A well-known thing.

    Attributes:
        code: of the emoji that shows it.
        names: what people call it, the commonest first.
        has_face: whether it has a face of its own.
    """

    code: str
    names: tuple[str, ...]
    has_face: bool

    @property
    def name(self) -> str:
        """Its commonest name."""
        return self.names[0]


@cache
def read_objects() -> dict[str, Object]:
    """All objects by name, in the order of the file.

    Raises:
        ValueError: a line that is neither a section, a comment, nor a code followed by names.
    """
    objects: dict[str, Object] = {}
    has_face: bool | None = None
    for number, line in enumerate(OBJECTS_FILE.read_text(encoding="utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if line in _SECTIONS:
            has_face = _SECTIONS[line]
            continue
        code, _, names = line.partition(" ")
        found = Object(code, tuple(name.strip() for name in names.split(",")), bool(has_face))
        if has_face is None or not all(found.names) or found.name in objects:
            raise ValueError(
                f"{OBJECTS_FILE.name}:{number} reads {line!r}; a line is a code and names, below a section's head"
            )
        objects[found.name] = found
    return objects
