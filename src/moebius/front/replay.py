"""EngineClient over engines that may be lost: what they had in flight is asked for again.

The front holds what a request is made of: prompt, parameters, seed, and the tokens that its client
has. By promise P1 the next engine goes on with the very token that the lost one would have drawn.
So a client sees a pause, and no token lost, repeated or changed.

A request may itself be what ends engines. Those in flight at two losses are suspects: each is given
an engine of its own until it is past the place where the engines were lost. One whose engine is
lost while it is alone there fails; the others go on.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial

from moebius.engine.client import EngineClient, EngineInfo, EngineStats, ExpertLoads, StepOutput
from moebius.engine.faults import failed, say
from moebius.errors import EngineError, EngineLostError, MoebiusError, OverloadError, RequestError
from moebius.front.flight import Flight
from moebius.front.restarts import RestartBudget
from moebius.front.routing import EngineLoad, choose
from moebius.front.sums import add_loads, add_stats, counters_of
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason

log = logging.getLogger(__name__)

Deliver = Callable[[list[StepOutput]], None]
Lost = Callable[[MoebiusError], None]
Launch = Callable[[int, Lost], EngineClient]
"""Starts engine number i and returns once it is loaded, or raises MoebiusError. The engine calls
`Lost` once, from any thread and after its last output, when it cannot go on: its unfinished
requests get no further output."""


class ReplayClient:
    """`count` engines as one.

    on_give_up is called, once, with the reason, when engines were restarted too often for nothing;
    then all that is in flight ends with that error. Raises what `launch` raises at first.
    """

    def __init__(
        self,
        launch: Launch,
        count: int = 1,
        *,
        budget: RestartBudget | None = None,
        on_give_up: Callable[[MoebiusError], None] = lambda reason: None,
    ) -> None:
        self._launch = launch
        self._budget = budget or RestartBudget(time.monotonic)
        self._on_give_up = on_give_up
        self._deliver: Deliver | None = None
        self._lock = threading.RLock()
        self._stopping = False
        self._restarts = 0
        self._replayed = 0
        # All that is not finished, in the order it came; and of it what no engine has.
        self._flights: dict[str, Flight] = {}
        self._waiting: dict[str, Flight] = {}
        # An engine's number, and how many it had before this one: what an earlier one says is old.
        self._lives = [0] * count
        self._engines: list[EngineClient | None] = [None] * count
        # The suspect that has an engine of its own, or is to have it once that has finished.
        self._alone: tuple[int, Flight] | None = None
        self._past = EngineStats()
        self._started = self._launch_all()
        self._info = self._started[0].info
        self._loads = [self._new_load() for _ in range(count)]

    @property
    def info(self) -> EngineInfo:
        return self._info

    def start(self, deliver: Deliver) -> None:
        """Start the engines, once. EngineError afterwards, and once they have stopped."""
        with self._lock:
            self._require_running()
            if self._deliver is not None:
                raise EngineError("the engine was started before; it is started once")
            self._deliver = deliver
            for number, engine in enumerate(self._started):
                engine.start(partial(self._take, number, 0))
                self._engines[number] = engine
            self._give()

    def submit(self, request: EngineRequest) -> None:
        """Hand over a request, or keep it until there is an engine for it."""
        with self._lock:
            self._require_running()
            if request.id in self._flights:
                raise RequestError(
                    f"request id {request.id!r} is in use; ids must be unique", param="request_id"
                )
            flight = Flight(request)
            self._flights[request.id] = flight
            self._waiting[request.id] = flight
            self._give()

    def abort(self, request_id: str) -> None:
        with self._lock:
            flight = self._flights.get(request_id)
            if flight is None:
                return
            flight.unwanted = True
            if flight.engine is not None:
                self._engine(flight.engine).abort(request_id)
                return
            self._forget(flight)
        self._tell([_aborted(request_id)])

    def advance(self, wanted: Callable[[], bool]) -> bool:
        """Nothing: the engines make their steps themselves."""
        return False

    def stats(self) -> EngineStats:
        """All engines' together; counters go on where those of lost engines ended."""
        with self._lock:
            engines = list(self._up())
            total = add_stats([engine.stats() for engine in engines], self._past)
            return replace(
                total,
                waiting=total.waiting + len(self._waiting),
                restarts=self._restarts,
                replayed=self._replayed,
            )

    def expert_loads(self) -> ExpertLoads:
        with self._lock:
            return add_loads([engine.expert_loads() for engine in self._up()])

    def close(self, timeout: float) -> None:
        """Stop all engines; what is unfinished ends with EngineError."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._stopping = True
            engines = list(self._up()) if self._deliver else self._started
        for engine in engines:
            engine.close(max(deadline - time.monotonic(), 0.0))
        self._end_all(EngineError("the engine has stopped"))

    def _launch_all(self) -> list[EngineClient]:
        """Start all engines at the same time."""
        count = len(self._engines)
        with ThreadPoolExecutor(count) as pool:
            starts = [
                pool.submit(self._launch, number, partial(self._lose, number, 0))
                for number in range(count)
            ]
        failures = [start.exception() for start in starts]
        if any(failures):
            for start, failure in zip(starts, failures, strict=True):
                if failure is None:
                    start.result().close(0.0)
            raise next(failure for failure in failures if failure is not None)
        return [start.result() for start in starts]

    def _new_load(self) -> EngineLoad:
        return EngineLoad(self._info.num_blocks, self._info.block_size)

    def _require_running(self) -> None:
        if self._stopping:
            raise EngineError("the engine has stopped")

    def _up(self) -> Iterator[EngineClient]:
        return (engine for engine in self._engines if engine is not None)

    # What engines say

    def _take(self, number: int, life: int, outputs: list[StepOutput]) -> None:
        """Tell the clients what an engine says of requests that are its own."""
        heard: list[StepOutput] = []
        with self._lock:
            if self._lives[number] != life:
                return
            for output in outputs:
                flight = self._flights.get(output.request_id)
                if flight is not None and flight.engine == number:
                    heard += self._heard(flight, output)
        try:
            self._tell(heard)
        finally:
            if self._waiting:
                self._give()

    def _heard(self, flight: Flight, output: StepOutput) -> list[StepOutput]:
        """What the client is to hear of an output; nothing where the request is asked for again."""
        if isinstance(output.error, EngineLostError):
            return []  # it is asked for again, once `_lose` has been called
        assert flight.engine is not None
        ended = output.finish_reason
        if output.token_ids or ended is not None:
            self._loads[flight.engine].answered(flight.id)
        full = isinstance(output.error, OverloadError)
        recalled = flight.recalled and ended is FinishReason.ABORT
        if (recalled or (full and flight.losses)) and not flight.unwanted:
            self._take_back(flight)
            return []
        told = flight.told(output)
        if ended is not None:
            self._budget.finished()
            self._forget(flight)
        elif self._alone is not None and self._alone[1] is flight and flight.past_its_loss:
            self._clear(flight)
        return [told]

    def _tell(self, outputs: list[StepOutput]) -> None:
        if outputs and self._deliver is not None:
            self._deliver(outputs)

    # Requests

    def _forget(self, flight: Flight) -> None:
        self._flights.pop(flight.id, None)
        self._waiting.pop(flight.id, None)
        if self._alone is not None and self._alone[1] is flight:
            self._alone = None

    def _take_back(self, flight: Flight) -> None:
        """No engine has it, for now. It waits in the place that it had."""
        flight.taken_back()
        self._sort_waiting()

    def _sort_waiting(self) -> None:
        self._waiting = {id: each for id, each in self._flights.items() if each.engine is None}

    def _clear(self, flight: Flight) -> None:
        """A suspect did nothing. It makes room for the next one, and goes on after it."""
        assert flight.engine is not None
        flight.cleared()
        self._alone = None
        if any(each.suspect for each in self._waiting.values()):
            flight.recalled = True
            self._engine(flight.engine).abort(flight.id)

    def _engine(self, number: int) -> EngineClient:
        engine = self._engines[number]
        assert engine is not None, "a request's engine is there, or the request waits"
        return engine

    def _give(self) -> None:
        """Hand over what waits, as far as there are engines for it."""
        with self._lock:
            if self._stopping:
                return
            self._reserve()
            for flight in list(self._waiting.values()):
                number = self._engine_for(flight)
                if number is not None:
                    self._hand(flight, number)

    def _reserve(self) -> None:
        """Give the first of the suspects, where there is one, an engine of its own."""
        if self._alone is not None:
            return
        suspects = (each for each in self._waiting.values() if each.suspect)
        suspect = next(suspects, None)
        if suspect is None:
            return
        number = self._best_engine(suspect)
        if number is not None:
            self._alone = (number, suspect)

    def _engine_for(self, flight: Flight) -> int | None:
        """The engine that shall have a request now; None where it has to wait."""
        if self._alone is not None and self._alone[1] is flight:
            number = self._alone[0]
            busy = any(each.engine == number for each in self._flights.values())
            return None if busy or self._engines[number] is None else number
        if flight.suspect:
            return None
        return self._best_engine(flight)

    def _best_engine(self, flight: Flight) -> int | None:
        """Of the engines that take requests the one to ask; None where none does."""
        taken = self._alone[0] if self._alone else None
        return choose(
            flight.ask(),
            (
                (number, self._loads[number])
                for number, engine in enumerate(self._engines)
                if engine is not None and number != taken
            ),
        )

    def _hand(self, flight: Flight, number: int) -> None:
        request = flight.ask()
        del self._waiting[flight.id]
        flight.handed(number)
        self._loads[number].give(request)
        self._replayed += flight.losses > 0
        with suppress(EngineError):  # it is lost, and whoever sees that will say so
            self._engine(number).submit(request)

    # Engines that are lost

    def _lose(self, number: int, life: int, reason: MoebiusError) -> None:
        """An engine is gone: its requests wait for the next one, which a thread starts."""
        with self._lock:
            if self._stopping or self._lives[number] != life:
                return
            self._lives[number] += 1
            old = self._engines[number]
            self._engines[number] = None
            self._loads[number] = self._new_load()
            if old is not None:
                self._past = add_stats([counters_of(old.stats())], self._past)
            ended = self._ended_by_loss(number)
            self._sort_waiting()
        say(log.error, "engine %d is lost: %s", number, reason)
        self._tell(ended)
        restart = threading.Thread(
            target=self._restart, args=(number, life + 1, old, reason), name="restart", daemon=True
        )
        restart.start()

    def _ended_by_loss(self, number: int) -> list[StepOutput]:
        """Take back what a lost engine had; the last outputs of what is not asked for again."""
        ended: list[StepOutput] = []
        culprit = None
        if self._alone is not None and self._alone[0] == number:
            culprit = self._alone[1]
            self._alone = None
        for flight in [each for each in self._flights.values() if each.engine == number]:
            flight.lost()
            if flight.unwanted:
                ended.append(_aborted(flight.id))
                self._forget(flight)
            elif flight is culprit:
                say(log.error, "request %s ends: it was alone when its engine was lost", flight.id)
                ended.append(failed(flight.id, _alone_error()))
                self._budget.finished()
                self._forget(flight)
        return ended

    def _restart(
        self, number: int, life: int, old: EngineClient | None, reason: MoebiusError
    ) -> None:
        """Start an engine again, as often as the budget allows."""
        if old is not None:
            old.close(0.0)
        while not self._stopping:
            if not self._budget.spend():
                self._give_up(reason)
                return
            try:
                engine = self._launch(number, partial(self._lose, number, life))
            except MoebiusError as error:
                say(log.error, "engine %d does not start: %s", number, error)
                reason = error
                continue
            self._welcome(number, life, engine)
            return

    def _welcome(self, number: int, life: int, engine: EngineClient) -> None:
        """A new engine takes the place of a lost one, unless it is lost, or not wanted, already."""
        with self._lock:
            wanted = not self._stopping and self._lives[number] == life
            if wanted:
                engine.start(partial(self._take, number, life))
                self._engines[number] = engine
                self._restarts += 1
        if not wanted:
            engine.close(0.0)
            return
        left = len(self._waiting)
        say(log.warning, "engine %d runs again; %d requests waited for it", number, left)
        self._give()

    def _give_up(self, reason: MoebiusError) -> None:
        error = EngineError(
            f"engines were started {self._budget.most} times within {self._budget.seconds:.0f} s "
            f"and finished no request; the last one ended so: {reason}"
        )
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        say(log.critical, "%s", error)
        self._end_all(error)
        self._on_give_up(error)

    def _end_all(self, error: MoebiusError) -> None:
        with self._lock:
            left = list(self._flights)
            self._flights.clear()
            self._waiting.clear()
        self._tell([failed(request_id, error) for request_id in left])


def _aborted(request_id: str) -> StepOutput:
    error = EngineError("the request was aborted")
    return StepOutput(request_id, finish_reason=FinishReason.ABORT, error=error)


def _alone_error() -> EngineError:
    return EngineError(
        "engines were lost again and again while they computed this request, the last one with "
        "nothing else to do; it is not tried any further"
    )
