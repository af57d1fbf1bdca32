"""Cache of published files: each is downloaded once and verified on arrival and at every use.

CACHE/coco/gpt_coco.pt           complete and verified, or absent
           gpt_coco.pt.json      size and SHA-256 of the first download, where the publisher states none
           gpt_coco.pt.part      the bytes received so far
           gpt_coco.pt.lock      held while fetching: one process fetches, others wait
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from filelock import FileLock, Timeout

from clipgen.errors import DownloadError
from clipgen.utils.download import PATIENT, Log, RetryPolicy, discard, download
from clipgen.utils.files import sha256, write_text
from clipgen.utils.paths import cache_dir
from clipgen.weights.catalog import CATALOG, File, PretrainedModel

Report = Callable[[File, int, int | None], None]
"""Called with the file, the bytes received, and the bytes in all (None while unknown)."""


@dataclass(frozen=True)
class Settings:
    """Where files come from and where they are kept.

    Attributes:
        cache: folder of the downloads.
        mirrors: asked in this order instead of the publishers, for MIRROR/MODEL/FILE.
        offline: use the cache only.
    """

    cache: Path
    mirrors: tuple[str, ...] = ()
    offline: bool = False

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read CLIPGEN_CACHE, CLIPGEN_MIRROR (one URL or several, separated by commas) and CLIPGEN_OFFLINE.

        Raises:
            ConfigError: there is no folder for downloads (`cache_dir`).
            DownloadError: a mirror is not an http(s) URL.
        """
        mirrors = [part.strip() for part in environ.get("CLIPGEN_MIRROR", "").split(",")]
        return cls(
            cache=cache_dir(environ),
            mirrors=tuple(_checked_mirror(mirror) for mirror in mirrors if mirror),
            offline=environ.get("CLIPGEN_OFFLINE", "").strip().lower() not in ("", "0", "false", "no", "off"),
        )

    def path(self, entry: PretrainedModel, file: File) -> Path:
        """Place of a file in the cache, whether it is there or not."""
        return self.cache / entry.name / file.name

    def urls(self, entry: PretrainedModel, file: File) -> list[str]:
        """URLs to try for a file, in order."""
        return [f"{mirror}/{entry.name}/{quote(file.name)}" for mirror in self.mirrors] or [file.url]


_MIRROR = re.compile(
    r"https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?(?:/[a-z0-9._~%+@=/-]*)?", re.IGNORECASE | re.ASCII
)


def _checked_mirror(url: str) -> str:
    try:
        plain = _MIRROR.fullmatch(url) and urlsplit(url).port != 0
    except ValueError:  # no such port, or no such IPv6 address
        plain = False
    if not plain:
        raise DownloadError(
            f"CLIPGEN_MIRROR {url!r} is not a mirror: give http:// or https://, a host and a folder, "
            "without user, ? or #"
        )
    return url.rstrip("/")


def find_model(name: str) -> PretrainedModel:
    """Look up a published model by name.

    Raises:
        DownloadError: there is none of that name.
    """
    if name not in CATALOG:
        raise DownloadError(f"there is no {name!r} to fetch; there is {', '.join(CATALOG)}")
    return CATALOG[name]


def fetch(
    entry: PretrainedModel,
    settings: Settings,
    policy: RetryPolicy = PATIENT,
    report: Report = lambda file, done, total: None,
    log: Log = lambda message: None,
) -> dict[str, Path]:
    """Make sure that all files of a published model are in the cache and verified; returns their paths by part.

    Raises:
        DownloadError: a file cannot be fetched, or differs from what the publisher states or from the first download.
    """
    missing = [file for file in entry.files if settings.offline and not settings.path(entry, file).is_file()]
    if missing:
        names = ", ".join(file.name for file in missing)
        remedies = "; ".join(_fetch_by_hand(file, settings.path(entry, file)) for file in missing)
        raise DownloadError(f"{names}: not in the cache, and CLIPGEN_OFFLINE is set. Unset it, or {remedies}")
    return {file.part: _Fetch(entry, file, settings, policy, report, log).run() for file in entry.files}


def file_state(entry: PretrainedModel, file: File, settings: Settings) -> str:
    """Return "present", "partial" or "absent", by the names on disk; nothing is hashed."""
    path = settings.path(entry, file)
    return "present" if path.is_file() else "partial" if _beside(path, ".part").is_file() else "absent"


