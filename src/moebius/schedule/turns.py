"""Whose turn it is among the owners of requests that wait: deficit round robin over tokens.

M. Shreedhar and G. Varghese, Efficient Fair Queueing Using Deficit Round Robin, SIGCOMM 1995. What
a request takes is known only afterwards: how much of its prompt is cached when it starts, and how
long its answer is when it ends. So an owner may take more than it has left, and waits for that the
longer next time. With one owner the order is that of the requests.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from moebius.schedule.request import Request, RequestStatus

QUANTUM = 64
"""Tokens that an owner of weight 1 may take in its turn: about one short request."""


def service_order(request: Request) -> tuple[int, float, str]:
    return request.order


@dataclass(slots=True, eq=False)
class Lane:
    """One owner's requests.

    waiting     those that wait, in the order (priority, arrival)
    left        tokens that it may take in this turn; below 0: those that it has taken too many
    unfinished  how many wait or run
    """

    weight: float
    waiting: list[Request] = field(default_factory=list)
    left: float = 0.0
    unfinished: int = 0

    @property
    def quantum(self) -> float:
        return QUANTUM * self.weight


class Turns:
    """The lanes of all owners that have an unfinished request. What one owes is forgotten when it
    has none."""

    def __init__(self) -> None:
        self._lanes: dict[str, Lane] = {}
        # Those with requests that wait; the first has its turn.
        self._ring: deque[Lane] = deque()

    def __len__(self) -> int:
        """How many owners have unfinished requests."""
        return len(self._lanes)

    def __iter__(self) -> Iterator[Request]:
        """All that wait, lane by lane."""
        for lane in self._ring:
            yield from lane.waiting

    def push(self, request: Request) -> None:
        """It waits: a new request, or one that was preempted."""
        share = request.asked.share
        lane = self._lanes.setdefault(share.account, Lane(share.weight))
        lane.weight = share.weight  # the operator may have changed it
        if not lane.waiting:
            self._ring.append(lane)
        insort(lane.waiting, request, key=service_order)
        lane.unfinished += request.status is not RequestStatus.PREEMPTED

    def remove(self, request: Request) -> None:
        """It waits no more."""
        lane = self._lanes[request.asked.share.account]
        position = bisect_left(lane.waiting, request.order, key=service_order)
        assert lane.waiting[position] is request, "the waiting queue lost its order"
        del lane.waiting[position]
        if not lane.waiting:
            self._ring.remove(lane)
            lane.left = min(lane.left, 0.0)

    def took(self, request: Request, num_tokens: int) -> None:
        """So many tokens were computed for it, or will be."""
        self._lanes[request.asked.share.account].left -= num_tokens

    def finished(self, request: Request) -> None:
        """It has ended, and waits no more."""
        lane = self._lanes[request.asked.share.account]
        lane.left -= len(request.output_ids)
        lane.unfinished -= 1
        if not lane.unfinished:
            del self._lanes[request.asked.share.account]

    def in_turn(self) -> Iterator[Request]:
        """Those that wait, each once, the one whose turn it is first.

        Whoever asks for the next one has let the last one start, and said what it takes (`remove`,
        `took`), or passes it over.
        """
        passed = dict.fromkeys(self._ring, 0)
        while any(passed[lane] < len(lane.waiting) for lane in self._ring):
            lane = self._ring[0]
            position = passed[lane]
            if lane.left <= 0 or position == len(lane.waiting):
                self._next_turn()
                continue
            request = lane.waiting[position]
            yield request
            if position < len(lane.waiting) and lane.waiting[position] is request:
                passed[lane] += 1

    def _next_turn(self) -> None:
        """The next owner has its turn. Rounds after which nobody could take anything are passed at
        once."""
        if all(lane.left <= 0 for lane in self._ring):
            rounds = min(-lane.left // lane.quantum for lane in self._ring)
            for lane in self._ring:
                lane.left += rounds * lane.quantum
        self._ring.rotate(-1)
        first = self._ring[0]
        first.left = min(first.left, 0.0) + first.quantum
