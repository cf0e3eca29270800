"""The exchange between CPU ranks of several hosts: a TCP connection between each two of them.

A rank listens at an address of its host and tells the others through whoever formed the epoch, in
frames that the cluster's key guards; the one of the higher number connects. Both prove that they
hold the key before anything else is read. Between ranks of one host it then says little more than
that one is to wake up, and rows go through memory of the two. Else a connection carries rows as
they are, neither encrypted nor sealed, which is why it belongs on a network that is trusted.

Importing this needs the compiled kernels.
"""

import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from types import MappingProxyType

from moebius import _cpu
from moebius.errors import ChannelError, ConfigError, DeadlineError, PeerError
from moebius.parallel import mapped
from moebius.parallel.endpoint import parse_endpoint
from moebius.parallel.exchange import Epoch, ExchangeSpec, check_alike, identity
from moebius.parallel.key import ClusterKey
from moebius.parallel.mapped import Mapped
from moebius.parallel.meet import Listener, connect, name_of, read_exactly
from moebius.parallel.native import NativeExchange

# What a rank says of itself when it has connected: its group's hash, epoch and rank; and which
# process has which file as the memory that it shares with a rank of its host.
_INTRODUCTION = struct.Struct("<16sQIII")
_INTRODUCTION_SECONDS = 5.0
# Between two looks whether the epoch has been given up; and how long one attempt to connect lasts.
_LOOK_SECONDS = 0.05
_ATTEMPT_SECONDS = 2.0


class SocketExchange(NativeExchange):
    """A rank's part, once it is connected to all others.

    sockets   to each other rank; they are the exchange's from now on
    rings     memory that is shared with the ranks of this host, by their number
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
        rings: Mapping[int, Mapped] = MappingProxyType({}),
    ) -> None:
        super().__init__(spec, rank, epoch, timeout)
        numbers = [-1 if other == rank else sockets[other].detach() for other in range(spec.size)]
        try:
            self._native = _cpu.SocketExchange(
                list(rings.values()),
                ranks=spec.size,
                tokens=spec.tokens,
                top_k=spec.top_k,
                row_bytes=spec.row_bytes,
                rank=rank,
                sockets=numbers,
                rings=[rings[r].address if r in rings else 0 for r in range(spec.size)],
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
        with self._changed:
            self._over = self._over or self.epoch.lost(ranks)
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
                raise self.epoch.lost((rank,), "did not come")
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
    near: Collection[int] = (),
) -> SocketExchange:
    """A rank's exchange, once all ranks are connected.

    host       this host's address, which it listens at
    timeout    the exchange's
    patience   seconds that the others get to come
    crowded    SocketExchange's
    near       the ranks that are on this host too: rows go through memory between them

    Raises PeerError, also where the meeting is given up meanwhile; ConfigError where it cannot
    listen, and as SocketExchange does; MemoryPlanError.
    """
    joining = _Joining(meeting, rank, near, key, time.monotonic() + patience)
    try:
        with closing(Listener.tcp(host, 0, key)) as listener:
            meeting.tell(name_of(listener.address))
            # A lower one listens while it waits for others itself, so nobody waits in a circle.
            for other in range(rank):
                joining.reach(other)
            while missing := set(range(rank + 1, spec.size)) - joining.sockets.keys():
                joining.take(listener, missing)
        meeting.check()
        return SocketExchange(
            joining.sockets,
            spec,
            rank,
            meeting.epoch,
            timeout=timeout,
            crowded=crowded,
            rings=joining.rings,
        )
    except BaseException:
        for sock in joining.sockets.values():
            with suppress(OSError):
                sock.close()
        raise
    finally:  # the exchange has begun with an agreement: all have opened what is theirs
        joining.close_files()


class _Joining:
    """One rank's connections to others, while it makes them."""

    def __init__(
        self, meeting: Meeting, rank: int, near: Collection[int], key: ClusterKey, deadline: float
    ) -> None:
        self.sockets: dict[int, socket.socket] = {}
        self.rings: dict[int, Mapped] = {}
        self._files: dict[int, int] = {}
        self._meeting = meeting
        self._epoch = meeting.epoch
        self._rank = rank
        self._near = near
        self._key = key
        self._deadline = deadline

    def reach(self, other: int) -> None:
        """Connect to a lower rank."""
        address = self._meeting.address_of(other, self._deadline)
        introduction = _INTRODUCTION.pack(
            _hash(self._epoch), self._epoch.number, self._rank, os.getpid(), self._ring_for(other)
        )
        while True:
            left = self._deadline - time.monotonic()
            try:
                timeout = max(0.001, min(left, _ATTEMPT_SECONDS))
                sock = connect(address, timeout, self._key).detach()
                sock.settimeout(_INTRODUCTION_SECONDS)
                sock.sendall(introduction)
            except (ChannelError, OSError) as error:
                self._meeting.check()
                if time.monotonic() + _LOOK_SECONDS >= self._deadline:
                    raise self._epoch.lost((other,), f"is not to be reached: {error}") from None
                time.sleep(_LOOK_SECONDS)
            else:
                self.sockets[other] = sock
                return

    def take(self, listener: Listener, missing: Collection[int]) -> None:
        """The next of the higher ranks' connections, or none for a moment."""
        self._meeting.check()
        now = time.monotonic()
        if now >= self._deadline:
            raise self._epoch.lost(sorted(missing), "did not come")
        try:
            channel = listener.accept(min(_LOOK_SECONDS, self._deadline - now))
        except DeadlineError:
            return
        sock = channel.detach()
        until = min(now + _INTRODUCTION_SECONDS, self._deadline)
        try:
            said = read_exactly(sock, _INTRODUCTION.size, until)
        except OSError:  # it has gone again, and will come again where it is a rank
            sock.close()
            return
        group, number, other, process, file = _INTRODUCTION.unpack(said)
        if other not in missing or (group, number) != (_hash(self._epoch), self._epoch.number):
            sock.close()  # of another epoch, say
            return
        self.sockets[other] = sock
        if other in self._near:
            self.rings[other] = self._opened(other, mapped.place_of(process, file))

    def close_files(self) -> None:
        for file in self._files.values():
            os.close(file)

    def _ring_for(self, other: int) -> int:
        """The file of memory to share with a rank; 0 where it is on another host."""
        if other not in self._near:
            return 0
        name = f"moebius-{self._epoch.group}-{self._epoch.number}"
        self._files[other], self.rings[other] = mapped.make(name, _cpu.RING_BYTES)
        return self._files[other]

    def _opened(self, other: int, place: str) -> Mapped:
        try:
            found = mapped.open_at(place)
        except (OSError, ConfigError) as error:
            raise self._epoch.lost((other,), f"shares no memory: {error}") from None
        if found.nbytes != _cpu.RING_BYTES:
            raise self._epoch.lost((other,), f"shares {found.nbytes} bytes of memory")
        return found


def _hash(epoch: Epoch) -> bytes:
    return hashlib.blake2b(epoch.group.encode(), digest_size=16).digest()
