"""Hosts and ports to listen on."""

from __future__ import annotations

import socket

import pytest

from clipgen.errors import UnavailableError
from clipgen.utils.listening import usable_address


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_host_names_become_numeric_addresses() -> None:
    assert usable_address("127.0.0.1", 0)[0] == "127.0.0.1"
    assert usable_address("localhost", 0)[0] in ("127.0.0.1", "::1")


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6_address_is_taken_with_and_without_brackets(host: str) -> None:
    assert usable_address(host, 0)[0] == "::1"


def test_port_0_becomes_a_free_port() -> None:
    _, port = usable_address("127.0.0.1", 0)
    assert usable_address("127.0.0.1", port) == ("127.0.0.1", port)


def test_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            usable_address("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("no-such-host.invalid", "no-such-host.invalid"),
        ("192.0.2.1", "192.0.2.1"),  # reserved for documentation: no machine has it
        ("::ffff:ffff:1", "::ffff:ffff:1"),
        ("a" * 70 + ".example", "is no host name"),
        ("x..y", "is no host name"),
    ],
)
def test_host_that_cannot_be_listened_on_is_reported_in_one_line(host: str, reason: str) -> None:
    with pytest.raises(UnavailableError) as raised:
        usable_address(host, 7860)
    assert reason in str(raised.value) and "--host" in str(raised.value) and "\n" not in str(raised.value)
