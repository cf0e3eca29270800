"""How processes meet: one listens at an address, the others connect to it.

An address is the path of a Unix socket, in a directory that nobody else may enter, or a host and a
port, where both sides prove that they hold the cluster's key before anything else is read.
"""

import logging
import selectors
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from moebius.errors import ChannelError, ConfigError, DeadlineError
from moebius.parallel.channel import Channel
from moebius.parallel.handshake import (
    ANSWER_BYTES,
    CONFIRMATION_BYTES,
    HELLO_BYTES,
    Greeting,
    Introduction,
    check_magic,
)
from moebius.parallel.key import ClusterKey

log = logging.getLogger(__name__)

Address = Path | tuple[str, int]

PROOF_SECONDS = 5.0
"""What a connection gets to prove itself."""
MOST_UNPROVEN = 64
"""Connections that may be at it at once; a new one takes the place of the oldest."""
_BACKLOG = 128
_LONGEST_PATH = 100
_PAUSE = 0.05
_LOG_SECONDS = 1.0
# A peer whose host or network is gone is noticed after some 15 seconds of silence.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 15_000}


class _Unproven:
    """One that has connected, and what it has sent so far; it may send ANSWER_BYTES."""

    def __init__(self, sock: socket.socket, peer: str, key: ClusterKey) -> None:
        self.sock = sock
        self.peer = peer
        self.until = time.monotonic() + PROOF_SECONDS
        self._received = bytearray()
        self._greeting = Greeting(key, peer)
        sock.setblocking(False)
        sock.send(self._greeting.hello)  # the first bytes of a connection: they fit

    def hear(self) -> Channel | None:
        """Read on; the channel once it has proven itself. ChannelError or OSError where it will
        not."""
        data = self.sock.recv(ANSWER_BYTES - len(self._received))
        if not data:
            raise ChannelError(f"{self.peer} hung up before it had proven itself")
        self._received += data
        check_magic(self._received, self.peer)
        if len(self._received) < ANSWER_BYTES:
            return None
        confirmation, seals = self._greeting.check(bytes(self._received))
        self.sock.send(confirmation)
        return Channel(self.sock, self.peer, seals)


class Listener:
    """Takes connections at an address until it is closed. Make one with `unix` or `tcp`."""

    def __init__(
        self, sock: socket.socket, address: Address, key: ClusterKey | None = None
    ) -> None:
        self.address = address
        self.key = key
        self._sock = sock
        self._unproven: dict[_Unproven, None] = {}
        self._refused = 0
        self._said = -_LOG_SECONDS
        self._selector = selectors.DefaultSelector()
        sock.setblocking(False)
        sock.listen(_BACKLOG)
        self._selector.register(sock, selectors.EVENT_READ)

    @classmethod
    def unix(cls) -> Self:
        """At a Unix socket in a new directory of mode 0700, which goes when it is closed."""
        directory = _private_directory()
        path = directory / "engine"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(path))
            return cls(sock, path)
        except BaseException:
            sock.close()
            shutil.rmtree(directory, ignore_errors=True)
            raise

    @classmethod
    def tcp(cls, host: str, port: int, key: ClusterKey) -> Self:
        """At a host's address and port, 0 for a free one. ConfigError where it is not to be had."""
        try:
            sock = socket.create_server((host, port), backlog=_BACKLOG, family=_family(host))
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot listen on {host}:{port} for the cluster: {why}") from error
        return cls(sock, sock.getsockname()[:2], key)

    def accept(self, timeout: float) -> Channel:
        """The next that connects and, over TCP, proves itself. DeadlineError where none does within
        `timeout` seconds.

        Those that do not prove themselves hold nobody up, and are logged.
        """
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            self._drop_late()
            for ready, _ in self._selector.select(min(left, self._patience())):
                channel = self._greet() if ready.data is None else self._hear(ready.data)
                if channel is not None:
                    return channel
        raise DeadlineError(f"nobody connected to {name_of(self.address)} within {timeout:g} s")

    def close(self) -> None:
        """Listen no more. Channels that were made are not touched."""
        for one in list(self._unproven):
            self._drop(one, None)
        self._selector.close()
        self._sock.close()
        if isinstance(self.address, Path):
            forget(self.address)

    def _patience(self) -> float:
        """Seconds until the first of the unproven is late."""
        oldest = next(iter(self._unproven), None)
        return 3600.0 if oldest is None else max(0.0, oldest.until - time.monotonic())

    def _greet(self) -> Channel | None:
        try:
            sock, address = self._sock.accept()
        except BlockingIOError:  # it has left again
            return None
        except OSError:  # no more descriptors, say: it still waits
            time.sleep(_PAUSE)
            return None
        if self.key is None:
            return Channel(sock, name_of(self.address))
        if len(self._unproven) >= MOST_UNPROVEN:
            oldest = next(iter(self._unproven))
            self._drop(oldest, f"{oldest.peer} had not proven itself when many others came")
        try:
            _keep_alive(sock)
            one = _Unproven(sock, name_of((address[0], address[1])), self.key)
        except OSError:
            sock.close()
            return None
        self._unproven[one] = None
        self._selector.register(sock, selectors.EVENT_READ, one)
        return None

    def _hear(self, one: _Unproven) -> Channel | None:
        if one not in self._unproven:
            return None  # dropped since it was selected
        try:
            channel = one.hear()
        except BlockingIOError:
            return None
        except (ChannelError, OSError) as error:
            self._drop(one, str(error))
            return None
        if channel is not None:
            self._selector.unregister(one.sock)
            del self._unproven[one]
        return channel

    def _drop_late(self) -> None:
        now = time.monotonic()
        for one in [each for each in self._unproven if each.until <= now]:
            self._drop(one, f"{one.peer} did not prove itself within {PROOF_SECONDS:g} s")

    def _drop(self, one: _Unproven, why: str | None) -> None:
        del self._unproven[one]
        self._selector.unregister(one.sock)
        one.sock.close()
        if why is not None:
            self._say_refused(why)

    def _say_refused(self, why: str) -> None:
        """In the log, as far as somebody who connects again and again may fill it."""
        self._refused += 1
        now = time.monotonic()
        if now - self._said >= _LOG_SECONDS:
            self._said = now
            log.warning("a connection was refused, the %d. so far: %s", self._refused, why)


