"""Addresses of hosts: what an operator writes, and what an interface has."""

import socket
import struct
import sys
from contextlib import suppress

from moebius.errors import ConfigError

_SIOCGIFADDR = 0x8915
_MOST_NAME = 15


def parse_endpoint(text: str, name: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 address in brackets; `name` is the option's, for the ConfigError."""
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not bare or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{name} is {text!r}; it must be HOST:PORT, as in 10.0.0.1:29500")
    if ":" in bare and bare == host:
        raise ConfigError(f"{name} is {text!r}; an IPv6 address stands in brackets: [{host}]:PORT")
    return bare, int(port)


def interface_address(interface: str) -> str:
    """The IPv4 address of a network interface. ConfigError, which names those that there are."""
    if sys.platform != "linux":
        raise ConfigError("--cluster-interface is known on Linux only; leave it out here")
    import fcntl

    if 0 < len(interface.encode()) <= _MOST_NAME:
        asked = struct.pack("256s", interface.encode())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, suppress(OSError):
            found = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, asked)
            return socket.inet_ntoa(found[20:24])
    names = ", ".join(name for _, name in socket.if_nameindex())
    raise ConfigError(
        f"--cluster-interface is {interface!r}, which has no IPv4 address here; there are: {names}"
    )


def address_towards(host: str, port: int) -> str:
    """The address of this host that others at `host` see. ConfigError where no way leads there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(address)  # sends nothing
            return str(sock.getsockname()[0])
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"no way leads from here to {host}:{port}: {why}") from error
