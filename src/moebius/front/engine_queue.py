"""An engine's waiting queue as its front follows it: so a request for which there is no room is
refused without asking the engine, which would answer between two steps.

What the front hands over waits, until the engine says anything of it. It says who has left the
queue as soon as a step is planned, before that is computed (Engine.on_moved), so between two plans
the front knows the queue as the engine will find it when it takes the next request. What the front
knows is older than the truth by the time that a frame takes.
"""

from moebius.engine.client import StepOutput
from moebius.errors import OverloadError
from moebius.front.flight import Flight
from moebius.request.backlog import Backlog


class EngineQueue:
    """Which of the requests that one engine has wait for their place in a step.

    max_requests, max_tokens   the engine's own bounds
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._backlog = Backlog(max_requests, max_tokens)
        # With the tokens that they came with.
        self._waiting: dict[str, int] = {}

    def refusal(self, account: str, num_tokens: int) -> OverloadError | None:
        """What the engine would say to a request that came now; None where it takes it."""
        return self._backlog.refusal(account, num_tokens)

    def observe(self, now: float) -> None:
        """The engine was heard of at this time of its clock."""
        self._backlog.observe(now)

    def add(self, flight: Flight) -> None:
        """The engine is given a request."""
        account = flight.request.share.account
        self._waiting[flight.id] = flight.num_tokens
        self._backlog.add(account, flight.num_tokens, flight.request.arrival)

    def hear(self, flight: Flight, output: StepOutput) -> None:
        """The engine says something of a request that it has."""
        if output.waits and flight.id not in self._waiting:
            account = flight.request.share.account
            self._waiting[flight.id] = flight.num_tokens
            self._backlog.add_again(account, flight.num_tokens, flight.request.arrival)
        elif not output.waits:
            self.remove(flight)

    def remove(self, flight: Flight) -> None:
        """It waits no more: it runs, it has ended, or the engine was told to end it."""
        num_tokens = self._waiting.pop(flight.id, None)
        if num_tokens is not None:
            self._backlog.remove(flight.request.share.account, num_tokens)
