"""Images by URL: complete, bounded, and never from an address that only the server can reach."""

from __future__ import annotations

import base64
import http.client
import shutil
import socket
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Iterator
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_server import Answer, Server, serving

from clipgen.errors import DataError
from clipgen.images import urls
from clipgen.images.urls import is_public, read_url


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on the loopback interface that counts as public."""
    monkeypatch.setattr(urls, "is_public", lambda address: True)
    with serving() as server:
        yield server


@given(st.binary(), st.text())
def test_data_url_is_decoded_whatever_its_media_type(data: bytes, kind: str) -> None:
    kind = kind.replace(",", "")
    assert read_url(f"data:{kind};base64,{base64.b64encode(data).decode()}") == data
    assert read_url("DATA:," + "".join(f"%{byte:02x}" for byte in data)) == data


@given(st.binary(max_size=300), st.integers(1, 80), st.sampled_from(["\n", "\r\n", " ", "%0A", "\t\f"]), st.booleans())
def test_wrapped_and_unpadded_base64_is_decoded_as_browsers_do(data: bytes, width: int, gap: str, pad: bool) -> None:
    text = base64.b64encode(data).decode()
    text = text if pad else text.rstrip("=")
    wrapped = "".join(text[i : i + width] + gap for i in range(0, len(text), width))
    for header in ("image/png;base64", "image/png; BASE64", ";base64 "):
        assert read_url(f"data:{header},{gap}{wrapped}") == data


def test_output_of_encodebytes_and_the_base64_command_is_decoded() -> None:
    data = bytes(range(256)) * 4
    assert read_url("data:image/png;base64," + base64.encodebytes(data).decode()) == data
    if shutil.which("base64"):
        done = subprocess.run(["base64"], input=data, capture_output=True, check=True)
        assert read_url("data:image/png;base64," + done.stdout.decode()) == data


@given(
    st.text(max_size=40), st.sampled_from(["", "data:", "data:;base64,", "http:", "https://", "file://", "HTTP://["])
)
def test_any_text_is_read_or_refused_in_a_short_message(text: str, start: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("127.0.0.1", 0))])
        try:
            read_url(start + text)
        except DataError as error:
            assert 0 < len(str(error)) < 250


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("/etc/hostname", "not a data: or http"),
        ("file:///etc/hostname", "not a data: or http"),
        ("", "''"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,Q", "base64 is damaged"),
        ("data:image/png;base64,QQ=", "base64 is damaged"),
        ("data:image/png;base64,QQ=Q", "base64 is damaged"),
        ("data:image/png;base64,!!!!", "base64 is damaged"),
        ("http:///x", "leads to something"),
        ("http://localhost:99999/", "Port"),
        ("http://[::1", "IPv6"),
        ("http://a\0b/", "cannot be read"),
        ("http://name.invalid/", "cannot be read"),
    ],
)
def test_unreadable_address_is_refused_with_its_reason(url: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_url(url)


def test_data_url_above_the_limit_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "MAX_BYTES", 30)
    with pytest.raises(DataError, match="MB allowed"):
        read_url("data:;base64," + "A" * 48)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "224.0.0.1",
        ),
        *("255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:127.0.0.1", "::127.0.0.1"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::"),
    ],
)
def test_private_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_public_addresses_are_public() -> None:
    assert is_public("1.1.1.1") and is_public("2606:4700:4700::1111")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0", "2130706433", "0x7f.1"])
def test_loopback_address_in_any_spelling_is_refused(host: str) -> None:
    with serving() as server:
        port = server.address.rpartition(":")[2]
        with pytest.raises(DataError, match=r"not on the public internet|cannot be read"):
            read_url(f"http://{host}:{port}/a.png")
        assert not server.requests


@pytest.mark.parametrize("allowed", ["127.0.0.1", "minio, 127.0.0.1:{port}", "LOCALHOST,127.0.0.1", "[::1],127.0.0.1"])
def test_allowed_host_may_have_a_private_address(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        port = server.address.rpartition(":")[2]
        url = server.put("/a.png", b"x")
        with pytest.raises(DataError, match="not on the public internet"):
            read_url(url)
        monkeypatch.setenv("CLIPGEN_IMAGE_HOSTS", allowed.format(port=port))
        assert read_url(url) == b"x"


@pytest.mark.parametrize(
    "allowed", ["", " , ", "*", "127.0.0.1:1", "27.0.0.1", "localhost", "127.0.0.*", "http://127.0.0.1"]
)
def test_private_host_that_is_not_listed_exactly_is_refused(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPGEN_IMAGE_HOSTS", allowed)
    with serving() as server, pytest.raises(DataError, match="not on the public internet"):
        read_url(server.put("/a.png", b"x"))
    assert not server.requests


def test_redirect_of_an_allowed_host_to_a_private_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server, serving() as inner:
        port = server.address.rpartition(":")[2]
        monkeypatch.setenv("CLIPGEN_IMAGE_HOSTS", f"127.0.0.1:{port}")
        server.default = Answer(status=302, headers={"Location": inner.put("/secret", b"x")})
        with pytest.raises(DataError, match="not on the public internet"):
            read_url(f"{server.address}/a")
        assert len(server.requests) == 1 and not inner.requests


def test_redirect_to_the_loopback_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server, serving() as inner:
        answers = iter([True])
        monkeypatch.setattr(urls, "is_public", lambda address: next(answers, False))
        server.default = Answer(status=302, headers={"Location": inner.put("/secret", b"x")})
        with pytest.raises(DataError, match="not on the public internet"):
            read_url(f"{server.address}/a")
        assert len(server.requests) == 1 and not inner.requests


def test_image_is_downloaded_through_redirects(server: Server) -> None:
    assert read_url(server.put("/a%20b.png?size=1&of=2", b"x" * 300_000)) == b"x" * 300_000
    server.answers = [Answer(status=302, headers={"Location": "/there"})]
    server.put("/there", b"moved")
    assert read_url(f"{server.address}/here") == b"moved"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(status=404), "answers 404"),
        (Answer(status=500), "answers 500"),
        (Answer(cut=100), "broke off after 100 bytes"),
        (Answer(status=302, headers={"Location": "file:///etc/hostname"}), "leads to something"),
        (Answer(status=302, headers={"Location": "/a"}), "redirected more than 5 times"),
        (Answer(headers={"Content-Length": "99999999999"}), "MB allowed"),
    ],
)
def test_failed_download_is_refused_with_its_reason(server: Server, answer: Answer, words: str) -> None:
    url = server.put("/a", b"x" * 500)
    server.default = answer
    with pytest.raises(DataError, match=words):
        read_url(url)


def test_body_without_length_is_refused_above_the_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "MAX_BYTES", 1000)
    server.default = Answer(headers={"Content-Length": None})
    with pytest.raises(DataError, match="MB allowed"):
        read_url(server.put("/a", b"x" * 5000))


@pytest.mark.parametrize("stopped", [True, False])
def test_slow_download_ends_at_the_deadline_or_when_stopped(
    server: Server, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    monkeypatch.setattr(urls, "MAX_SECONDS", 60.0 if stopped else 0.5)
    server.default = Answer(pace=0.05, piece=1)
    url, stop = server.put("/a", b"x" * 10_000), threading.Event()
    threading.Timer(0.5, stop.set).start()
    started = time.monotonic()
    with pytest.raises(DataError, match="took more than"):
        read_url(url, stop.is_set if stopped else lambda: False)
    server.default.hurry.set()
    assert time.monotonic() - started < 10


def test_timeout_is_named_even_if_the_connection_looks_reset(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that arrive after the socket was closed make the kernel answer with a reset."""
    monkeypatch.setattr(urls, "MAX_SECONDS", 0.2)
    read1 = http.client.HTTPResponse.read1

    def late(response: http.client.HTTPResponse, size: int) -> bytes:
        time.sleep(0.5)
        return read1(response, size)

    monkeypatch.setattr(http.client.HTTPResponse, "read1", late)
    server.default = Answer(pace=0.01, piece=1)
    with pytest.raises(DataError, match="took more than"):
        read_url(server.put("/a", b"x" * 10_000))
    server.default.hurry.set()


