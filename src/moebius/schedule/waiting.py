"""The waiting queue: ordered, bounded by count and by tokens, and aware of how fast it drains."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator

from moebius.errors import OverloadError
from moebius.schedule.request import Request, RequestStatus

MEMORY_SECONDS = 10.0
"""Time constant of the drain rate: what happened this long ago weighs 1/e."""
MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0


def service_order(request: Request) -> tuple[int, float, str]:
    return request.order


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
    """Unfinished requests that do not run, in the order (priority, arrival)."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._requests: list[Request] = []
        self._drain = DrainRate()
        self._backlog_since = -math.inf
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def observe(self, now: float) -> None:
        self._drain.observe(now, backlog=bool(self._requests), since=self._backlog_since)

    def check_room(self, request: Request) -> None:
        """OverloadError if the queue is full; an empty one takes any request, however long."""
        requests = len(self._requests) + 1 - self._max_requests
        tokens = self.num_tokens + request.num_tokens - self._max_tokens
        if self._requests and (requests > 0 or tokens > 0):
            raise OverloadError(
                f"the queue is full: {len(self._requests)} of {self._max_requests} requests and "
                f"{self.num_tokens} of {self._max_tokens} tokens wait; try again later",
                retry_after=self._drain.retry_after(requests, tokens),
            )

    def push(self, request: Request) -> None:
        """Put the request at its place in the order; a preempted one is never refused."""
        if not self._requests:
            self._backlog_since = request.asked.arrival
        insort(self._requests, request, key=service_order)
        self.num_tokens += request.num_tokens
        if request.status is RequestStatus.PREEMPTED:
            self._drain.count(-1, -request.num_tokens)

    def remove(self, request: Request) -> None:
        position = bisect_left(self._requests, request.order, key=service_order)
        assert self._requests[position] is request, "the waiting queue lost its order"
        del self._requests[position]
        self.num_tokens -= request.num_tokens
        self._drain.count(1, request.num_tokens)
