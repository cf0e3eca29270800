"""EngineClient over engines that may be lost: what they had in flight is asked for again.

The front holds what a request is made of: prompt, parameters, seed, and the tokens that its client
has. By promise P1 the next engine goes on with the very token that the lost one would have drawn.
So a client sees a pause, and no token lost, repeated or changed.

Which engines there are is a Fleet's to say, who has what an Assignment's. Both are changed under
one lock, which is never held while an engine is given a request or a client told something.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from moebius.engine.client import Deliver, EngineInfo, EngineStats, ExpertLoads, StepOutput
from moebius.engine.faults import failed, failure, say
from moebius.errors import EngineError, EngineLostError, MoebiusError, OverloadError
from moebius.front.assignment import Assignment, Room
from moebius.front.fleet import Fleet, Launch
from moebius.front.flight import Flight
from moebius.front.outbox import Outbox
from moebius.front.restarts import RestartBudget
from moebius.request.engine_request import EngineRequest, in_use
from moebius.request.finish import FinishReason

log = logging.getLogger(__name__)

_ANSWERED = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.COMPLETE)
_RESTART_SECONDS = 5.0
"""What a client is told to wait where many wait already for an engine that is started again."""


class ReplayClient:
    """`count` engines as one.

    stepped      where they make their steps together, so that a request at one may end another:
                 whether they may have made one since this was last asked; None: each makes its own
    room         in each engine's queue, and for what waits here while there is no engine for it
    on_give_up   called, once, with the reason, when engines were restarted too often for nothing;
                 all that was in flight has ended with that error

    Raises what `launch` raises at first.
    """

    def __init__(
        self,
        launch: Launch,
        count: int = 1,
        *,
        stepped: Callable[[], bool] | None = None,
        budget: RestartBudget | None = None,
        room: Room = Room(),  # noqa: B008 - it cannot be changed
        on_give_up: Callable[[MoebiusError], None] = lambda reason: None,
    ) -> None:
        self._budget = budget or RestartBudget()
        self._room = room
        self._on_give_up = on_give_up
        self._lock = threading.Lock()
        self._started = False
        self._replayed = 0
        self._stepped = stepped
        self._assignment = Assignment(together=stepped is not None, room=room)
        self._outbox = Outbox(self._undelivered)
        self._aborts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._fleet = Fleet(launch, count, self._budget, self._lock)
        threading.Thread(target=self._abort_all, name="aborts", daemon=True).start()

    @property
    def info(self) -> EngineInfo:
        return self._fleet.info

    def start(self, deliver: Deliver) -> None:
        """Start the engines, once. EngineError afterwards, and once they have stopped."""
        with self._lock:
            self._require_running()
            if self._started:
                raise EngineError("the engine was started before; it is started once")
            self._started = True
            self._outbox.open(deliver)
            self._fleet.start(self)
        self.changed()

    def submit(self, request: EngineRequest) -> None:
        """Hand over a request, or keep it until there is an engine for it."""
        with self._lock:
            self._require_running()
            if self._assignment.get(request.id) is not None:
                raise in_use(request.id)
            flight = Flight(request)
            full = self._no_room(flight.num_tokens) or self._assignment.refusal_of(flight)
            if full is None:
                self._assignment.add(flight)
            else:
                self._outbox.put([failed(request.id, full)])
        self.changed()

    def refusal(self, account: str) -> OverloadError | None:
        """What any new request of an owner would be told now, however short it is; None where one
        would be taken, or where only an engine knows."""
        with self._lock:
            if self._fleet.ended:
                return None
            return self._no_room(1) or self._assignment.refusal(account)

    def abort(self, request_id: str) -> None:
        """As in EngineClient. A finaliser may ask for it in the middle of anything, on a thread
        that holds any of the locks here: so another thread does it."""
        self._aborts.put(request_id)

    def advance(self, wanted: Callable[[], bool]) -> bool:
        """Nothing: the engines make their steps themselves."""
        return False

    def stats(self) -> EngineStats:
        """All engines' together; counters go on where those of lost engines ended."""
        with self._lock:
            total = self._fleet.stats()
            return replace(
                total,
                waiting=total.waiting + self._assignment.num_waiting,
                ready=total.ready and not self._fleet.ended,
                restarts=self._fleet.restarts,
                replayed=self._replayed,
            )

    def expert_loads(self) -> ExpertLoads:
        return self._fleet.expert_loads()

    def close(self, timeout: float) -> None:
        """Stop all engines; what is unfinished ends with EngineError."""
        deadline = time.monotonic() + timeout
        self._fleet.close(timeout)
        self._aborts.put(None)
        self._end_all(EngineError("the engine has stopped"))
        self._outbox.wait(max(deadline - time.monotonic(), 0.0))

    # What the fleet tells

    def came(self, number: int) -> None:
        info = self._fleet[number].info
        self._assignment.opened(number, info.num_blocks, info.block_size)

    def went(self, number: int) -> None:
        """Take back what a lost engine had, and end what nobody shall be asked for again."""
        # Engines that are lost one after the other, as those of a host, were not ended by requests.
        computing = self._stepped is None or self._stepped()
        had, culprit = self._assignment.lost(number, computing)
        for flight in had:
            if flight.unwanted:
                self._end(flight, _aborted(flight.id))
        if culprit is not None and not culprit.unwanted:
            say(log.error, "request %s ends: it was alone when an engine was lost", culprit.id)
            self._budget.explained()
            self._end(culprit, failed(culprit.id, _alone_error()))

    def changed(self) -> None:
        """Tell clients what there is to tell, and give engines what waits."""
        self._outbox.flush()
        with self._lock:
            if self._fleet.ended:
                return
            given = [
                (flight, flight.ask(), self._fleet[number])
                for flight, number in self._assignment.assign()
            ]
            self._replayed += sum(flight.replayed for flight, _, _ in given)
            to_end = [(self._fleet[number], id) for number, id in self._assignment.to_end()]
        for engine, request_id in to_end:
            engine.abort(request_id)
        for flight, request, engine in given:
            try:
                engine.submit(request)
            except EngineError:
                continue  # it is lost, and whoever sees that will say so
            except Exception as error:  # the others are to be given out all the same
                self._refused(flight, error)
            if flight.unwanted or flight.recalled:  # an abort may have been there before it
                engine.abort(request.id)

    def heard(self, number: int, life: int, outputs: list[StepOutput]) -> None:
        """Tell the clients what an engine says of requests that are its own."""
        with self._lock:
            if not self._fleet.is_now(number, life):
                return
            self._assignment.heard(number, outputs)
            for output in outputs:
                flight = self._assignment.get(output.request_id)
                if flight is not None and flight.engine == number:
                    self._take(flight, output)
            waits = self._assignment.num_waiting > 0
        if waits:
            self.changed()
        else:
            self._outbox.flush()

    def given_up(self, reason: EngineError) -> None:
        self._end_all(reason)
        self._on_give_up(reason)

    # Under the lock

    def _require_running(self) -> None:
        if self._fleet.ended:
            raise EngineError("the engine has stopped")

    def _no_room(self, num_tokens: int) -> OverloadError | None:
        """Why a new request of so many tokens cannot wait here, where others do."""
        waiting = self._assignment.num_waiting
        if not waiting:
            return None
        tokens = self._assignment.num_waiting_tokens
        if waiting < self._room.requests and tokens + num_tokens <= self._room.tokens:
            return None
        return OverloadError(
            f"{waiting} of {self._room.requests} requests wait for an engine that is started "
            f"again, with {tokens} of {self._room.tokens} tokens; try again later",
            retry_after=_RESTART_SECONDS,
        )

    def _take(self, flight: Flight, output: StepOutput) -> None:
        """An output of a request: tell its client, unless the request is asked for again."""
        if isinstance(output.error, EngineLostError):
            return  # it is asked for again, once its engine is known to be lost
        self._assignment.hear(flight, output)
        if not output.for_client:
            return
        ended = output.finish_reason
        if not flight.unwanted:
            if flight.recalled and ended is FinishReason.ABORT:
                self._assignment.take_back(flight)
                return
            full = isinstance(output.error, OverloadError)
            if full and flight.replayed and self._assignment.refused(flight):
                return
        told = flight.told(output)
        if ended is not None:
            if ended in _ANSWERED:
                self._budget.finished()
            self._end(flight, told)
            return
        self._outbox.put([told])
        if output.token_ids:
            self._assignment.answered(flight)
        if self._assignment.clear(flight):
            assert flight.engine is not None
            flight.recalled = True
            self._fleet[flight.engine].abort(flight.id)

    def _end(self, flight: Flight, last: StepOutput) -> None:
        self._assignment.forget(flight)
        self._outbox.put([last])

    # Without it

    def _abort_all(self) -> None:
        for request_id in iter(self._aborts.get, None):
            try:
                self._abort(request_id)
            except Exception as error:  # others are to be aborted after it
                failure("aborting a request", error)

    def _abort(self, request_id: str) -> None:
        with self._lock:
            flight = self._assignment.get(request_id)
            if flight is None:
                return
            self._assignment.unwanted(flight)
            engine = None if flight.engine is None else self._fleet[flight.engine]
            if engine is None:
                self._end(flight, _aborted(request_id))
        if engine is not None:
            engine.abort(request_id)
        self.changed()

    def _refused(self, flight: Flight, error: Exception) -> None:
        """No engine can be given this request."""
        if not isinstance(error, MoebiusError):
            error = failure("handing over a request", error)
        with self._lock:
            if self._assignment.get(flight.id) is flight:
                self._end(flight, failed(flight.id, error))
        self._outbox.flush()

    def _end_all(self, error: MoebiusError) -> None:
        with self._lock:
            for flight in list(self._assignment):
                self._end(flight, failed(flight.id, error))
        self._outbox.flush()

    def _undelivered(self, outputs: list[StepOutput], error: Exception) -> list[StepOutput]:
        """A client's request has a gap, so it ends; its last output."""
        cause = failure("delivering a step's outputs", error)
        ids = list({output.request_id: None for output in outputs})
        with self._lock:
            for flight in filter(None, map(self._assignment.get, ids)):
                if flight.engine is not None:
                    self._fleet[flight.engine].abort(flight.id)
                self._assignment.forget(flight)
        return [failed(request_id, cause) for request_id in ids]


def _aborted(request_id: str) -> StepOutput:
    error = EngineError("the request was aborted")
    return StepOutput(request_id, finish_reason=FinishReason.ABORT, error=error)


def _alone_error() -> EngineError:
    return EngineError(
        "engines were lost again and again while they computed this request, the last one with "
        "nothing else to do; it is not tried any further"
    )
