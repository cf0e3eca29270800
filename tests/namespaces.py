"""Hosts made of network namespaces: an address for each, and links that are cut or slow.

On Linux, as root. Nothing of them is left when a block ends, and nothing of this host's own network
is touched.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERFACE = "eth0"
_TUN = Path("/dev/net/tun")
_TUNSETIFF = 0x400454CA
_IFF_TUN_WITHOUT_HEADERS = 0x1001
_LARGEST_PACKET = 65536


@dataclass(frozen=True)
class Where:
    """A host: what a command there begins with."""

    prefix: tuple[str, ...] = ()

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.prefix, *command], text=True, **options)


@contextmanager
def inside(host: Where) -> Iterator[None]:
    """This thread, and those that it starts, are on a host, as far as networks go."""
    if not host.prefix:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as here, open(f"/run/netns/{host.prefix[-1]}") as there:
        if libc.setns(there.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"{host} cannot be entered")
        try:
            yield
        finally:
            libc.setns(here.fileno(), 0)


@dataclass(frozen=True)
class Network:
    """Hosts that reach each other at these addresses."""

    hosts: tuple[Where, ...]
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Switched(Network):
    """Each host has a link to one switch."""

    names: tuple[str, ...]
    switch: str

    def cut(self, number: int) -> None:
        """Nothing comes through any more, and nobody is told."""
        ip("-n", self.switch, "link", "set", _port(number), "nomaster")

    def mend(self, number: int) -> None:
        ip("-n", self.switch, "link", "set", _port(number), "master", "switch")

    def unplug(self, number: int) -> None:
        """The host sees that its link is gone."""
        ip("-n", self.names[number], "link", "set", INTERFACE, "down")

    def plug_in(self, number: int) -> None:
        ip("-n", self.names[number], "link", "set", INTERFACE, "up")


@contextmanager
def switched(count: int) -> Iterator[Switched]:
    """Hosts at one switch. Raises OSError or SubprocessError where they cannot be had."""
    with _namespaces(count + 1) as (switch, *names):
        ip("-n", switch, "link", "add", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        for number, name in enumerate(names):
            port = ("name", _port(number), "netns", switch)
            ip("link", "add", INTERFACE, "netns", name, "type", "veth", "peer", *port)
            ip("-n", switch, "link", "set", _port(number), "master", "switch", "up")
            _bring_up(name, number)
        yield Switched(*_hosts(names), tuple(names), switch)


@contextmanager
def far_apart(seconds: float) -> Iterator[Network]:
    """Two hosts; what one sends takes so long to the other. Raises as `switched`."""
    with _namespaces(2) as names:
        ends = [_tunnel(name, number) for number, name in enumerate(names)]
        done = threading.Event()
        thread = threading.Thread(target=_carry, args=(ends, seconds, done), name="slow link")
        thread.start()
        try:
            yield Network(*_hosts(names))
        finally:
            done.set()
            thread.join()
            for end in ends:
                os.close(end)


def why_not() -> str | None:
    """What forbids to make hosts here."""
    try:
        with switched(1), far_apart(0.0):
            return None
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces cannot be made here: {error}"


def ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True, timeout=30)


_made = 0


@contextmanager
def _namespaces(count: int) -> Iterator[list[str]]:
    global _made
    _made += 1
    names = [f"moebius-{os.getpid()}-{_made}-{number}" for number in range(count)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(("ip", "netns", "del", name), check=False, capture_output=True)


def _hosts(names: Sequence[str]) -> tuple[tuple[Where, ...], tuple[str, ...]]:
    hosts = tuple(Where(("ip", "netns", "exec", name)) for name in names)
    return hosts, tuple(map(_address, range(len(names))))


def _address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def _port(number: int) -> str:
    return f"port{number}"


def _bring_up(name: str, number: int) -> None:
    ip("-n", name, "address", "add", f"{_address(number)}/24", "dev", INTERFACE)
    ip("-n", name, "link", "set", INTERFACE, "up")


def _tunnel(name: str, number: int) -> int:
    """An interface of a host whose packets are read and written here."""
    end = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    first = f"mb{os.getpid()}-{number}"
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", first.encode(), _IFF_TUN_WITHOUT_HEADERS))
    ip("link", "set", first, "netns", name, "name", INTERFACE)
    _bring_up(name, number)
    return end


def _carry(ends: Sequence[int], seconds: float, done: threading.Event) -> None:
    """Packets from each end to the other."""
    other = dict(zip(ends, reversed(ends), strict=True))
    waiting: deque[tuple[float, int, bytes]] = deque()
    while not done.is_set():
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, end, packet = waiting.popleft()
            with suppress(OSError):  # no room: it is lost, as packets are
                os.write(end, packet)
        patience = min(0.1, waiting[0][0] - now) if waiting else 0.1
        for end in select.select(ends, (), (), patience)[0]:
            packet = os.read(end, _LARGEST_PACKET)
            waiting.append((time.monotonic() + seconds, other[end], packet))
