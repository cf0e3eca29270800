"""The exchange between CPU ranks of several hosts: a TCP connection between each two of them.

A rank listens at an address of its host and tells the others through whoever formed the epoch, in
frames that the cluster's key guards; the one of the higher number connects. Both prove that they
hold the key before anything else is read. From then on a connection carries rows as they are,
neither encrypted nor sealed, which is why it belongs on a network that is trusted.

Importing this needs the compiled kernels.
"""

import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress

from moebius import _cpu
from moebius.errors import ChannelError, ConfigError, DeadlineError, PeerError
from moebius.parallel.endpoint import parse_endpoint
from moebius.parallel.exchange import Epoch, ExchangeSpec, check_alike, identity
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import Listener, connect, name_of, read_exactly
from moebius.parallel.native import NativeExchange

# What a rank says of itself when it has connected: its group's hash, epoch and rank.
_INTRODUCTION = struct.Struct("<16sQI")
_INTRODUCTION_SECONDS = 5.0
# Between two looks whether the epoch has been given up; and how long one attempt to connect lasts.
_LOOK_SECONDS = 0.05
_ATTEMPT_SECONDS = 2.0


class SocketExchange(NativeExchange):
    """A rank's part, once it is connected to all others.

    sockets   to each other rank; they are the exchange's from now on
    crowded   ranks of this host share processors: who waits gives up its own soon

    Making one is the first thing that ranks do together. Raises ConfigError where they differ in
    what they are for, PeerError.
    """

    def __init__(
        self,
        sockets: Mapping[int, socket.socket],
        spec: ExchangeSpec,
        rank: int,
        epoch: Epoch,
        *,
        timeout: float,
        crowded: bool = False,
    ) -> None:
        super().__init__(spec, rank, epoch, timeout)
        numbers = [-1 if other == rank else sockets[other].detach() for other in range(spec.size)]
        try:
            self._native = _cpu.SocketExchange(
                ranks=spec.size,
                tokens=spec.tokens,
                top_k=spec.top_k,
                row_bytes=spec.row_bytes,
                rank=rank,
                sockets=numbers,
                crowded=crowded,
                timeout=timeout,
            )
        except ValueError as error:  # too many ranks
            for number in set(numbers) - {-1}:
                os.close(number)
            raise ConfigError(f"{epoch}: {error}") from None
        try:
            found = self.agree(list(identity(spec, epoch).values()))
            check_alike(spec, epoch, rank, found)
        except BaseException:
            self.close()
            raise


class Meeting:
    """Where one rank hears at which addresses the others of an epoch listen.

    tell   carries this rank's, HOST:PORT, to the meetings of all others, which `hear` it there
    """

    def __init__(self, epoch: Epoch, tell: Callable[[str], None]) -> None:
        self.epoch = epoch
        self.tell = tell
        self._addresses: dict[int, str] = {}
        self._changed = threading.Condition()
        self._over: PeerError | None = None

    @property
    def over(self) -> PeerError | None:
        """Why nobody waits here any more."""
        return self._over

    def hear(self, rank: int, address: str) -> None:
        with self._changed:
            self._addresses[rank] = address
            self._changed.notify_all()

    def give_up(self, ranks: Sequence[int]) -> None:
        """Whoever waits, or begins to, gets a PeerError that names these ranks."""
        named = ", ".join(map(str, ranks))
        with self._changed:
            self._over = self._over or PeerError(
                f"{self.epoch}: ranks {named} were given up", ranks=tuple(ranks)
            )
            self._changed.notify_all()

    def address_of(self, rank: int, deadline: float) -> tuple[str, int]:
        """Where a rank listens, once it has told that. PeerError where it does not by `deadline`,
        of time.monotonic, or the meeting is given up."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._over or rank in self._addresses, max(0.0, deadline - time.monotonic())
            )
            self.check()
            if rank not in self._addresses:
                raise PeerError(f"{self.epoch}: rank {rank} did not come", ranks=(rank,))
            return parse_endpoint(self._addresses[rank], f"the address of rank {rank}")

    def check(self) -> None:
        if self._over is not None:
            raise self._over


def join_epoch(
    meeting: Meeting,
    spec: ExchangeSpec,
    rank: int,
    host: str,
    key: ClusterKey,
    *,
    timeout: float,
    patience: float,
    crowded: bool = False,
) -> SocketExchange:
    """A rank's exchange, once all ranks are connected.

    host       this host's address, which it listens at
    timeout    the exchange's
    patience   seconds that the others get to come
    crowded    SocketExchange's

    Raises PeerError, also where the meeting is given up meanwhile; ConfigError where it cannot
    listen, and as SocketExchange does.
    """
    deadline = time.monotonic() + patience
    sockets: dict[int, socket.socket] = {}
    try:
        with closing(Listener.tcp(host, 0, key)) as listener:
            meeting.tell(name_of(listener.address))
            # A lower one listens while it waits for others itself, so nobody waits in a circle.
            for other in range(rank):
                sockets[other] = _reach(meeting, other, rank, key, deadline)
            while len(sockets) < spec.size - 1:
                _take(meeting, listener, sockets, spec, rank, deadline)
        meeting.check()
        return SocketExchange(sockets, spec, rank, meeting.epoch, timeout=timeout, crowded=crowded)
    except BaseException:
        for sock in sockets.values():
            with suppress(OSError):
                sock.close()
        raise


def _reach(
    meeting: Meeting, other: int, rank: int, key: ClusterKey, deadline: float
) -> socket.socket:
    """A connection to a lower rank."""
    address = meeting.address_of(other, deadline)
    while True:
        left = deadline - time.monotonic()
        try:
            sock = connect(address, max(0.001, min(left, _ATTEMPT_SECONDS)), key).detach()
            sock.settimeout(_INTRODUCTION_SECONDS)
            sock.sendall(_INTRODUCTION.pack(_hash(meeting.epoch), meeting.epoch.number, rank))
            return sock
        except (ChannelError, OSError) as error:
            meeting.check()
            if time.monotonic() + _LOOK_SECONDS >= deadline:
                raise PeerError(
                    f"{meeting.epoch}: rank {rank} does not get through to rank {other}: {error}",
                    ranks=(other,),
                ) from None
        time.sleep(_LOOK_SECONDS)


def _take(
    meeting: Meeting,
    listener: Listener,
    sockets: dict[int, socket.socket],
    spec: ExchangeSpec,
    rank: int,
    deadline: float,
) -> None:
    """The next of the higher ranks' connections, or none for a moment."""
    meeting.check()
    now = time.monotonic()
    if now >= deadline:
        missing = tuple(other for other in range(rank + 1, spec.size) if other not in sockets)
        named = ", ".join(map(str, missing))
        raise PeerError(f"{meeting.epoch}: ranks {named} did not come", ranks=missing)
    try:
        channel = listener.accept(min(_LOOK_SECONDS, deadline - now))
    except DeadlineError:
        return
    sock = channel.detach()
    try:
        said = read_exactly(
            sock, _INTRODUCTION.size, channel.peer, min(now + _INTRODUCTION_SECONDS, deadline)
        )
    except (ChannelError, OSError):  # it has gone again, and will come again where it is a rank
        sock.close()
        return
    group, number, other = _INTRODUCTION.unpack(said)
    expected = rank < other < spec.size and other not in sockets
    if not expected or (group, number) != (_hash(meeting.epoch), meeting.epoch.number):
        sock.close()  # of another epoch, say
        return
    sockets[other] = sock


def _hash(epoch: Epoch) -> bytes:
    return hashlib.blake2b(epoch.group.encode(), digest_size=16).digest()
