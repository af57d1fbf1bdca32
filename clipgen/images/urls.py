"""Download what an untrusted URL names, bounded in size and time, from the public internet only.

A server that fetches any URL can be made to fetch what only it can reach: itself, its neighbours, its cloud's
metadata. So names are resolved here, and only public addresses are connected to, checked again at each redirect.
Hosts of a private object storage can be allowed by name: CLIPGEN_IMAGE_HOSTS.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import os
import re
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
"""Time limit of a whole download, redirects included; the lookup of a name has the system's own limit on top."""
MAX_REDIRECTS = 5
HOSTS_VARIABLE = "CLIPGEN_IMAGE_HOSTS"
"""Environment variable: hosts that may have private addresses, such as "minio:9000, images.internal"; empty: none."""
_SOCKET_TIMEOUT = 10.0
"""Seconds to wait for a connection or for the next bytes."""
_CHUNK = 1 << 16
_REDIRECTS = {301, 302, 303, 307, 308}
_IN_PATH = "/?%:@!$&'()*+,;=~[]"
_IPV6 = ipaddress.ip_network("2000::/3")
_TOO_LARGE = f"the file has more than the {MAX_BYTES >> 20} MB allowed; make the image smaller first"
_INSTEAD = "send the file itself as data:image/png;base64,..."


def read_url(url: str, is_cancelled: Callable[[], bool] = lambda: False) -> bytes:
    """Return the bytes that a `data:`, `http:` or `https:` URL stands for, whatever media type it claims.

    Args:
        url: an http(s): URL and its redirects must lead to public addresses, or to hosts in `HOSTS_VARIABLE`.
        is_cancelled: polled ten times a second once a server is connected; True ends a download.

    Raises:
        DataError: the scheme is another, base64 is damaged, there are more than `MAX_BYTES`, the address is not
            public, the status is not 200, or the download takes more than `MAX_SECONDS`.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "data":
        return _decode(rest)
    if scheme.lower() not in ("http", "https"):
        raise DataError(f"{url[:100]!r} is not a data: or http(s): URL; {_INSTEAD}")
    try:
        return _download(url, is_cancelled)
    except DataError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"the URL cannot be read ({str(error)[:100] or type(error).__name__})") from error


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, and not to this machine, its network or a tunnel to either."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (ip not in _IPV6 or ip.sixtofour):
        return False
    return ip.is_global and not ip.is_multicast


def is_allowed_host(host: str, port: int) -> bool:
    """Whether the administrator has listed a host, or this port of it, in `HOSTS_VARIABLE`; no patterns."""
    allowed = {entry.strip().lower() for entry in os.environ.get(HOSTS_VARIABLE, "").split(",")} - {""}
    name = f"[{host.lower()}]" if ":" in host else host.lower()
    return name in allowed or f"{name}:{port}" in allowed


def _decode(rest: str) -> bytes:
    """The data of a `data:` URL (RFC 2397), given what follows the scheme.

    Base64 is decoded as browsers do (WHATWG Infra, forgiving-base64 decode): white space, as of `base64 FILE` and of
    Python's `encodebytes`, is skipped, and the padding at the end may be missing.
    """
    header, comma, data = rest.partition(",")
    if not comma:
        raise DataError("the data: URL has no comma; it must be like data:image/png;base64,...")
    if len(data) > MAX_BYTES * 3 // 2:  # 4/3 for base64, the rest for line ends; before anything is decoded
        raise DataError(_TOO_LARGE)
    found = _unquote(data)
    if re.search(r"; *base64 *$", header, re.IGNORECASE):
        found = found.translate(None, b" \t\n\f\r")
        if len(found) % 4 and not found.endswith(b"="):
            found += b"=" * (-len(found) % 4)
        try:
            found = base64.b64decode(found, validate=True)
        except binascii.Error as error:
            raise DataError(f"the data: URL's base64 is damaged ({error}); encode the file again") from None
    if len(found) > MAX_BYTES:
        raise DataError(_TOO_LARGE)
    return found


def _unquote(text: str) -> bytes:
    """`unquote_to_bytes` piece by piece: on the whole text it takes some 230 bytes of memory for each escape."""
    found, start = bytearray(), 0
    while start < len(text):
        end = start + _CHUNK
        if end < len(text) and (escape := text.rfind("%", end - 2, end)) >= 0:
            end = escape  # do not cut it
        found += unquote_to_bytes(text[start:end])
        start = end
    return bytes(found)


def _download(url: str, is_cancelled: Callable[[], bool]) -> bytes:
    end = time.monotonic() + MAX_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        target = urlsplit(url)
        if target.scheme not in ("http", "https") or not target.hostname:
            raise DataError("the URL leads to something that is not an http(s): URL")
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
    """Connect to a public address; the connection is cut at the time `end` or on cancellation."""
    host = target.hostname or ""
    secure = target.scheme == "https"
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, target.port)
    line = _connect(host, connection.port, end)
    with line, line.dup() as spare, _time_limit(spare, end, is_cancelled):  # TLS takes over `line` alone
        if secure:
            connection.sock = ssl.create_default_context().wrap_socket(line, server_hostname=host)
        else:
            connection.sock = line
        try:
            yield connection
        finally:
            connection.close()


def _connect(host: str, port: int, end: float) -> socket.socket:
    """Connect to the first of a host's public addresses that answers before the time `end`."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    usable = found if is_allowed_host(host, port) else [address for address in found if is_public(address)]
    if not usable:
        raise DataError(f"the URL is not on the public internet; {_INSTEAD}")
    for address in usable:
        try:
            line = socket.create_connection((address, port), max(0.1, min(_SOCKET_TIMEOUT, end - time.monotonic())))
        except OSError as error:
            failure = error
            continue
        line.settimeout(_SOCKET_TIMEOUT)
        return line
    raise failure


@contextmanager
def _time_limit(line: socket.socket, end: float, is_cancelled: Callable[[], bool]) -> Iterator[None]:
    """Shut a connection down at the time `end`: one that sends a byte now and then never times out by itself.

    To the code that reads, this looks like an end, a reset or half an answer; whatever error that causes becomes one
    that names the time limit.

    Raises:
        DataError: the connection was shut down.
    """
    done, cut = threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            if is_cancelled() or time.monotonic() > end:
                cut.set()
                with suppress(OSError):  # it has ended by itself
                    line.shutdown(socket.SHUT_RDWR)  # for every copy of the socket
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
