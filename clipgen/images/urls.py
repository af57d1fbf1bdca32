"""The bytes behind a URL that somebody unknown has sent: bounded in size and time, and from the public internet only.

A server that fetches what it is told to can be told to fetch what only it can reach: itself, its neighbours, the
metadata of its cloud. So a name is resolved here, and only public addresses are connected to, at each redirect anew.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit

from clipgen.errors import DataError

MAX_BYTES = 64 << 20
MAX_SECONDS = 30.0
"""For all of a download, redirects included."""
MAX_REDIRECTS = 5
_SILENCE = 10.0
"""Seconds to wait for a connection or for the next bytes."""
_CHUNK = 1 << 16
_REDIRECTS = {301, 302, 303, 307, 308}
_IN_PATH = "/?%:@!$&'()*+,;=~[]"
_IPV6 = ipaddress.ip_network("2000::/3")
_TOO_LARGE = f"the file has more than the {MAX_BYTES >> 20} MB allowed; make the picture smaller first"
_INSTEAD = "send the file itself as data:image/png;base64,..."


def read_url(url: str, is_cancelled: Callable[[], bool] = lambda: False) -> bytes:
    """What a `data:`, `http:` or `https:` URL stands for. The media type is not looked at: it is a claim.

    Args:
        url: an http(s): URL must lead to a public address, and so must its redirects.
        is_cancelled: asked ten times a second; True ends a download.

    Raises:
        DataError: another scheme, damaged base64, more than `MAX_BYTES`, no public address, no answer 200, too slow.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "data":
        return _decode(rest)
    if scheme.lower() not in ("http", "https"):
        raise DataError(f"{url[:100]!r} is no data: or http(s): URL; {_INSTEAD}")
    try:
        return _download(url, is_cancelled)
    except DataError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"the URL cannot be read ({_reason(error)})") from error


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, not to this machine, its network or a tunnel to either."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (ip not in _IPV6 or ip.sixtofour):
        return False
    return ip.is_global and not ip.is_multicast


def _reason(error: Exception) -> str:
    return str(error)[:100] or type(error).__name__


def _decode(rest: str) -> bytes:
    """RFC 2397, behind `data:`."""
    header, comma, data = rest.partition(",")
    if not comma:
        raise DataError("the data: URL has no comma; it must be like data:image/png;base64,...")
    if len(data) > MAX_BYTES * 4 // 3 + 4:
        raise DataError(_TOO_LARGE)
    found = unquote_to_bytes(data)
    if not header.lower().endswith(";base64"):
        return found
    try:
        return base64.b64decode(found, validate=True)
    except binascii.Error as error:
        raise DataError(f"the data: URL's base64 is damaged ({error}); encode the file again") from None


def _download(url: str, is_cancelled: Callable[[], bool]) -> bytes:
    end = time.monotonic() + MAX_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        target = urlsplit(url)
        if target.scheme not in ("http", "https") or not target.hostname:
            raise DataError("the URL leads to something that is no http(s): URL")
        with _connection(target, end, is_cancelled) as connection:
            path = (target.path or "/") + (f"?{target.query}" if target.query else "")
            headers = {"User-Agent": "clipgen", "Accept-Encoding": "identity"}
            connection.request("GET", quote(path, safe=_IN_PATH), headers=headers)
            response = connection.getresponse()
            if response.status in _REDIRECTS and response.headers["Location"]:
                url = urljoin(url, response.headers["Location"])
            elif response.status == 200:
                return _receive(response)
            else:
                raise DataError(f"the URL's server answers {response.status}, not with the file")
    raise DataError(f"the URL is redirected more than {MAX_REDIRECTS} times")


def _receive(response: http.client.HTTPResponse) -> bytes:
    if (response.length or 0) > MAX_BYTES:
        raise DataError(_TOO_LARGE)
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > MAX_BYTES:
            raise DataError(_TOO_LARGE)
    if response.length:
        raise DataError(f"the download broke off after {len(body)} bytes")
    return bytes(body)


@contextmanager
def _connection(
    target: SplitResult, end: float, is_cancelled: Callable[[], bool]
) -> Iterator[http.client.HTTPConnection]:
    """To a public address, and cut when the time is up or nobody waits any more."""
    host = target.hostname or ""
    secure = target.scheme == "https"
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, target.port)
    line = _connect(host, connection.port)
    with line, line.dup() as spare, _cut(spare, end, is_cancelled):  # TLS takes the line, and leaves its copy
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(line, server_hostname=host) if secure else line
        try:
            yield connection
        finally:
            connection.close()


def _connect(host: str, port: int) -> socket.socket:
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    public = [address for address in found if is_public(address)]
    if not public:
        raise DataError(f"the URL is not on the public internet; {_INSTEAD}")
    return socket.create_connection((public[0], port), _SILENCE)


@contextmanager
def _cut(line: socket.socket, end: float, is_cancelled: Callable[[], bool]) -> Iterator[None]:
    """A server that sends a byte now and then never times out: the watch ends what waits for it.

    To who waits, a cut line looks like an end, like a reset, or like half an answer: whatever it is called there, here
    it is named for what it was.

    Raises:
        DataError: the watch has cut the line.
    """
    done, cut = threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            if is_cancelled() or time.monotonic() > end:
                cut.set()
                with suppress(OSError):  # the other side was faster
                    line.shutdown(socket.SHUT_RDWR)  # of every copy of the line
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except Exception:
        if not cut.is_set():
            raise
    finally:
        done.set()
        thread.join()
    if cut.is_set():
        raise DataError(f"the download took more than {MAX_SECONDS:.0f} seconds")
