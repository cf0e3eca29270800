"""Which engine has which request, and which requests wait for one.

A request may itself be what ends engines. Those in flight at two losses are suspects: each is given
an engine of its own until it is past the place where the engines were lost. One whose engine is
lost while it is alone there is the culprit; the others go on.

Engines that share experts compute each other's rows: a request at one may end another. There, all
that are in flight at any of them take part in a loss, and a suspect is alone when no other request
is in flight at all.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moebius.engine.client import StepOutput
from moebius.errors import OverloadError
from moebius.front.engine_queue import EngineQueue
from moebius.front.flight import Flight
from moebius.front.routing import EngineLoad, choose


class Room(NamedTuple):
    """How many requests, and how many tokens of theirs, may wait for an engine."""

    requests: int = 2**62
    tokens: int = 2**62


class Assignment:
    """All requests that are not finished, in the order they came. Used under its owner's lock.

    together   the engines make their steps together
    room       in each engine's own queue
    """

    def __init__(
        self,
        *,
        together: bool = False,
        room: Room = Room(),  # noqa: B008 - it cannot be changed
    ) -> None:
        self._together = together
        self._room = room
        self._flights: dict[str, Flight] = {}
        self._waiting: dict[str, Flight] = {}
        self._loads: dict[int, EngineLoad] = {}
        self._queues: dict[int, EngineQueue] = {}
        # Engines whose queue took no more: they are asked again once one of their requests ended.
        self._full: set[int] = set()
        # The suspect that has an engine of its own, or is to have it once that has finished.
        self._alone: tuple[int, Flight] | None = None
        # What living engines are to end: the engine's number and the request's id.
        self._to_end: list[tuple[int, str]] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        return sum(flight.num_tokens for flight in self._waiting.values())

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights.values())

    def get(self, request_id: str) -> Flight | None:
        return self._flights.get(request_id)

    def add(self, flight: Flight) -> None:
        """It waits from now on."""
        self._flights[flight.id] = flight
        self._waiting[flight.id] = flight

    def forget(self, flight: Flight) -> None:
        """It has ended."""
        if flight.engine is not None:
            self._load_of(flight).answered(flight.id)
            self._queues[flight.engine].remove(flight)
            self._full.discard(flight.engine)
        self._flights.pop(flight.id, None)
        self._waiting.pop(flight.id, None)
        if self._is_alone(flight):
            self._alone = None

    def answered(self, flight: Flight) -> None:
        """It has its first token: its engine owes it no prompt any more."""
        self._load_of(flight).answered(flight.id)

    def heard(self, number: int, outputs: Sequence[StepOutput]) -> None:
        """An engine says this, of requests that it has or has had."""
        now = max((output.at for output in outputs), default=0.0)
        if now:  # else they are of no step
            self._queues[number].observe(now)

    def hear(self, flight: Flight, output: StepOutput) -> None:
        """Its engine says this of it."""
        assert flight.engine is not None
        self._queues[flight.engine].hear(flight, output)

    def unwanted(self, flight: Flight) -> None:
        """Its client has aborted it. Whatever its engine is given from now on comes behind that."""
        flight.unwanted = True
        if flight.engine is not None:
            self._queues[flight.engine].remove(flight)

    def refusal(self, account: str, num_tokens: int = 1) -> OverloadError | None:
        """What a new request of an owner would be told by whichever engine it went to; None where
        one of them would take it, or where that cannot be known here."""
        if self._waiting:  # then it waits here, too
            return None
        found = [self._queues[number].refusal(account, num_tokens) for number in self._free()]
        refusals = [each for each in found if each is not None]
        if not refusals or len(refusals) < len(found):
            return None
        return min(refusals, key=lambda refusal: refusal.retry_after)

    def refusal_of(self, flight: Flight) -> OverloadError | None:
        """What a new request would be told by the engine that it would go to."""
        free = self._free()
        if self._waiting or not free:
            return None
        number = next(iter(free)) if len(free) == 1 else choose(flight.request, free.items())
        assert number is not None, "there is an engine"
        return self._queues[number].refusal(flight.request.share.account, flight.num_tokens)

    def take_back(self, flight: Flight) -> None:
        """Its engine has it no more, and is well. It waits in the place that it had."""
        assert flight.engine is not None
        self._load_of(flight).answered(flight.id)
        self._queues[flight.engine].remove(flight)
        self._full.discard(flight.engine)
        flight.taken_back()
        self._sort_waiting()

    def refused(self, flight: Flight) -> bool:
        """Its engine has no room for it. True where it waits now, until one of those that the
        engine has is done; False where the engine has none."""
        engine = flight.engine
        assert engine is not None
        if not any(each.engine == engine for each in self if each is not flight):
            return False
        self.take_back(flight)
        self._full.add(engine)
        return True

    def clear(self, flight: Flight) -> bool:
        """A suspect came past the place of its loss. Whether it has to make room for the next one,
        and to be recalled for that."""
        if not (self._is_alone(flight) and flight.past_its_loss):
            return False
        flight.cleared()
        self._alone = None
        return any(each.suspect for each in self._waiting.values())

    def opened(self, number: int, num_blocks: int, block_size: int) -> None:
        """An engine takes requests."""
        self._loads[number] = EngineLoad(num_blocks, block_size)
        self._queues[number] = EngineQueue(*self._room)

    def lost(self, number: int, computing: bool = True) -> tuple[list[Flight], Flight | None]:
        """An engine is gone. What it had waits; the request that was alone when that happened, if
        any, comes second.

        computing: whether it may have been a request's doing.
        """
        self._loads.pop(number, None)
        self._queues.pop(number, None)
        self._full.discard(number)
        culprit = self._culprit(number) if computing else None
        if self._alone is not None and (culprit is not None or self._alone[0] == number):
            self._alone = None
        had = [each for each in self if each.engine == number]
        elsewhere = [each for each in self if each.engine not in (number, None)]
        for flight in had:
            flight.taken_back()
        if computing:
            for flight in [*had, *elsewhere] if self._together else had:
                flight.took_part_in_a_loss()
            if self._together:
                self._recall(elsewhere, culprit)
        self._sort_waiting()
        return had, culprit

    def to_end(self) -> list[tuple[int, str]]:
        """The engine and the id of each request that its engine is to end, each told once."""
        told = [(number, id) for number, id in self._to_end if number in self._loads]
        self._to_end = []
        return told

    def assign(self) -> list[tuple[Flight, int]]:
        """Give engines to what waits, as far as there are some; who got which.

        In the order of service: an engine that takes no more has then what is served first.
        """
        if not self._waiting or not self._loads:
            return []
        self._reserve()
        given = []
        free = self._free()
        for flight in sorted(self._waiting.values(), key=lambda flight: flight.request.order):
            number = self._engine_for(flight, free)
            if number is not None:
                given.append((flight, number))
                del self._waiting[flight.id]
                self._loads[number].give(flight.ask())
                self._queues[number].add(flight)
                flight.handed(number)
        return given

    def _is_alone(self, flight: Flight) -> bool:
        return self._alone is not None and self._alone[1] is flight

    def _load_of(self, flight: Flight) -> EngineLoad:
        assert flight.engine is not None
        return self._loads[flight.engine]

    def _sort_waiting(self) -> None:
        self._waiting = {id: each for id, each in self._flights.items() if each.engine is None}

    def _culprit(self, number: int) -> Flight | None:
        """The request that was alone when engine `number` was lost."""
        if self._alone is None:
            return None
        engine = self._alone[1].engine
        there = engine is not None if self._together else engine == number
        return self._alone[1] if there else None

    def _recall(self, flights: list[Flight], culprit: Flight | None) -> None:
        """Where there are suspects, all come back that engines have: each suspect can be alone."""
        suspects = self._has_suspects()
        for flight in flights:
            assert flight.engine is not None
            if suspects or flight is culprit:
                flight.recalled = True
                self._queues[flight.engine].remove(flight)
                self._to_end.append((flight.engine, flight.id))

    def _has_suspects(self) -> bool:
        return any(each.suspect for each in self)

    def _free(self) -> dict[int, EngineLoad]:
        """The engines that take any request."""
        if self._together and self._has_suspects():
            return {}
        kept = None if self._alone is None else self._alone[0]
        return {
            number: load
            for number, load in self._loads.items()
            if number != kept and number not in self._full
        }

    def _reserve(self) -> None:
        """Give the first of the suspects, where there is one, an engine of its own."""
        if self._alone is not None:
            return
        suspect = next((each for each in self._waiting.values() if each.suspect), None)
        if suspect is not None:
            number = choose(suspect.ask(), self._loads.items())
            assert number is not None, "there is an engine"
            self._alone = (number, suspect)

    def _engine_for(self, flight: Flight, free: dict[int, EngineLoad]) -> int | None:
        """The engine that shall have a request now; None where it has to wait."""
        if self._alone is not None and self._alone[1] is flight:
            number = self._alone[0]
            beside = (each.engine for each in self if each.engine is not None)
            return None if any(self._together or each == number for each in beside) else number
        if flight.suspect or not free:
            return None
        return choose(flight.ask(), free.items())
