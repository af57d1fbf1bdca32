"""Download one URL into one file over HTTP: resumed after a break, retried, bounded in time and in bytes.

The partial file is PATH; PATH.json records its source (URL, size, the server's validator), so that bytes of two
versions are never joined. `clipgen.weights.cache` verifies the result.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib import error as urllib_error
from urllib import request as urllib_request
from urllib.parse import urlsplit

from clipgen.errors import DownloadError

CHUNK = 1 << 18
"""Bytes read at once, at most."""
PROGRESS = 1 << 20
"""New bytes after which earlier failures no longer count, so that an unreliable connection succeeds in the end."""
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}

Report = Callable[[int, int | None], None]
"""Called with the bytes received and the total (None while unknown)."""
Log = Callable[[str], None]


class _Broken(Exception):
    """A failed attempt that may be retried."""

    def __init__(self, message: str, wait: float = 0.0, restart: bool = False) -> None:
        super().__init__(message)
        self.wait = wait
        self.restart = restart


@dataclass(frozen=True)
class RetryPolicy:
    """Timeouts, retries and limits of a download.

    Attributes:
        timeout: seconds to wait for a connection or for the next bytes.
        min_rate: bytes per second; a lower average over `timeout` counts as a failure.
        attempts: failures in a row, without `PROGRESS` new bytes in between, after which it gives up.
        backoff: seconds before the second attempt; each further wait is twice as long.
        max_wait: seconds; also limits a server's Retry-After.
        max_bytes: size limit of a file.
    """

    timeout: float = 30.0
    min_rate: float = 1000.0
    attempts: int = 6
    backoff: float = 1.0
    max_wait: float = 60.0
    max_bytes: int = 1 << 34


PATIENT = RetryPolicy()


@dataclass(frozen=True)
class _Job:
    """The arguments of `download`."""

    url: str
    path: Path
    size: int | None
    checked: bool
    policy: RetryPolicy
    report: Report


@dataclass(frozen=True)
class _Origin:
    """Source of a partial file."""

    url: str
    total: int | None
    validator: str | None


def download(
    url: str,
    path: Path,
    size: int | None = None,
    checked: bool = False,
    policy: RetryPolicy = PATIENT,
    report: Report = lambda done, total: None,
    log: Log = lambda message: None,
) -> None:
    """Download `url` into `path`, resuming from the bytes that are there.

    Args:
        url: http or https; redirects to anything else, or from https to http, are refused.
        path: the partial file, in an existing folder. It is kept for resuming when the download fails.
        size: expected bytes, if known; another size is refused.
        checked: the caller will verify a hash of the file, so the download may resume even if the server has no
            validator (RFC 9110, section 13.1.5); without either it starts over.
        report: called with the progress, which returns to 0 when the download starts over.

    Raises:
        DownloadError: it failed permanently or too often, or the disk is full.
    """
    job = _Job(url, path, size, checked, policy, report)
    before, failures, restarts = _length(path), 0, 0
    while True:
        try:
            return _attempt(job)
        except _Broken as broken:
            if broken.restart:
                discard(path)
            reached = _length(path)
            failures = 1 if reached >= before + PROGRESS else failures + 1
            restarts += reached < before  # the file has changed meanwhile
            before = reached
            if failures >= policy.attempts or restarts >= policy.attempts:
                raise DownloadError(f"{url} {broken}; gave up after {failures} attempts in a row") from broken
            wait = min(policy.max_wait, max(broken.wait, policy.backoff * 2 ** (failures - 1)))
            log(f"{url} {broken}; trying again in {wait:.0f} s")
            time.sleep(wait)
        except OSError as error:  # of the disk: those of the network have become _Broken
            raise DownloadError(f"{path} cannot be written: {error.strerror or error}") from error


def discard(path: Path) -> None:
    """Delete a partial file and its record."""
    path.unlink(missing_ok=True)
    _notes(path).unlink(missing_ok=True)


def _attempt(job: _Job) -> None:
    have, origin = _length(job.path), _read_origin(job.path)
    if origin is None or origin.url != job.url or not (job.checked or origin.validator):
        have, origin = 0, None
    response = _open(job.url, _headers(have, origin), job.policy.timeout)
    if response is None:  # 416: there is nothing after what we have
        if origin and have == (job.size or origin.total):
            return
        raise _Broken("has no more bytes to send, but the file is not complete", restart=True)
    with response:
        _check_kind(job.url, response)
        start, total = _extent(response, have, origin)
        if job.size is not None and total not in (None, job.size):
            raise DownloadError(f"{job.url} offers {total:,} bytes; {job.size:,} are expected: it is another file")
        total = job.size if total is None else total
        _check_room(job, start, total)
        if start == 0:
            discard(job.path)
            origin = _Origin(job.url, total, _validator(response))
            _notes(job.path).write_text(json.dumps(origin.__dict__), encoding="utf-8")
        have = _receive(job, response, start, total)
    if total is not None and have < total:
        raise _Broken(f"broke off at {have:,} of {total:,} bytes")


def _headers(have: int, origin: _Origin | None) -> dict[str, str]:
    headers = {"User-Agent": "clipgen", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if origin and origin.validator:  # the server sends the whole file when it has changed since
            headers["If-Range"] = origin.validator
    return headers


class _Redirects(urllib_request.HTTPRedirectHandler):
    """Redirect handler for http(s) only; Python's default also follows ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        allowed = {"https"} if urlsplit(req.full_url).scheme == "https" else {"http", "https"}
        if urlsplit(newurl).scheme not in allowed:
            raise DownloadError(
                f"{req.full_url} redirects to {newurl!r}; only http(s) is followed, and never from https"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str], timeout: float) -> Any:
    """The response with status 200 or 206, or None for 416."""
    try:
        request = urllib_request.Request(url, headers=headers)
        return urllib_request.build_opener(_Redirects).open(request, timeout=timeout)
    except urllib_error.HTTPError as error:
        error.close()
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and "Range" in headers:
            return None
        answer = f"answered {error.code} {http.client.responses.get(error.code, '')}".rstrip()
        if error.code in _TRANSIENT:
            asked = error.headers.get("Retry-After", "")
            raise _Broken(answer, float(asked) if re.fullmatch(r"\d{1,9}", asked) else 0.0) from error
        if error.code in range(300, 400):
            answer += ", a redirect that is not followed: in circles, or not to http(s)"
        raise DownloadError(f"{url} {answer}") from error
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"{url}: the server's certificate is not trusted ({reason.verify_message})") from error
        raise _Broken(f"cannot be reached ({_reason(reason)})") from error
    except DownloadError:
        raise
    except ValueError as error:
        raise DownloadError(f"{url}, or its redirect, is not a valid URL ({error})") from error


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _check_kind(url: str, response: Any) -> None:
    """Refuse responses that are not the file, such as a login page's or a proxy's."""
    if response.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        raise DownloadError(f"{url} answered {response.status} {http.client.responses.get(response.status, '')}")
    if response.headers.get_content_type() == "text/html":
        raise DownloadError(f"{url} sent a web page instead of the file")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        encoding = response.headers["Content-Encoding"]
        raise DownloadError(f"{url} sent the file with the encoding {encoding!r}, which was not requested")