def test_silent_server_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "is_public", lambda address: True)
    monkeypatch.setattr(urls, "MAX_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DataError, match="took more than"):
        read_url(f"http://127.0.0.1:{silent.getsockname()[1]}/a")


def test_escaped_data_is_decoded_whole_and_in_little_memory() -> None:
    data = bytes(range(256)) * 1000
    text = "data:," + "".join(f"%{byte:02x}" for byte in data)
    tracemalloc.start()
    found = read_url(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == data and peak < 40e6  # at once: 60 MB
    for shift in range(4):
        assert read_url("data:," + "x" * shift + quote_from_bytes(data)) == b"x" * shift + data


@pytest.mark.parametrize("kind", ["", ";base64"])
def test_data_above_the_limit_is_refused_after_decoding_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "MAX_BYTES", 100)
    text = {"": "a" * 101, ";base64": base64.b64encode(bytes(101)).decode()}[kind]
    with pytest.raises(DataError, match="has more than"):
        read_url(f"data:{kind},{text}")


def test_next_address_of_a_host_is_tried_where_the_first_does_not_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def both(host: str, port: int, *more: object, **settings: object) -> list[tuple]:
        if host != "two.example":
            return real(host, port, *more, **settings)
        [entry, *_] = real("127.0.0.1", port, type=socket.SOCK_STREAM)
        return [(*entry[:4], ("127.0.0.77", port)), entry]  # nothing listens at the first

    monkeypatch.setattr(socket, "getaddrinfo", both)
    url = server.put("/a", b"image")
    assert read_url(url.replace("127.0.0.1", "two.example")) == b"image"
