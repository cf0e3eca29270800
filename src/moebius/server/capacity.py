"""What all connections of a server share: how many there may be, and how much of their bodies is in
memory."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from moebius.errors import OverloadError
from moebius.server.faults import Fault
from moebius.server.limits import HTTP_LIMITS

log = logging.getLogger(__name__)

SMALL_BODY = 64 * 1024


class Closable(Protocol):
    """What a connection can be told."""

    def close(self) -> None:
        """Hang up once what was written has gone out."""

    def cut(self) -> None:
        """Hang up at once."""


class Capacity:
    """The connections of one server, and the room that they share.

    most      connections at once
    rest      seconds that a connection may rest between requests, as clients are told
    ending    responses say that their connection closes: the server is about to end
    refused   called with every fault that never became a request, and so has no other witness;
              gives what is sent
    """

    def __init__(
        self, most: int, rest: int, refused: Callable[[Fault], Fault] = lambda fault: fault
    ) -> None:
        self.most = most
        self.rest = rest
        self.refused = refused
        self.ending = False
        self._told = False
        self._connections: set[Closable] = set()
        self._leaving: set[Closable] = set()
        # In the order in which they began to wait.
        self._waiting: dict[Closable, None] = {}

    def __len__(self) -> int:
        return len(self._connections) + len(self._leaving)

    def admit(self, connection: Closable) -> bool:
        """Count a new connection; False where all others are busy with a request.

        A new client is worth more than one that has asked for nothing the longest: that one gives
        way.
        """
        while len(self._connections) >= self.most and self._waiting:
            if not self._told:
                self._told = True
                log.warning(
                    "all %d connections are open: idle ones are closed for new ones", self.most
                )
            next(iter(self._waiting)).close()
        if len(self._connections) >= self.most:
            return False
        self._connections.add(connection)
        return True

    def leaves(self, connection: Closable) -> bool:
        """A connection hangs up; False where so many are about to that this one must not take its
        time."""
        self.forget(connection)
        if len(self._leaving) >= self.most and not self.ending:
            return False
        self._leaving.add(connection)
        return True

    def forget(self, connection: Closable) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        self._leaving.discard(connection)
        self._waiting.pop(connection, None)

    def waits(self, connection: Closable) -> None:
        """A connection has no request under way."""
        self._waiting[connection] = None

    def works(self, connection: Closable) -> None:
        """A connection has a request under way."""
        self._waiting.pop(connection, None)

    def close_waiting(self) -> None:
        """Hang up on all that have no request under way."""
        for connection in list(self._waiting):
            connection.close()

    def cut_all(self) -> None:
        """Hang up on everybody at once."""
        for connection in [*self._connections, *self._leaving]:
            connection.cut()


class BodyRoom:
    """How much of all requests' bodies a server has in memory: at most HTTP_LIMITS.bodies_bytes."""

    def __init__(self) -> None:
        self._taken = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Room for one body, given back at the end: call what is yielded with the size that it has,
        or will have.

        That raises OverloadError where there is no room. A body up to SMALL_BODY always has some:
        how many of these there are is bounded by the number of connections.
        """
        mine = 0

        def grow(size: int) -> None:
            nonlocal mine
            if size <= max(SMALL_BODY, mine):
                return
            if self._taken - mine + size > HTTP_LIMITS.bodies_bytes:
                raise OverloadError(
                    f"request bodies of {self._taken - mine} bytes are being worked on; with this "
                    f"one they would pass {HTTP_LIMITS.bodies_bytes} bytes"
                )
            self._taken += size - mine
            mine = size

        try:
            yield grow
        finally:
            self._taken -= mine
