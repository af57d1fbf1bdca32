"""Which files a path, a pattern or a folder names; the same rules hold for the members of shards."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence

from braceexpand import braceexpand

from clipgen.errors import DataError
from clipgen.utils.text import expand_home


def is_remote(path: str) -> bool:
    """Whether this is an http:// or https:// URL."""
    return path.lower().startswith(("http://", "https://"))


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it lies in, is hidden: its name begins with a dot."""
    return any(part.startswith(".") and part.strip(".") for part in name.split("/"))


def expand_pattern(text: str) -> list[str]:
    """Paths and URLs that a text names: "~", braces and globs are expanded unless a file has that very name."""
    path = text if is_remote(text) else str(expand_home(text))
    if os.path.lexists(path):
        return [path]
    try:
        names = list(braceexpand(path))
    except ValueError as error:
        raise DataError(f"{text}: {error}; braces are written like {{000000..000127}}") from None
    found = []
    for name in names:
        is_pattern = not is_remote(name) and glob.has_magic(name) and not os.path.lexists(name)
        found += sorted(glob.glob(name, recursive=True)) if is_pattern else [name]
    if not found:
        raise DataError(f"{text} matches no file; check the pattern")
    return found


def walk(root: str, unused: Counter[str]) -> list[str]:
    """Every visible file below a folder, in order of its path. A folder that several links lead to is searched once."""
    files: list[str] = []
    real_root = os.path.realpath(root)
    folders, links, searched = [root], list[str](), set[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real in searched:
            continue
        searched.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            unused["folders that cannot be opened"] += 1
            continue
        for entry in entries:
            is_folder, is_file = _kind(entry)
            if entry.name.startswith("."):
                unused["hidden folders" if is_folder else "hidden files"] += 1
            elif is_folder and entry.is_symlink():
                if real_root.startswith(os.path.join(os.path.realpath(entry.path), "")):
                    unused["links to a folder above"] += 1
                else:
                    links.append(entry.path)
            elif is_folder:
                folders.append(entry.path)
            elif is_file:
                files.append(entry.path)
            else:
                unused["broken links" if entry.is_symlink() else "special files"] += 1
    return sorted(files, key=lambda path: path.split("/"))


def _kind(entry: os.DirEntry[str]) -> tuple[bool, bool]:
    """Whether an entry, or what it links to, is a folder or a regular file."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself
        return False, False


def drop_companions(images: Sequence[str], files: Iterable[str], unused: Counter[str]) -> list[str]:
    """Leave out masks and the like: in WebDataset's naming 0001.seg.png is a part of the sample 0001.png or 0001.json.

    Names with more dots but no such sample, as IMG_2024.05.01.jpg, are images of their own.
    """
    samples = {stem for stem, _ in map(os.path.splitext, files) if "." not in os.path.basename(stem)}
    kept = [name for name in images if not _is_companion(name, samples)]
    if len(kept) < len(images):
        unused["masks or other parts of a sample (a.seg.png beside a.png)"] += len(images) - len(kept)
    return kept


def _is_companion(name: str, samples: set[str]) -> bool:
    folder, base = os.path.split(name)
    key, *middle, _ = base.split(".")
    return bool(middle) and all(part.isalpha() for part in middle) and os.path.join(folder, key) in samples
