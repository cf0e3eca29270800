"""The waiting queue: in the order of turns, and bounded."""

from collections.abc import Iterator

from moebius.request.backlog import Backlog
from moebius.schedule.request import Request, RequestStatus
from moebius.schedule.turns import Turns


class WaitingQueue:
    """Unfinished requests that do not run; `turns` has their order. For each that `turns.in_turn`
    names, `start` is called, or it is passed over. `moved` has what `take_moved` gives."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.turns = Turns()
        self.backlog = Backlog(max_requests, max_tokens)
        self._moved: dict[str, bool] = {}

    def __len__(self) -> int:
        return self.backlog.num_requests

    def __iter__(self) -> Iterator[Request]:
        return iter(self.turns)

    def check_room(self, request: Request) -> None:
        """OverloadError if the queue is full; an empty one takes any request, however long."""
        refusal = self.backlog.refusal(request.asked.share.account, request.num_tokens)
        if refusal is not None:
            raise refusal

    def push(self, request: Request) -> None:
        """Put the request at its place in the order; a preempted one is never refused."""
        again = request.status is RequestStatus.PREEMPTED
        self.turns.push(request)
        add = self.backlog.add_again if again else self.backlog.add
        add(request.asked.share.account, request.num_tokens, request.asked.arrival)
        if again:
            self._moved[request.id] = True

    def start(self, request: Request, num_cached: int) -> None:
        """It runs from now on. Its owner pays once for what is computed, however often that is."""
        self.remove(request)
        if request.scheduled is None:
            self.turns.took(request, request.num_tokens - num_cached)

    def remove(self, request: Request) -> None:
        self.turns.remove(request)
        self.backlog.remove(request.asked.share.account, request.num_tokens)
        self._moved[request.id] = False

    def take_moved(self) -> dict[str, bool]:
        """Who has left since this was last asked, and who is here again (True)."""
        moved = self._moved
        self._moved = {}
        return moved
