"""EngineClient of an engine that has a thread of this process to itself."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import replace

from moebius.engine.client import Deliver, EngineInfo, EngineStats, ExpertLoads, StepOutput
from moebius.engine.deliveries import Deliveries
from moebius.engine.engine import Engine
from moebius.engine.faults import failure, lost
from moebius.ops.cuda import device_for_threads
from moebius.request.engine_request import EngineRequest

log = logging.getLogger(__name__)

_Item = EngineRequest | str | Callable[[], None]
"""A request, the id of one to abort, or other work between two steps."""
_IDLE_SECONDS = 0.5


class InProcessClient:
    """Runs `engine` on a thread of its own; requests and aborts reach it through one inbox, between
    steps."""

    def __init__(self, engine: Engine, *, step_deadline: float) -> None:
        self._engine = engine
        self._step_deadline = step_deadline
        self._inbox: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._deliveries = Deliveries(engine.drop)
        self._busy_since: float | None = None
        self._take_device = device_for_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def stopped(self) -> bool:
        """It was closed, or its thread has failed: no step will ever be made again."""
        return self._deliveries.stopped

    def start(self, deliver: Deliver) -> None:
        """Start the engine, once in its life. Raises EngineError afterwards, and once it has
        stopped."""
        self._deliveries.start(deliver, self._thread.start)

    def submit(self, request: EngineRequest) -> None:
        """Hand over a request, before or after the start. EngineError once the engine has stopped,
        RequestError for the id of an unfinished request."""
        self._deliveries.take(request.id, lambda: self._inbox.put(request))

    def abort(self, request_id: str) -> None:
        self._deliveries.while_running(lambda: self._inbox.put(request_id))

    def between_steps(self, work: Callable[[], None]) -> None:
        """Do some work on the engine's thread, in its turn among requests and aborts."""
        self._inbox.put(work)

    def advance(self, wanted: Callable[[], bool]) -> bool:
        """Nothing: the engine makes its steps itself."""
        return False

    def stats(self) -> EngineStats:
        """ready: the thread lives, and work pending implies a step within the step deadline."""
        stats = self._engine.stats()
        since = self._busy_since
        stuck = since is not None and stats.now - since > self._step_deadline
        ready = self._thread.is_alive() and not self.stopped and not stuck
        return replace(stats, ready=ready)

    def expert_loads(self) -> ExpertLoads:
        return self._engine.expert_loads()

    def close(self, timeout: float) -> None:
        """Stop the engine. Where a step takes longer than `timeout` seconds, its requests end
        without it."""
        self._deliveries.stop()
        self._inbox.put(None)
        if self._thread.ident is None:
            self._engine.close()
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.error("the engine did not stop within %.1f s", timeout)
            self._deliveries.end_all()

    def _run(self) -> None:
        try:
            self._take_device()
            while not self.stopped:
                self._deliveries.send(self._turn())
        except Exception as error:
            self._deliveries.stop(lost(failure("the engine thread", error)))
        finally:
            self._deliveries.stop()
            for request_id in list(self._engine.scheduler.requests):
                self._engine.drop(request_id)
            self._deliveries.end_all()
            self._engine.close()

    def _turn(self) -> list[StepOutput]:
        """Take what lies in the inbox, and make a step where there is work."""
        outputs = self._take(block=not self._engine.has_work)
        if self._engine.has_work:
            self._busy_since = self._engine.clock()
            outputs += self._engine.step()
        self._busy_since = None
        return outputs

    def _take(self, *, block: bool) -> list[StepOutput]:
        """Apply all that lies in the inbox; wait for something first when there is no other
        work."""
        outputs: list[StepOutput] = []
        while True:
            try:
                item = self._inbox.get(block, _IDLE_SECONDS)
            except queue.Empty:
                return outputs
            block = False
            if isinstance(item, EngineRequest):
                outputs += self._engine.take(item)
            elif isinstance(item, str):
                outputs += self._engine.drop(item)
            elif item is not None:
                item()
