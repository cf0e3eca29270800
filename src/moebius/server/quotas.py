"""What one API key's requests take, and the limits that they are held to."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moebius.server.faults import Fault

_MINUTE = 60.0
# How soon a place, or room in the queue, may be free cannot be known: both are the key's own doing.
_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key may have at most; None: as much as the server has room for.

    max_requests          requests in flight
    max_queued_tokens     tokens of prompts whose answer has not begun
    requests_per_minute   requests that begin within any 60 seconds
    """

    max_requests: int | None = None
    max_queued_tokens: int | None = None
    requests_per_minute: int | None = None


UNLIMITED = Limits()


class Quota:
    """What one key's requests take at this moment."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.requests = 0
        self.queued_tokens = 0
        self._begun: deque[float] = deque()

    @contextmanager
    def request(self, limits: Limits) -> Iterator[None]:
        """One request, for as long as the block lasts. Raises Fault, a 429, where it is too many.

        A request that is refused does not count.
        """
        now = self._clock()
        most = limits.max_requests
        if most is not None and self.requests >= most:
            raise _limited(f"it has {self.requests} requests in flight, of at most {most}")
        if limits.requests_per_minute is not None:
            self._begin(now, limits.requests_per_minute)
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def _begin(self, now: float, most: int) -> None:
        while self._begun and now - self._begun[0] >= _MINUTE:
            self._begun.popleft()
        if len(self._begun) >= most:
            # Where the limit was lowered more have begun than may: until all but `most` are past.
            until = self._begun[len(self._begun) - most] + _MINUTE
            raise _limited(f"{most} requests a minute have begun", until - now)
        self._begun.append(now)

    def queue(self, tokens: int, limits: Limits) -> None:
        """So many tokens wait from now on. Raises Fault, a 429, where that is too many.

        Where none waits any request is taken, however long.
        """
        most = limits.max_queued_tokens
        if most is not None and self.queued_tokens and self.queued_tokens + tokens > most:
            raise _limited(
                f"{self.queued_tokens} tokens of it wait, of at most {most}, and this request has "
                f"{tokens}"
            )
        self.queued_tokens += tokens

    def leave_queue(self, tokens: int) -> None:
        """So many tokens wait no more."""
        self.queued_tokens -= tokens


def _limited(why: str, seconds: float = _RETRY_SECONDS) -> Fault:
    return Fault(
        429,
        f"this API key is at its own limit: {why}; try again later",
        "rate_limit_exceeded",
        "rate_limit",
        headers={"Retry-After": str(max(1, math.ceil(seconds)))},
    )
