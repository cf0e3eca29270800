"""The waiting queue: ordered, bounded by count and by tokens, and aware of how fast it drains."""

import math
from collections.abc import Iterator

from moebius.errors import OverloadError
from moebius.schedule.request import Request, RequestStatus
from moebius.schedule.turns import Turns

MEMORY_SECONDS = 10.0
"""Time constant of the drain rate: what happened this long ago weighs 1/e."""
MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0


class DrainRate:
    """Requests and tokens that leave a backlog per second; old news fades."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._seconds = 0.0
        self._requests = 0.0
        self._tokens = 0.0

    def count(self, requests: int, tokens: int) -> None:
        """So many left; negative numbers for what came back by preemption."""
        self._requests += requests
        self._tokens += tokens

    def observe(self, now: float, *, backlog: bool, since: float = -math.inf) -> None:
        """Let time pass; it counts only where there was a backlog to drain, from `since` on."""
        elapsed = 0.0 if self._last is None else max(0.0, now - max(self._last, since))
        self._last = now
        if backlog:
            fade = math.exp(-elapsed / MEMORY_SECONDS)
            self._seconds = self._seconds * fade + elapsed
            self._requests *= fade
            self._tokens *= fade

    def retry_after(self, requests: int, tokens: int) -> float:
        """Seconds until so many requests and so many tokens will have left, within bounds."""
        if not self._seconds:
            return MIN_RETRY_SECONDS
        waits = [
            excess * self._seconds / drained if drained > 0 else MAX_RETRY_SECONDS
            for excess, drained in ((requests, self._requests), (tokens, self._tokens))
            if excess > 0
        ]
        return min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, *waits))


class WaitingQueue:
    """Unfinished requests that do not run; `turns` has their order. For each that `turns.in_turn`
    names, `start` is called, or it is passed over."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self.turns = Turns()
        self._drain = DrainRate()
        self._backlog_since = -math.inf
        self._count = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        return iter(self.turns)

    def observe(self, now: float) -> None:
        self._drain.observe(now, backlog=bool(self._count), since=self._backlog_since)

    def check_room(self, request: Request) -> None:
        """OverloadError if the queue is full; an empty one takes any request, however long.

        Of a queue with room an owner may have its share alone (Turns.beyond_share).
        """
        requests = self._count + 1 - self._max_requests
        tokens = self.num_tokens + request.num_tokens - self._max_tokens
        mine = self.turns.beyond_share(request, -requests, -tokens)
        requests = max(requests, mine[0])
        tokens = max(tokens, mine[1])
        if self._count and (requests > 0 or tokens > 0):
            raise OverloadError(
                f"the queue is full: {self._count} of {self._max_requests} requests and "
                f"{self.num_tokens} of {self._max_tokens} tokens wait; try again later",
                retry_after=self._drain.retry_after(requests, tokens),
            )

    def push(self, request: Request) -> None:
        """Put the request at its place in the order; a preempted one is never refused."""
        if not self._count:
            self._backlog_since = request.asked.arrival
        self.turns.push(request)
        self._count += 1
        self.num_tokens += request.num_tokens
        if request.status is RequestStatus.PREEMPTED:
            self._drain.count(-1, -request.num_tokens)

    def start(self, request: Request, num_cached: int) -> None:
        """It runs from now on. Its owner pays once for what is computed, however often that is."""
        self.remove(request)
        if request.scheduled is None:
            self.turns.took(request, request.num_tokens - num_cached)

    def remove(self, request: Request) -> None:
        self.turns.remove(request)
        self._count -= 1
        self.num_tokens -= request.num_tokens
        self._drain.count(1, request.num_tokens)
