"""EngineClient without a thread: whoever waits for outputs makes the steps that bring them."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from moebius.engine.client import Deliver, EngineInfo, EngineStats, ExpertLoads, StepOutput
from moebius.engine.deliveries import Deliveries
from moebius.engine.engine import Engine
from moebius.engine.faults import failure
from moebius.engine.interrupts import Uninterrupted
from moebius.request.engine_request import EngineRequest

log = logging.getLogger(__name__)

_TURN_SECONDS = 0.01
"""Who waits for its turn looks this often whether it still has to."""


class InlineClient:
    """Runs `engine` on its callers' threads, one at a time; it works only inside `advance`.

    Ctrl-C waits until a call here is done, which is a step at most: then the engine is whole for
    whoever goes on.

    A caller's iterator may be closed by Python's garbage collector in the middle of anything, a
    step among it. So what is asked goes through an inbox, which is taken when nothing else uses the
    engine; and who closes it in the middle of a step has it stopped when that is done. Nobody who
    asks for something waits for another thread's step: that thread takes it, after the step.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._deliveries = Deliveries(engine.drop)
        self._lock = threading.RLock()
        self._inbox: deque[EngineRequest | str] = deque()
        self._busy = False
        self._stopped = False

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def start(self, deliver: Deliver) -> None:
        """Take `deliver` for all that comes. EngineError the second time, and once closed."""
        self._deliveries.start(deliver)
        self._take_inbox()

    def submit(self, request: EngineRequest) -> None:
        """Hand over a request, before or after the start."""
        with Uninterrupted():
            self._deliveries.take(request.id, lambda: self._inbox.append(request))
            self._take_inbox()

    def abort(self, request_id: str) -> None:
        with Uninterrupted():
            self._inbox.append(request_id)
            self._take_inbox()

    def advance(self, wanted: Callable[[], bool]) -> bool:
        """Make a step. False where the engine has no work."""
        with Uninterrupted():
            while not self._lock.acquire(timeout=_TURN_SECONDS):
                if not wanted():  # another thread's step has brought it
                    return True
            try:
                if not wanted():
                    return True
                if not self._engine.has_work:
                    return False
                self._use(self._engine.step)
                return True
            finally:
                self._lock.release()
                self._take_inbox()

    def stats(self) -> EngineStats:
        """ready: it was started, and has not stopped."""
        ready = self._deliveries.started and not self._deliveries.stopped
        return replace(self._engine.stats(), ready=ready)

    def expert_loads(self) -> ExpertLoads:
        return self._engine.expert_loads()

    def close(self, timeout: float) -> None:
        """Stop the engine. Where a step takes longer than `timeout` seconds, its requests end
        without it, and the engine stops after it."""
        with Uninterrupted():
            self._deliveries.stop()
            if self._lock.acquire(timeout=timeout):
                try:
                    self._use(list)
                finally:
                    self._lock.release()
                    self._take_inbox()
            else:
                log.error("the engine did not stop within %.1f s", timeout)
                self._deliveries.end_all()

    @property
    def _usable(self) -> bool:
        """Not before the start, and not where this very thread is in the middle of it: then the
        inbox is taken on its way out."""
        return not self._busy and (self._deliveries.started or self._deliveries.stopped)

    def _take_inbox(self) -> None:
        """Do what came into it, unless another thread uses the engine: that one does the same
        once it has let go of it."""
        while self._inbox and self._usable and self._lock.acquire(blocking=False):
            try:
                self._use(list)
            finally:
                self._lock.release()

    def _use(self, work: Callable[[], list[StepOutput]]) -> None:
        """Do some work with the engine, then what came into the inbox, and deliver the outputs."""
        if not self._usable:
            return
        self._busy = True
        try:
            self._deliveries.send(self._outputs_of(work))
            if self._deliveries.stopped:
                self._stop()
        finally:
            self._busy = False
            if self._inbox or (self._deliveries.stopped and not self._stopped):
                self._use(list)  # it was asked for when the above had been looked at

    def _outputs_of(self, work: Callable[[], list[StepOutput]]) -> list[StepOutput]:
        """What the work and the inbox bring. An engine that fails is stopped: its books may be half
        written."""
        outputs: list[StepOutput] = []
        try:
            outputs += work()
        except Exception as error:
            self._deliveries.stop(failure("the engine's step", error))
        return outputs + self._take()

    def _take(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, EngineRequest):
                outputs += self._engine.take(item)
            else:
                outputs += self._engine.drop(item)
        return outputs

    def _stop(self) -> None:
        """Give back what requests hold, and end all that are unfinished."""
        if self._stopped:
            return
        self._stopped = True
        for request_id in list(self._engine.scheduler.requests):
            self._engine.drop(request_id)
        self._engine.close()
        self._deliveries.end_all()
