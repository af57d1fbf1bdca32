"""Where images come from: folders, lists of paths and WebDataset shards, on disk or over HTTP.

All of them become one thing: numbered images with a name each, any of which can be read at any time. So the order is
free, shuffling is exact, and a resumed epoch reads nothing twice. Remote shards are downloaded once per machine into a
cache, resumed after an interruption, and shared by the processes of the machine.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import track

from clipgen.errors import DataError, DownloadError
from clipgen.images.pixels import OPTIONAL_FORMATS, read_formats
from clipgen.images.search import drop_companions, expand_pattern, is_hidden, is_remote, walk
from clipgen.utils.download import discard, download
from clipgen.utils.paths import cache_dir
from clipgen.utils.text import expand_home, read_lines

HASHED_CONTENTS = 1000
"""Images whose contents a fingerprint covers, besides the names and sizes of all."""


class Source(Protocol):
    """Numbered images."""

    names: Sequence[str]
    unused: Counter[str]
    """Files that were found and are not among the images: how many of each kind."""

    def read(self, index: int) -> bytes:
        """The bytes of one image's file.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """SHA-256 that identifies the data set wherever it lies: equal for a moved copy, another when images change."""
        ...


@dataclass(frozen=True, slots=True)
class _Entry:
    """An image: a file of its own, or `size` bytes of a tar file from `offset` on."""

    name: str
    path: str
    offset: int = 0
    size: int | None = None


class ImageFiles:
    """Images that are files, or members of uncompressed tar files."""

    def __init__(self, entries: Sequence[_Entry], unused: Counter[str]) -> None:
        self._entries = entries
        self.names: Sequence[str] = [entry.name for entry in entries]
        self.unused = unused

    def read(self, index: int) -> bytes:
        entry = self._entries[index]
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            data = file.read(-1 if entry.size is None else entry.size)
        if entry.size is not None and len(data) < entry.size:
            raise OSError("the shard ends in the middle of it")
        return data

    def fingerprint(self) -> str:
        """Of the names below the images' common folder, the sizes, and the contents of up to `HASHED_CONTENTS`."""
        first, last = (name.split("/")[:-1] for name in (min(self.names), max(self.names)))
        depth = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
        digest = hashlib.sha256()
        for entry in self._entries:
            name = entry.name.split("/", depth)[-1].encode("utf-8", "surrogateescape")
            digest.update(b"%s\0%d\n" % (name, _size(entry)))
        for row in spread_rows(len(self.names), HASHED_CONTENTS):
            try:
                digest.update(hashlib.sha256(self.read(row)).digest())
            except OSError:  # named where it is needed: in training's list of failures
                digest.update(b"unreadable")
        return digest.hexdigest()


def _size(entry: _Entry) -> int:
    if entry.size is not None:
        return entry.size
    try:
        return os.stat(entry.path).st_size
    except OSError:
        return -1


class Subset:
    """At most `max_images` images of another source, spread evenly over it."""

    def __init__(self, source: Source, max_images: int) -> None:
        self._source = source
        self._rows = spread_rows(len(source.names), max_images)
        self.names: Sequence[str] = [source.names[row] for row in self._rows]
        self.unused = source.unused

    def read(self, index: int) -> bytes:
        return self._source.read(self._rows[index])

    def fingerprint(self) -> str:
        """That of the whole source, and which part of it this is."""
        rows = f"{self._source.fingerprint()} {len(self._rows)}"
        return hashlib.sha256(rows.encode()).hexdigest()


