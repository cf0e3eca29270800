"""What waits for an engine: how much there may be of it, how much of it may be one owner's, and how
fast it drains.

An engine has one of its own queue (schedule/waiting.py), and its front follows that queue with
another (front/engine_queue.py): so both refuse by the same rule, in the same words.
"""

import math
from dataclasses import dataclass

from moebius.errors import OverloadError

MEMORY_SECONDS = 10.0
"""Time constant of the drain rate: what happened this long ago weighs 1/e."""
MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0

_SHARE = 8


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


@dataclass(slots=True)
class _Held:
    """What one owner has in the backlog."""

    requests: int = 0
    tokens: int = 0


class Backlog:
    """How many requests wait, and how many tokens they have, altogether and of each owner.

    Owners are told apart by their account (request/share.py).
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._held: dict[str, _Held] = {}
        self._drain = DrainRate()
        self._since = -math.inf
        self.num_requests = 0
        self.num_tokens = 0

    def observe(self, now: float) -> None:
        """Let time pass, for the drain rate."""
        self._drain.observe(now, backlog=bool(self.num_requests), since=self._since)

    def refusal(self, account: str, num_tokens: int) -> OverloadError | None:
        """Why an owner's request of so many tokens has no room; None where it has.

        Where nothing waits any request may, however long. Of a backlog with room an owner may have
        its share alone (`_beyond_share`).
        """
        if not self.num_requests:
            return None
        requests = self.num_requests + 1 - self._max_requests
        tokens = self.num_tokens + num_tokens - self._max_tokens
        mine = self._beyond_share(account, num_tokens, -requests, -tokens)
        requests = max(requests, mine[0])
        tokens = max(tokens, mine[1])
        if requests <= 0 and tokens <= 0:
            return None
        return OverloadError(
            f"the queue is full: {self.num_requests} of {self._max_requests} requests and "
            f"{self.num_tokens} of {self._max_tokens} tokens wait; try again later",
            retry_after=self._drain.retry_after(requests, tokens),
        )

    def add(self, account: str, num_tokens: int, since: float) -> None:
        """A new request waits, since then."""
        if not self.num_requests:
            self._since = since
        self._hold(account, 1, num_tokens)

    def add_again(self, account: str, num_tokens: int, since: float) -> None:
        """One that was preempted waits again; it is never refused."""
        self.add(account, num_tokens, since)
        self._drain.count(-1, -num_tokens)

    def remove(self, account: str, num_tokens: int) -> None:
        """A request waits no more."""
        self._hold(account, -1, -num_tokens)
        self._drain.count(1, num_tokens)

    def _hold(self, account: str, requests: int, tokens: int) -> None:
        self.num_requests += requests
        self.num_tokens += tokens
        held = self._held.setdefault(account, _Held())
        held.requests += requests
        held.tokens += tokens
        if not held.requests:
            del self._held[account]

    def _beyond_share(
        self, account: str, num_tokens: int, requests: int, tokens: int
    ) -> tuple[int, int]:
        """How many requests, and how many tokens, have to leave before the owner may have this one
        here too. With it, room for so many `requests` and `tokens` would be left.

        An owner that has some here leaves room for others: it has at most _SHARE times what is left
        (A. Choudhury and E. Hahne, Dynamic Queue Length Thresholds for Shared-Memory Packet
        Switches, 1998). Where owners are not told apart there are no others.
        """
        held = self._held.get(account)
        if not account or held is None:
            return 0, 0
        return (
            _excess(held.requests + 1, requests),
            _excess(held.tokens + num_tokens, tokens),
        )


def _excess(mine: int, left: int) -> int:
    """How much has to leave until an owner may have so much where so much is left; 0 or less where
    it may."""
    return -((_SHARE * left - mine) // (1 + _SHARE))
