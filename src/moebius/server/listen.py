"""The addresses that a server binds, before anything is loaded."""

import errno
import ipaddress
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from moebius.errors import ConfigError
from moebius.server.settings import host_and_port

# An address family that this machine lacks, though its name service knows of it (::1 without IPv6).
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_ATTEMPTS = 16


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def reserve(host: str, port: int, *, open_to_all: bool = True) -> Iterator[list[socket.socket]]:
    """Bind each address that `host` has: localhost has one of IPv4 and one of IPv6.

    All get one port; 0 takes a free one.

    The port opens (listens) when the server starts. Raises ConfigError where it is in use or the
    address is no address of this machine, and for an address that others can reach where everybody
    may call.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; it must lie between 0 and 65535")
    if not _is_loopback(host) and host != "localhost" and open_to_all:
        raise ConfigError(
            f"host {host!r} can be reached from other machines; give an --api-key or --api-keys, "
            "or use 127.0.0.1"
        )
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} cannot be resolved: {error}") from error
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for _, address in addresses:
        if not _is_loopback(str(address[0])) and open_to_all:
            raise ConfigError(
                f"host {host!r} is {address[0]}, which others can reach; give an --api-key or "
                "--api-keys"
            )
    sockets = _bind(host, port, addresses)
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def _bind(host: str, port: int, addresses: Sequence[tuple[int, Any]]) -> list[socket.socket]:
    for attempt in range(_ATTEMPTS):
        try:
            return _bind_all(port, addresses)
        except OSError as error:
            # A port that is free at the first address may be taken at the second.
            if port == 0 and error.errno == errno.EADDRINUSE and attempt + 1 < _ATTEMPTS:
                continue
            name = host_and_port(host, port)
            raise ConfigError(
                f"cannot bind {name}: {error.strerror}; choose another --port or --host"
            ) from error
    raise AssertionError


def _bind_all(port: int, addresses: Sequence[tuple[int, Any]]) -> list[socket.socket]:
    """A socket for each address that this machine has, on one port. Raises OSError."""
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    for family, address in addresses:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if sys.platform != "win32":  # there it would let two servers share the port
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # Alone, `::` takes IPv4 too; beside an IPv4 socket it must not.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, len(addresses) > 1)
            chosen = sockets[0].getsockname()[1] if sockets else port
            sock.bind((address[0], chosen, *address[2:]))
        except OSError as error:
            sock.close()
            if error.errno in _ABSENT:
                absent = error
                continue
            for other in sockets:
                other.close()
            raise
        sockets.append(sock)
    if absent is not None and not sockets:
        raise absent
    return sockets
