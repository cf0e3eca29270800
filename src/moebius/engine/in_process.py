"""EngineClient of an engine that has a thread of this process to itself."""

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from moebius.engine.client import EngineInfo, EngineStats, ExpertLoads, StepOutput
from moebius.engine.engine import Engine
from moebius.engine.faults import failed, failure
from moebius.errors import EngineError, MoebiusError, RequestError
from moebius.schedule.engine_request import EngineRequest

log = logging.getLogger(__name__)

Deliver = Callable[[list[StepOutput]], None]
_IDLE_SECONDS = 0.5
_STOPPED = "the engine has stopped"


class InProcessClient:
    """Runs `engine` on a thread of its own; requests and aborts reach it through one inbox, between
    steps.

    A request that was taken is in `_unfinished` until its last output is delivered. The lock makes
    "taken" and "stopped" exclude each other: whoever stops the engine finds every request that
    `submit` did not refuse.
    """

    def __init__(self, engine: Engine, *, step_deadline: float) -> None:
        self._engine = engine
        self._step_deadline = step_deadline
        self._inbox: queue.SimpleQueue[EngineRequest | str | None] = queue.SimpleQueue()
        self._deliver: Deliver | None = None
        self._lock = threading.Lock()
        self._unfinished: dict[str, None] = {}
        self._stopping = threading.Event()
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def start(self, deliver: Deliver) -> None:
        """Start the engine, once in its life. Raises EngineError afterwards, and once it has
        stopped."""
        with self._lock:
            self._require_running()
            if self._deliver is not None:
                raise EngineError("the engine was started before; it is started once")
            self._deliver = deliver
            self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Hand over a request, before or after the start. EngineError once the engine has stopped,
        RequestError for the id of an unfinished request."""
        with self._lock:
            self._require_running()
            if request.id in self._unfinished:
                raise RequestError(
                    f"request id {request.id!r} is in use; ids must be unique", param="request_id"
                )
            self._unfinished[request.id] = None
            self._inbox.put(request)

    def abort(self, request_id: str) -> None:
        with self._lock:
            if not self._stopping.is_set():
                self._inbox.put(request_id)

    def advance(self, wanted: Callable[[], bool]) -> bool:
        """Nothing: the engine makes its steps itself."""
        return False

    def stats(self) -> EngineStats:
        """ready: the thread lives, and work pending implies a step within the step deadline."""
        stats = self._engine.stats()
        since = self._busy_since
        stuck = since is not None and stats.now - since > self._step_deadline
        ready = self._thread.is_alive() and not self._stopping.is_set() and not stuck
        return replace(stats, ready=ready)

    def expert_loads(self) -> ExpertLoads:
        return self._engine.expert_loads()

    def close(self, timeout: float) -> None:
        """Stop the engine. Where a step takes longer than `timeout` seconds, its requests end
        without it."""
        with self._lock:
            self._stopping.set()
            self._inbox.put(None)
        if self._thread.ident is None:
            self._engine.close()
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.error("the engine did not stop within %.1f s", timeout)
            self._end_unfinished(EngineError(_STOPPED))

    def _require_running(self) -> None:
        if self._stopping.is_set():
            raise EngineError(_STOPPED)

    def _run(self) -> None:
        cause = EngineError(_STOPPED)
        try:
            while not self._stopping.is_set():
                self._send(self._turn())
        except Exception as error:
            cause = failure("the engine thread", error)
        finally:
            with self._lock:
                self._stopping.set()
            for request_id in list(self._engine.scheduler.requests):
                self._engine.drop(request_id)
            self._end_unfinished(cause)
            self._engine.close()

    def _turn(self) -> list[StepOutput]:
        """Take what lies in the inbox, and make a step where there is work."""
        outputs = self._take(block=not self._engine.has_work)
        if self._engine.has_work:
            self._busy_since = self._engine.clock()
            outputs += self._engine.step()
        self._busy_since = None
        return outputs

    def _end_unfinished(self, cause: EngineError) -> None:
        self._send([failed(request_id, cause) for request_id in list(self._unfinished)])

    def _send(self, outputs: list[StepOutput]) -> None:
        """Deliver outputs of unfinished requests. One that could not be delivered leaves a gap, so
        its request ends."""
        heard: list[StepOutput] = []
        with self._lock:
            for output in outputs:
                if output.request_id in self._unfinished:
                    heard.append(output)
                    if output.finish_reason is not None:
                        del self._unfinished[output.request_id]
        if not heard or self._deliver is None:
            return
        try:
            self._deliver(heard)
        except Exception as error:
            self._give_up(heard, failure("delivering a step's outputs", error))

    def _give_up(self, outputs: list[StepOutput], error: MoebiusError) -> None:
        assert self._deliver is not None
        for request_id in {output.request_id: None for output in outputs}:
            self._engine.drop(request_id)
            with self._lock:
                self._unfinished.pop(request_id, None)
            with suppress(Exception):  # the log has the first of them
                self._deliver([failed(request_id, error)])

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
