"""Hosts and ports that a server can listen on, found out before a model is loaded."""

from __future__ import annotations

import socket

from clipgen.errors import UnavailableError


def usable_address(host: str, port: int) -> tuple[str, int]:
    """Check that a server can listen on a host (a name or an address, IPv6 with or without brackets) and a port.

    Returns:
        The host's numeric address, and the port, or a free one for port 0.

    Raises:
        UnavailableError: it cannot; the message names the reason.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port just left is free
            probe.bind(address)
            probe.listen()
            return str(address[0]), probe.getsockname()[1]
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeError:
        reason = "this is no host name"
    raise UnavailableError(f"cannot listen on {host}, port {port}: {reason}; give another --host or --port")
