"""Where pictures come from: a folder tree, a list file, or WebDataset shards, on disk or over HTTP.

All of them become one thing: numbered pictures with a name each, any of which can be read at any time. So the order is
free, shuffling is exact, and going on in the middle of an epoch reads nothing twice. Remote shards are fetched once
per machine into a cache, resumed after a break; processes of one machine share it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from filelock import FileLock
from rich.progress import track
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from clipgen.errors import DataError, DownloadError
from clipgen.utils.download import download

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class Source(Protocol):
    """Numbered pictures."""

    names: Sequence[str]

    def read(self, index: int) -> bytes:
        """The bytes of one picture's file.

        Raises:
            OSError: it cannot be read.
        """
        ...


class Files:
    """Pictures that are files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.names: Sequence[str] = [str(path) for path in paths]

    def read(self, index: int) -> bytes:
        return Path(self.names[index]).read_bytes()


class Spread:
    """At most `most` pictures of another source, spread evenly over it."""

    def __init__(self, source: Source, most: int) -> None:
        count = len(source.names)
        self._source, self._rows = source, [i * count // min(most, count) for i in range(min(most, count))]
        self.names: Sequence[str] = [source.names[row] for row in self._rows]

    def read(self, index: int) -> bytes:
        return self._source.read(self._rows[index])


class Shards:
    """Pictures inside tar files: where each one begins is looked up once, when this is made."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Args: paths of uncompressed tar files.

        Raises:
            DataError: one is missing, compressed, cut off or no tar file.
        """
        self.paths = list(paths)
        self._places: list[tuple[int, int]] = []  # offset and size of each picture
        names, counts = [], []
        for path in self.paths:
            members = _index(path)
            counts.append(len(members))
            names += [f"{path}/{name}" for name, _, _ in members]
            self._places += [(offset, size) for _, offset, size in members]
        self.names: Sequence[str] = names
        self._ends = list(accumulate(counts))

    def read(self, index: int) -> bytes:
        offset, size = self._places[index]
        with self.paths[bisect_right(self._ends, index)].open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError("the shard ends in the middle of it")
        return data


def _index(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of every picture in a tar file, in its order."""
    found = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # WebDataset's rule: the key ends at the first dot, what follows is the kind. 12.seg.png is no picture.
                kind = base_plus_ext(member.name)[1]
                if member.isfile() and kind is not None and f".{kind.lower()}" in SUFFIXES:
                    found.append((member.name, member.offset_data, member.size))
                tar.members = []  # type: ignore[attr-defined]  # or it keeps every header of a large shard in memory
    except FileNotFoundError:
        raise DataError(f"no shard {path}; check the numbers in the braces") from None
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"shard {path}: {error}; shards are whole, uncompressed .tar files") from error
    return found


def open_source(data: str | Path) -> Source:
    """Find the pictures that `--data` names.

    Args:
        data: a folder of images or of .tar shards, searched to any depth; a .txt file with one path a line (relative
            to its folder; empty lines and those that begin with # do not count); or shards, with braces for many:
            "data/{000000..000127}.tar", also http:// and https://; or MODULE:FUNCTION=TEXT, a function that is given
            the text and returns a Source of one's own, such as images that are made when they are asked for.

    Raises:
        DataError: nothing there, nothing usable in it, or a shard that cannot be had.
    """
    text = str(data)
    if text.endswith(".tar") or urlsplit(text).scheme in ("http", "https"):
        return _checked(Shards(_local(expand_urls(text))), text)
    path = Path(data)
    made_by = _FUNCTION.fullmatch(text)
    if made_by and not path.exists():
        return _checked(_call(*made_by.groups()), text)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if not p.name.startswith(".") and p.is_file())
        pictures = [p for p in files if p.suffix.lower() in SUFFIXES]
        tars = [p for p in files if p.suffix.lower() == ".tar"]
        return _checked(Shards(tars) if tars and not pictures else Files(pictures), text)
    if path.suffix.lower() == ".txt" and path.is_file():
        return _checked(Files(_listed(path)), text)
    raise DataError(
        f"{text} is not a folder, a .txt file of paths, .tar shards or MODULE:FUNCTION=TEXT; "
        'use a folder of images, a list file, or shards such as "data/{000000..000127}.tar"'
    )


_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):([A-Za-z_]\w*)=(.*)")


def _call(module: str, function: str, text: str) -> Source:
    """The source that a function of one's own makes of a text."""
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{module}:{function} cannot be had: {error}; name a module on PYTHONPATH and a function in it"
        ) from error
    return make(text)


def _checked(source: Source, text: str) -> Source:
    if not source.names:
        raise DataError(f"{text} holds no image; looked for {', '.join(sorted(SUFFIXES))}")
    return source


def _listed(path: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8; a list file holds one path a line") from error
    return [path.parent / line for line in lines if line and not line.startswith("#")]


def cache_folder() -> Path:
    """Where remote shards are kept: CLIPGEN_CACHE/shards, by default ~/.cache/clipgen/shards."""
    return Path(os.environ.get("CLIPGEN_CACHE", "").strip() or "~/.cache/clipgen").expanduser() / "shards"


def _local(urls: list[str]) -> list[Path]:
    """Paths of shards; remote ones are fetched first."""
    remote = any(urlsplit(url).scheme in ("http", "https") for url in urls)
    shown = track(urls, f"fetching {len(urls)} shards") if remote else urls
    return [_fetched(url) if urlsplit(url).scheme in ("http", "https") else Path(url) for url in shown]


def _fetched(url: str) -> Path:
    """One remote shard in the cache, whole or not there; downloaded by one process of this machine at a time."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{Path(urlsplit(url).path).name}"
    path = cache_folder() / name
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
            part.with_name(f"{part.name}.json").unlink(missing_ok=True)
    return path
