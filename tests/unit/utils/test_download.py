"""Downloads from a real server that breaks off, sends wrong bytes, throttles, refuses and redirects."""

from __future__ import annotations

import random
import socket
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_server import Answer, Server, serving

from clipgen.errors import DownloadError
from clipgen.utils import download as module
from clipgen.utils.download import RetryPolicy, _Redirects, download

CONTENT = random.Random(0).randbytes(300_000)
HASTY = RetryPolicy(timeout=5, attempts=4, backoff=0.001, max_wait=0.01)
NO_LENGTH: dict[str, str | None] = {"Content-Length": None}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.put("/file", CONTENT)
        yield server


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "file.part"


def test_file_arrives_and_progress_is_reported(server: Server, part: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    download(f"{server.address}/file", part, policy=HASTY, report=lambda *state: seen.append(state))
    assert part.read_bytes() == CONTENT
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert server.requests[0][1]["user-agent"] == "clipgen"


def test_broken_connection_is_resumed(server: Server, part: Path) -> None:
    server.answers = [Answer(cut=100_000), Answer(cut=50_000)]
    told: list[str] = []
    download(f"{server.address}/file", part, policy=HASTY, log=told.append)
    assert part.read_bytes() == CONTENT
    assert server.ranges_asked() == [None, "bytes=100000-", "bytes=150000-"]
    assert [asked.get("if-range") for _, asked in server.requests] == [None, '"one"', '"one"']
    assert len(told) == 2 and "broke off at 100,000 of 300,000 bytes; trying again" in told[0]


def test_failed_download_is_resumed_by_the_next_call(server: Server, part: Path) -> None:
    server.answers = [Answer(cut=100_000)]
    with pytest.raises(DownloadError, match=r"broke off at 100,000 of 300,000 bytes; gave up after 1 attempts"):
        download(f"{server.address}/file", part, policy=RetryPolicy(attempts=1))
    download(f"{server.address}/file", part, policy=HASTY)
    assert part.read_bytes() == CONTENT and server.ranges_asked() == [None, "bytes=100000-"]


def test_server_that_ignores_range_sends_the_whole_file_again(server: Server, part: Path) -> None:
    server.answers = [Answer(cut=100_000), Answer(ranges=False)]
    download(f"{server.address}/file", part, policy=HASTY)
    assert part.read_bytes() == CONTENT


def test_bytes_of_two_versions_are_never_joined(server: Server, part: Path) -> None:
    server.answers = [Answer(cut=100_000)]
    with pytest.raises(DownloadError):
        download(f"{server.address}/file", part, policy=RetryPolicy(attempts=1))
    server.etag = '"two"'
    server.put("/file", CONTENT[::-1])
    download(f"{server.address}/file", part, policy=HASTY)
    assert part.read_bytes() == CONTENT[::-1]


def test_bytes_of_another_url_are_not_resumed(server: Server, part: Path) -> None:
    server.put("/other", CONTENT[::-1])
    server.answers = [Answer(cut=100_000)]
    with pytest.raises(DownloadError):
        download(f"{server.address}/other", part, policy=RetryPolicy(attempts=1))
    download(f"{server.address}/file", part, policy=HASTY)
    assert part.read_bytes() == CONTENT and server.ranges_asked() == [None, None]


@pytest.mark.parametrize("checked", [False, True])
def test_without_a_validator_only_a_known_hash_allows_resuming(server: Server, part: Path, checked: bool) -> None:
    server.etag, server.answers = None, [Answer(cut=100_000)]
    download(f"{server.address}/file", part, checked=checked, policy=HASTY)
    assert part.read_bytes() == CONTENT
    assert server.ranges_asked() == [None, "bytes=100000-" if checked else None]


@pytest.mark.parametrize("total", [299_999, 5])
def test_range_of_a_file_of_another_size_is_not_joined(server: Server, part: Path, total: int) -> None:
    changed: dict[str, str | None] = {"Content-Range": f"bytes 100000-{total - 1}/{total}"}
    server.answers = [Answer(cut=100_000), Answer(headers=changed)]
    download(f"{server.address}/file", part, policy=HASTY)
    assert part.read_bytes() == CONTENT and server.ranges_asked() == [None, "bytes=100000-", None]


def test_wrong_range_is_not_joined(server: Server, part: Path) -> None:
    server.answers = [Answer(cut=100_000), Answer(shift=7)]
    download(f"{server.address}/file", part, policy=HASTY)
    assert part.read_bytes() == CONTENT and server.ranges_asked() == [None, "bytes=100000-", None]


def test_complete_partial_file_is_not_downloaded_again(server: Server, part: Path) -> None:
    for _ in range(2):
        download(f"{server.address}/file", part, policy=HASTY)
    assert part.read_bytes() == CONTENT and server.ranges_asked() == [None, "bytes=300000-"]


def test_unreadable_record_starts_the_download_over(server: Server, part: Path) -> None:
    part.write_bytes(b"something else")
    part.with_name("file.part.json").write_text("[")
    download(f"{server.address}/file", part, policy=HASTY)
    assert part.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "phrase"),
    [(403, "Forbidden"), (404, "Not Found"), (410, "Gone"), (401, "Unauthorized"), (204, "No Content")],
)
def test_permanent_failure_is_not_retried(server: Server, part: Path, status: int, phrase: str) -> None:
    server.default = Answer(status=status)
    with pytest.raises(DownloadError, match=rf"/file answered {status} {phrase}"):
        download(f"{server.address}/file", part, policy=HASTY)
    assert len(server.requests) == 1 and not part.exists()


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_transient_failure_is_retried_with_growing_waits(
    server: Server, part: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    server.answers = [Answer(status=status)] * 3 + [Answer(status=status, headers={"Retry-After": "9"})]
    download(f"{server.address}/file", part, policy=RetryPolicy(max_wait=8.5))
    assert part.read_bytes() == CONTENT and waits == [1, 2, 4, 8.5]


def test_repeated_failure_gives_up_after_all_attempts(server: Server, part: Path) -> None:
    server.default = Answer(status=500)
    with pytest.raises(DownloadError, match=r"answered 500 Internal Server Error; gave up after 4 attempts in a row"):
        download(f"{server.address}/file", part, policy=HASTY)
    assert len(server.requests) == 4


def test_unreachable_server_and_malformed_host_are_named(part: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(DownloadError, match=r"cannot be reached \(Connection refused\); gave up"):
            download(f"http://127.0.0.1:{taken.getsockname()[1]}/file", part, policy=HASTY)
    with pytest.raises(DownloadError, match="is not a valid URL"):
        download(f"http://{'a' * 64}.invalid/file", part, policy=HASTY)


def test_body_shorter_than_its_length_counts_as_broken_off(server: Server, part: Path) -> None:
    server.default = Answer(headers={"Content-Length": "400000"}, ranges=False)
    with pytest.raises(DownloadError, match=r"broke off at 300,000 of 400,000 bytes; gave up after 4"):
        download(f"{server.address}/file", part, policy=HASTY)


@pytest.mark.parametrize("length", ["299999", "300001"])
def test_size_other_than_the_stated_one_is_refused(server: Server, part: Path, length: str) -> None:
    server.default = Answer(headers={"Content-Length": length})
    with pytest.raises(DownloadError, match=rf"offers {int(length):,} bytes; 300,000 are expected"):
        download(f"{server.address}/file", part, size=300_000, policy=HASTY)
    assert len(server.requests) == 1 and not part.exists()


def test_body_beyond_the_limit_is_refused(server: Server, part: Path) -> None:
    server.default = Answer(headers=NO_LENGTH)
    with pytest.raises(DownloadError, match="sends more than 1,000 bytes"):
        download(f"{server.address}/file", part, size=1000, policy=HASTY)
    with pytest.raises(DownloadError, match="sends more than 2,000 bytes"):
        download(f"{server.address}/file", part, policy=RetryPolicy(max_bytes=2000))
    server.default = Answer()
    with pytest.raises(DownloadError, match="offers 300,000 bytes; no file here is larger than 2,000"):
        download(f"{server.address}/file", part, policy=RetryPolicy(max_bytes=2000))
    assert not part.exists() or part.stat().st_size <= 2000


def test_response_without_length_is_accepted(server: Server, part: Path) -> None:
    server.default = Answer(headers=NO_LENGTH)
    seen: list[tuple[int, int | None]] = []
    download(f"{server.address}/file", part, policy=HASTY, report=lambda *state: seen.append(state))
    assert part.read_bytes() == CONTENT and seen[-1] == (300_000, None)


def test_slow_or_silent_server_counts_as_broken_off(server: Server, part: Path) -> None:
    policy = RetryPolicy(timeout=0.2, attempts=1, min_rate=1000)
    server.default = Answer(pace=0.05, piece=10)
    with pytest.raises(DownloadError, match=r"sends only \d+ bytes/s; gave up"):
        download(f"{server.address}/file", part, policy=policy)
    server.default = Answer(pace=5, piece=150_000)
    with pytest.raises(DownloadError, match=r"broke off \(no answer in time\); gave up"):
        download(f"{server.address}/file", part, policy=policy)


def test_slow_but_steady_download_succeeds(server: Server, part: Path) -> None:
    server.default = Answer(pace=0.05, piece=10_000)  # 1.5 s
    download(f"{server.address}/file", part, policy=RetryPolicy(timeout=1, attempts=1, min_rate=1000))
    assert part.read_bytes() == CONTENT and len(server.requests) == 1


def test_breaks_with_progress_in_between_do_not_count_as_failures_in_a_row(
    server: Server, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROGRESS", 20_000)
    server.default = Answer(cut=20_000)
    download(f"{server.address}/file", part, policy=RetryPolicy(attempts=2, backoff=0))
    assert part.read_bytes() == CONTENT and len(server.requests) == 15


def test_download_that_starts_over_counts_its_progress_afresh(
    server: Server, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROGRESS", 20_000)
    server.answers = [Answer(cut=200_000)]
    with pytest.raises(DownloadError):
        download(f"{server.address}/file", part, policy=RetryPolicy(attempts=1))
    server.etag = '"two"'
    server.put("/file", CONTENT[::-1])
    server.default = Answer(cut=20_000)
    download(f"{server.address}/file", part, policy=RetryPolicy(attempts=3, backoff=0))
    assert part.read_bytes() == CONTENT[::-1]


def test_redirects_within_http_are_followed(server: Server, part: Path) -> None:
    server.answers = [Answer(status=302, headers={"Location": "/file"}), Answer(cut=100_000)]
    server.answers.append(Answer(status=302, headers={"Location": "/file"}))
    server.files["/there"] = b"not this"
    download(f"{server.address}/there", part, policy=HASTY)
    assert part.read_bytes() == CONTENT
    assert [(path, asked.get("range")) for path, asked in server.requests] == [
        ("/there", None),
        ("/file", None),
        ("/there", "bytes=100000-"),
        ("/file", "bytes=100000-"),
    ]


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/file", "data:,hello", "//[/", "/loop", "gopher://x"]
)
def test_redirects_to_other_schemes_are_refused(server: Server, part: Path, location: str) -> None:
    server.default = Answer(status=302, headers={"Location": location})
    with pytest.raises(DownloadError, match="redirect"):
        download(f"{server.address}/loop", part, policy=HASTY)
    assert not part.exists()


def test_redirect_from_https_to_http_is_refused() -> None:
    with pytest.raises(DownloadError, match="never from https"):
        _Redirects().redirect_request(Request("https://a.example/x"), None, 302, "", {}, "http://a.example/x")
    assert _Redirects().redirect_request(Request("https://a.example/x"), None, 302, "", {}, "https://b.example/y")


def test_web_page_or_encoded_body_is_refused(server: Server, part: Path) -> None:
    server.default = Answer(headers={"Content-Type": "text/html; charset=utf-8"})
    with pytest.raises(DownloadError, match="sent a web page instead of the file"):
        download(f"{server.address}/file", part, policy=HASTY)
    server.default = Answer(headers={"Content-Encoding": "gzip"})
    with pytest.raises(DownloadError, match="encoding 'gzip', which was not requested"):
        download(f"{server.address}/file", part, policy=HASTY)
    assert not part.exists()


def test_missing_folder_and_full_disk_are_named(
    server: Server, part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DownloadError, match=r"cannot be written: No such file or directory"):
        download(f"{server.address}/file", tmp_path / "gone" / "file.part", size=None, policy=HASTY)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 299_999))
    with pytest.raises(DownloadError, match="has 299,999 bytes free; 300,000 are needed: make room"):
        download(f"{server.address}/file", part, policy=HASTY)
    assert not part.exists()


answers = st.builds(
    Answer,
    status=st.sampled_from([200] * 5 + [500, 503]),
    cut=st.none() | st.integers(0, 2000),
    ranges=st.booleans(),
    shift=st.sampled_from([0, 0, 0, 1, -3]),
    headers=st.sampled_from([{}, {}, {}, NO_LENGTH, {"ETag": None}, {"ETag": 'W/"weak"'}, {"Content-Length": "2500"}]),
)


@settings(max_examples=60)
@given(script=st.lists(answers, max_size=6), checked=st.booleans())
def test_bytes_are_right_whatever_failures_came_before(script: list[Answer], checked: bool) -> None:
    """A cut without a length, or a false length, looks like the end; then the stated size decides."""
    content = CONTENT[:2000]
    with serving() as server, tempfile.TemporaryDirectory() as folder:
        url, part = server.put("/file", content), Path(folder) / "file.part"
        server.answers = list(script)
        try:
            download(url, part, size=2000, checked=checked, policy=RetryPolicy(timeout=5, attempts=10, backoff=0))
        except DownloadError as error:
            assert "offers 2,500 bytes" in str(error)
        else:
            assert part.read_bytes() == content


def test_default_policy_is_the_documented_one(root: Path) -> None:
    policy = RetryPolicy()
    documented = " ".join((root / "docs" / "weights.md").read_text(encoding="utf-8").split())
    assert f"{policy.timeout:.0f} s without data or a rate below {policy.min_rate / 1000:.0f} kB/s" in documented
    assert policy.attempts == 6 and "six failures in a row" in documented
    assert module.PROGRESS == 1 << 20 and "less than 1 MiB" in documented
