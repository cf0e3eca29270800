"""Which engine has which request, and which requests wait for one.

A request may itself be what ends engines. Those in flight at two losses are suspects: each is given
an engine of its own until it is past the place where the engines were lost. One whose engine is
lost while it is alone there is the culprit; the others go on.
"""

from collections.abc import Iterator

from moebius.front.flight import Flight
from moebius.front.routing import EngineLoad, choose


class Assignment:
    """All requests that are not finished, in the order they came. Used under its owner's lock."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        self._waiting: dict[str, Flight] = {}
        self._loads: dict[int, EngineLoad] = {}
        # Engines whose queue took no more: they are asked again once one of their requests ended.
        self._full: set[int] = set()
        # The suspect that has an engine of its own, or is to have it once that has finished.
        self._alone: tuple[int, Flight] | None = None

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
            self._full.discard(flight.engine)
        self._flights.pop(flight.id, None)
        self._waiting.pop(flight.id, None)
        if self._is_alone(flight):
            self._alone = None

    def answered(self, flight: Flight) -> None:
        """It has its first token: its engine owes it no prompt any more."""
        self._load_of(flight).answered(flight.id)

    def take_back(self, flight: Flight) -> None:
        """Its engine has it no more, and is well. It waits in the place that it had."""
        assert flight.engine is not None
        self._load_of(flight).answered(flight.id)
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

    def lost(self, number: int) -> tuple[list[Flight], Flight | None]:
        """An engine is gone. What it had waits; of this, the request that was alone there, if any,
        comes second."""
        self._loads.pop(number, None)
        self._full.discard(number)
        culprit = None
        if self._alone is not None and self._alone[0] == number:
            alone = self._alone[1]
            self._alone = None
            culprit = alone if alone.engine == number else None
        had = [each for each in self if each.engine == number]
        for flight in had:
            flight.lost()
        self._sort_waiting()
        return had, culprit

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
                flight.handed(number)
        return given

    def _is_alone(self, flight: Flight) -> bool:
        return self._alone is not None and self._alone[1] is flight

    def _load_of(self, flight: Flight) -> EngineLoad:
        assert flight.engine is not None
        return self._loads[flight.engine]

    def _sort_waiting(self) -> None:
        self._waiting = {id: each for id, each in self._flights.items() if each.engine is None}

    def _free(self) -> dict[int, EngineLoad]:
        """The engines that take any request."""
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
            return None if any(each.engine == number for each in self) else number
        if flight.suspect or not free:
            return None
        return choose(flight.ask(), free.items())
