"""Names of written files: after prompt and seed, and never one that is taken."""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from pathlib import Path

SLUG_BYTES = 80
"""Longest part of a file's name that comes from its prompt."""


def free_stem(out: Path, name: str, seed: int) -> Path:
    """A path in `out` named after prompt and seed, whose files `STEM-*` do not exist yet.

    So nothing is overwritten, unless two processes generate the same prompt and seed into one folder at once.
    """
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", name).lower())
    slug = words.encode()[:SLUG_BYTES].decode(errors="ignore").strip("-") or "image"
    taken = set(os.listdir(out)) if out.is_dir() else set()
    stems = (f"{slug}-{seed}" if copy == 1 else f"{slug}-{seed}-v{copy}" for copy in itertools.count(1))
    return out / next(stem for stem in stems if not any(name.startswith((f"{stem}-", f"{stem}.")) for name in taken))
