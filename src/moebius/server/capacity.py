"""What all connections of a server share: how many there may be, and how much of their bodies is in memory."""

import logging
from collections.abc import Callable
from typing import Protocol

from moebius.errors import OverloadError
from moebius.schedule.request import LIMITS
from moebius.server.faults import Fault

log = logging.getLogger(__name__)

# A body up to this size always has room: how many of these there are is bounded by the number of connections.
SMALL_BODY = 64 * 1024


class Closable(Protocol):
    """What a connection can be told."""

    def close(self) -> None:
        """Hang up once what was written has gone out."""

    def finish(self) -> None:
        """Hang up as soon as no request is being answered."""

    def cut(self) -> None:
        """Hang up at once."""


class Capacity:
    """The connections of one server, and the room that they share.

    most      connections at once
    rest      seconds that a connection may rest between requests, as clients are told
    ending    responses say that their connection closes: the server is about to end
    refused   called with every fault that never became a request, and so has no other witness; gives what is sent
    """

    def __init__(self, most: int, rest: int, refused: Callable[[Fault], Fault] = lambda fault: fault) -> None:
        self.most = most
        self.rest = rest
        self.refused = refused
        self.ending = False
        self._body_bytes = 0
        self._told = False
        self._connections: set[Closable] = set()
        self._leaving: set[Closable] = set()
        # In the order in which they began to wait.
        self._waiting: dict[Closable, None] = {}

    def __len__(self) -> int:
        return len(self._connections) + len(self._leaving)

    def admit(self, connection: Closable) -> bool:
        """Count a new connection; False where all others are busy with a request.

        A new client is worth more than one that has asked for nothing the longest: that one gives way.
        """
        while len(self._connections) >= self.most and self._waiting:
            if not self._told:
                self._told = True
                log.warning("all %d connections are open: idle ones are closed for new ones", self.most)
            next(iter(self._waiting)).close()
        if len(self._connections) >= self.most:
            return False
        self._connections.add(connection)
        return True

    def leaves(self, connection: Closable) -> bool:
        """A connection hangs up; False where so many are about to that this one must not take its time."""
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

    def finish(self) -> None:
        """Have every connection end after what it is answering."""
        self.ending = True
        for connection in list(self._connections):
            connection.finish()

    def cut(self) -> None:
        """End every connection at once."""
        for connection in [*self._connections, *self._leaving]:
            connection.cut()

    def take_body(self, size: int) -> None:
        """Take room for `size` bytes of a body. Raises OverloadError where there is none."""
        if self._body_bytes + size > LIMITS.bodies_bytes:
            raise OverloadError(
                f"request bodies of {self._body_bytes} bytes are being worked on; with this one they would pass "
                f"{LIMITS.bodies_bytes} bytes"
            )
        self._body_bytes += size

    def give_body(self, size: int) -> None:
        """Give back what `take_body` took."""
        self._body_bytes -= size