def connect(address: Address, timeout: float, key: ClusterKey | None = None) -> Channel:
    """The channel to who listens at an address; TCP takes the cluster's key.

    ChannelError, which names the address, where the proof fails; with an OSError as its cause where
    nobody is there.
    """
    name = name_of(address)
    deadline = time.monotonic() + timeout
    try:
        if isinstance(address, Path):
            return Channel(_connected(address, timeout), name)
        if key is None:
            raise ConfigError(f"{name} wants the cluster's key; `moebius cluster key` makes one")
        sock = socket.create_connection(address, timeout)
        try:
            return _introduced(sock, name, key, deadline)
        except BaseException:
            sock.close()
            raise
    except (OSError, UnicodeError) as error:
        why = "it does not answer" if isinstance(error, TimeoutError) else error
        raise ChannelError(f"cannot connect to {name}: {why}") from error


def forget(path: Path) -> None:
    """Remove a Unix socket and its directory, where they are still there."""
    with suppress(OSError):
        path.unlink()
    with suppress(OSError):
        path.parent.rmdir()


def _connected(path: Path, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


def _introduced(sock: socket.socket, name: str, key: ClusterKey, deadline: float) -> Channel:
    _keep_alive(sock)
    introduction = Introduction(key, name, read_exactly(sock, HELLO_BYTES, name, deadline))
    sock.sendall(introduction.answer)
    try:
        confirmation = read_exactly(sock, CONFIRMATION_BYTES, name, deadline)
    except (ChannelError, ConnectionError):
        # Without a cause of the network's, where one could try again.
        raise ChannelError(f"{name} refused this process: it holds another cluster key") from None
    return Channel(sock, name, introduction.check(confirmation))


def read_exactly(sock: socket.socket, size: int, name: str, deadline: float) -> bytes:
    """So many bytes: what comes behind them is for whoever reads next. ChannelError where the other
    side ends before, TimeoutError where they are not here by `deadline`, of time.monotonic."""
    data = b""
    while len(data) < size:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        part = sock.recv(size - len(data))
        if not part:
            raise ChannelError(f"{name} hung up before it had proven itself")
        data += part
    return data


def _private_directory() -> Path:
    """A new directory of mode 0700, where a socket's path is short enough."""
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        if len(parent) + len("/moebius-XXXXXXXX/engine") <= _LONGEST_PATH:
            return Path(tempfile.mkdtemp(prefix="moebius-", dir=parent))
    raise ConfigError(f"{tempfile.gettempdir()} is too long a name for a socket; set TMPDIR")


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        with suppress(OSError, AttributeError):  # systems know different ones
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _family(host: str) -> socket.AddressFamily:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return socket.AddressFamily(found[0][0])


def name_of(address: Address) -> str:
    """An address for a person."""
    if isinstance(address, Path):
        return f"the socket {address}"
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