def expected_fingerprint(file: File, path: Path) -> tuple[int | None, str | None]:
    """Return the size and the SHA-256 a file must have: as published, else as first downloaded, else None.

    Raises:
        DownloadError: the record of the first download cannot be read.
    """
    record = _beside(path, ".json")
    if file.sha256 is not None or not record.is_file():
        return file.size, file.sha256
    try:
        notes = json.loads(record.read_text(encoding="utf-8"))
        return file.size or int(notes["size"]), str(notes["sha256"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DownloadError(
            f"{record}, the record of the first download, cannot be read; restore it, or delete it to trust the "
            f"next {file.name} that comes"
        ) from error


@dataclass(frozen=True)
class _Fetch:
    """Download of one file into the cache."""

    entry: PretrainedModel
    file: File
    settings: Settings
    policy: RetryPolicy
    report: Report
    log: Log

    @property
    def path(self) -> Path:
        return self.settings.path(self.entry, self.file)

    def run(self) -> Path:
        try:
            # Try without the lock first: a cache in a container image or on another machine may be read-only.
            _, stated = self.expected
            if stated and self.path.is_file() and not self.problem(self.path):
                return self.path
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.locked():
                if not self.reuse():
                    self.fetch()
        except (OSError, NotImplementedError) as error:  # the latter where there are no file locks
            path, reason = getattr(error, "filename", None) or self.path, getattr(error, "strerror", None) or error
            raise DownloadError(f"{path} cannot be used: {reason}; CLIPGEN_CACHE names another cache") from error
        return self.path

    @property
    def expected(self) -> tuple[int | None, str | None]:
        return expected_fingerprint(self.file, self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        lock = FileLock(_beside(self.path, ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.log(f"another process is fetching {self.file.name}; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def reuse(self) -> bool:
        """Whether the cached file is intact. A file put there by hand, without a record, counts as first download."""
        if not self.path.is_file():
            return False
        problem = self.problem(self.path)
        if problem and self.settings.offline:
            remedy = _fetch_by_hand(self.file, self.path)
            raise DownloadError(f"{self.path} {problem}, and CLIPGEN_OFFLINE is set. Unset it, or {remedy}")
        if problem:
            self.log(f"{self.path} {problem}; fetching it again")
            return False
        self.record(self.path, url=None)
        return True

    def fetch(self) -> None:
        """Download from the first URL that works; the file gets its name only when it is verified and recorded."""
        failures = []
        part = _beside(self.path, ".part")
        for url in self.settings.urls(self.entry, self.file):
            try:
                self.download(url, part)
            except DownloadError as error:
                failures.append(str(error))
                self.log(str(error))
                continue
            self.record(part, url)
            os.replace(part, self.path)
            discard(part)
            return
        raise DownloadError(
            f"{self.file.name} cannot be fetched: {'; '.join(failures)}. Set CLIPGEN_MIRROR to a server that has "
            f"{self.entry.name}/{self.file.name}, or {_fetch_by_hand(self.file, self.path)}"
        )

    def download(self, url: str, part: Path) -> None:
        """Download `url` and verify it; if bytes of an earlier attempt were to blame, start over once."""
        resumed = part.is_file()
        size, stated = self.expected
        download(
            url,
            part,
            size=size,
            checked=stated is not None,
            policy=self.policy,
            report=lambda done, total: self.report(self.file, done, total),
            log=self.log,
        )
        problem = self.problem(part)
        if not problem:
            return
        discard(part)
        if resumed:
            self.log(f"{url}: what arrived in parts {problem}; starting over")
            return self.download(url, part)
        record = _beside(self.path, ".json")
        if self.file.sha256 is None and stated:
            problem += (
                f". It is not what the first download was. If its publisher says why, delete {record} and fetch again"
            )
        raise DownloadError(f"{url}: what arrived {problem}")

    def problem(self, path: Path) -> str | None:
        """What is wrong with the file at `path`; None if it is intact as far as can be told."""
        (size, stated), found_size = self.expected, path.stat().st_size
        if size is not None and found_size != size:
            return f"has {found_size:,} bytes instead of {size:,}"
        if stated is None:
            return _find_archive_problem(path)
        found = sha256(path)
        return None if found == stated else f"has the SHA-256 {found} instead of {stated}"

    def record(self, path: Path, url: str | None) -> None:
        """Record the first download, unless the publisher states a hash or a record exists."""
        _, stated = self.expected
        if stated is not None:
            return
        notes = {"size": path.stat().st_size, "sha256": sha256(path), "url": url}
        write_text(_beside(self.path, ".json"), json.dumps(notes, indent=2) + "\n")
        self.log(f"{self.file.name}: its publisher states no hash; SHA-256 {notes['sha256']} is recorded from now on")


def _fetch_by_hand(file: File, path: Path) -> str:
    return f"download {file.url} elsewhere and put it at {path}"


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _find_archive_problem(path: Path) -> str | None:
    """Check a file by its format, where no hash is known: a ZIP archive, whose directory is at its end, or a pickle."""
    with path.open("rb") as file:
        begin = file.read(4)
    if begin == b"PK\x03\x04":
        return None if zipfile.is_zipfile(path) else "is a checkpoint without its end"
    return None if begin[:1] == b"\x80" else "is not a PyTorch checkpoint"