def spread_rows(count: int, max_rows: int) -> list[int]:
    """At most `max_rows` of the numbers 0 to count - 1, spread evenly."""
    chosen = min(max_rows, count)
    return [i * count // chosen for i in range(chosen)]


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the formats that can be read on this machine, such as ".jpg" and ".jfif"."""
    formats = read_formats()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


def open_source(data: str | Path) -> Source:
    """Find the images that `--data` names.

    Args:
        data: a folder of images or of .tar shards, searched to any depth; a .txt file with one path per line (relative
            to its folder; blank lines and those that begin with # are skipped); .tar shards; a pattern of any of
            them: "~/data/{000000..000127}.tar", "photos/**/*.jpg"; or MODULE:FUNCTION=TEXT, a function that is given
            the text and returns a `Source`, such as images that are made on demand. Shards may be http(s):// URLs.

    Hidden files and folders are skipped, and a linked folder is searched once.

    Raises:
        DataError: nothing is there, nothing usable is in it, a folder holds both images and shards, or a shard cannot
            be read or downloaded.
    """
    text = str(data)
    if (function := _FUNCTION.fullmatch(text)) and not os.path.lexists(text):
        return _call_function(*function.groups())
    found = _Collector()
    if text.lower().endswith(".txt") and (path := expand_home(text)).is_file():
        for line in read_lines(path, errors="surrogateescape"):
            if line and not line.startswith("#"):
                found.add(line if is_remote(line) else str(path.parent / expand_home(line)), must_exist=False)
    else:
        found.add(text, must_exist=True)
        if found.shards and found.images:
            raise DataError(
                f"{text} holds both {len(found.images)} image files and {len(found.shards)} .tar shards; "
                f'give "{text}/**/*.tar" for the shards alone, or move them to a folder of their own'
            )
    source = ImageFiles(found.entries(), found.unused)
    if not source.names:
        looked_for = ", ".join(sorted(image_suffixes()))
        raise DataError(f"{text} holds no image; looked for {looked_for}{describe_unused(source, '; found ')}")
    return source


_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):([A-Za-z_]\w*)=(.*)")


def _call_function(module: str, function: str, text: str) -> Source:
    """The source that a user's own function makes of a text."""
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        message = f"{module}:{function} cannot be imported: {error}; name a module on PYTHONPATH and a function in it"
        raise DataError(message) from error
    source: Source = make(text)
    if not source.names:
        raise DataError(f"{module}:{function}={text} gives no image")
    return source


def describe_unused(source: Source, prefix: str = "not used: ") -> str:
    """How many files were found and not used, by kind; "" when all were."""
    if not source.unused:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in source.unused.most_common())
    packages = {
        f"{package} to read {suffix}"
        for kind, (package, suffixes) in OPTIONAL_FORMATS.items()
        if kind not in read_formats()
        for suffix in suffixes
        if suffix in source.unused
    }
    hint = f" (install {', '.join(sorted(packages))})" if packages else ""
    return f"{prefix}{kinds}{hint}"


class _Collector:
    """Images, shards and unused files found so far."""

    def __init__(self) -> None:
        self.images: list[str] = []
        self.shards: list[str] = []
        self.unused: Counter[str] = Counter()

    def add(self, text: str, must_exist: bool) -> None:
        """Take in a path, URL or pattern; what is missing is an error here, or later when it is read."""
        for path in expand_pattern(text):
            kind = _suffix(path)
            if os.path.isdir(path):
                files = walk(str(Path(path)), self.unused)
                self.shards += [file for file in files if _suffix(file) == ".tar"]
                self.images += _select_images([file for file in files if _suffix(file) != ".tar"], self.unused)
            elif kind == ".tar" or is_remote(path):
                self.shards.append(path)
            elif kind in image_suffixes() and (os.path.isfile(path) or not must_exist):
                self.images.append(path)
            elif os.path.isfile(path) and path != text:
                self.unused[kind or "without a suffix"] += 1
            elif must_exist:
                raise DataError(
                    f"{text} is not a folder, a .txt file of paths, .tar shards or MODULE:FUNCTION=TEXT; "
                    'use a folder of images, a list file, or shards such as "data/{000000..000127}.tar"'
                )
            else:
                self.images.append(path)

    def entries(self) -> list[_Entry]:
        """Every image; remote shards are downloaded first."""
        entries = [_Entry(path, path) for path in self.images]
        remote = any(map(is_remote, self.shards))
        title, console = f"fetching {len(self.shards)} shards", Console(stderr=True)
        shards = track(self.shards, title, console=console) if remote else self.shards
        for shard in shards:
            entries += _index_shard(shard, str(_fetch(shard)) if is_remote(shard) else shard, self.unused)
        return entries


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _select_images(files: Sequence[str], unused: Counter[str]) -> list[str]:
    """The images among the files of a folder or shard; the others are counted by suffix."""
    images = [name for name in files if _suffix(name) in image_suffixes()]
    unused.update(_suffix(name) or "without a suffix" for name in files if _suffix(name) not in image_suffixes())
    return drop_companions(images, files, unused)


def _index_shard(name: str, path: str, unused: Counter[str]) -> list[_Entry]:
    """Every image of a tar file, in its order, chosen by the same rules as in a folder."""
    files: dict[str, _Entry] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps every header of a large shard in memory
                if member.size < 0:  # the next header would be looked for before this one, for ever
                    raise tarfile.ReadError(f"{member.name[:100]!r} has a negative size")
                if member.isdir():
                    continue
                if is_hidden(member.name):
                    unused["hidden files"] += 1
                elif member.isreg() and not member.issparse():
                    files[member.name] = _Entry(f"{name}/{member.name}", path, member.offset_data, member.size)
                else:
                    unused["links and special files in shards"] += 1
    except FileNotFoundError:
        raise DataError(f"no shard {name}; check the numbers in the braces") from None
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # the last two of hostile headers
        raise DataError(f"shard {name}: {error}; shards are complete, uncompressed .tar files") from error
    return [files[member] for member in _select_images(list(files), unused)]


def _fetch(url: str) -> Path:
    """The cached copy of a remote shard, downloaded first by one process of this machine; complete or not there.

    Raises:
        DataError: it cannot be downloaded.
    """
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{Path(url.partition('?')[0]).name}"
    path = cache_dir() / "shards" / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{name}.lock")):
        if not path.is_file():
            part = path.with_name(f"{name}.part")
            try:
                download(url, part)
            except DownloadError as error:
                raise DataError(f"shard {url}: {error}") from error
            os.replace(part, path)
            discard(part)
    return path