def _extent(response: Any, have: int, origin: _Origin | None) -> tuple[int, int | None]:
    """Where in the file the response begins, and how long the whole file is, if the server says."""
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        return 0, response.length  # the rest of Content-Length, or None
    match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", response.headers.get("Content-Range", "").strip())
    if not (have and match and int(match[1]) == have):
        raise _Broken("sent a different range of the file than requested", restart=True)
    total, before = None if match[2] == "*" else int(match[2]), origin.total if origin else None
    if total is not None and (total <= have or before not in (None, total)):
        raise _Broken("has changed since the download began", restart=True)
    return have, before if total is None else total


def _validator(response: Any) -> str | None:
    """The value for If-Range: a strong ETag, else the date (RFC 9110, section 13.1.5)."""
    etag = response.headers.get("ETag", "")
    found = etag if re.fullmatch(r'"[\x21\x23-\x7e]{1,200}"', etag) else response.headers.get("Last-Modified", "")
    return found if re.fullmatch(r"[\x20-\x7e]{1,202}", found) else None


def _check_room(job: _Job, have: int, total: int | None) -> None:
    if total is None:
        return
    if total > job.policy.max_bytes:
        raise DownloadError(f"{job.url} offers {total:,} bytes; no file here is larger than {job.policy.max_bytes:,}")
    free = shutil.disk_usage(job.path.parent).free
    if free < total - have:
        raise DownloadError(f"{job.path.parent} has {free:,} bytes free; {total - have:,} are needed: make room")


def _receive(job: _Job, response: Any, have: int, total: int | None) -> int:
    """Append the response's body to the file; return the file's size."""
    most = job.policy.max_bytes if total is None else total
    since, before = time.monotonic(), have
    job.report(have, total)
    with job.path.open("ab") as out:
        while chunk := _read(response):
            if have + len(chunk) > most:
                raise DownloadError(f"{job.url} sends more than {most:,} bytes: it is another file")
            have += out.write(chunk)
            job.report(have, total)
            elapsed = time.monotonic() - since
            if elapsed > job.policy.timeout:
                if have - before < job.policy.min_rate * elapsed:
                    raise _Broken(f"sends only {(have - before) / elapsed:,.0f} bytes/s")
                since, before = time.monotonic(), have
        out.flush()
        os.fsync(out.fileno())
    return have


def _read(response: Any) -> bytes:
    try:
        return response.read1(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"broke off ({_reason(error)})") from error


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _notes(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_origin(path: Path) -> _Origin | None:
    """None if there is no readable record: then the download starts over."""
    try:
        notes = json.loads(_notes(path).read_text(encoding="utf-8"))
        return _Origin(str(notes["url"]), notes["total"] and int(notes["total"]), notes["validator"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
