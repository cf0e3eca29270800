"""EngineClient's first form: the engine on a thread of this process."""

import logging
import queue
import threading
from collections.abc import Callable

from moebius.engine.client import EngineInfo, EngineStats, ExpertLoads, StepOutput
from moebius.engine.engine import Engine
from moebius.errors import EngineError, MoebiusError
from moebius.schedule.request import FinishReason, Request

log = logging.getLogger(__name__)

Deliver = Callable[[list[StepOutput]], None]
_IDLE_SECONDS = 0.5


class InProcessClient:
    """Runs `engine` on a thread of its own; requests and aborts reach it through one inbox, between steps."""

    def __init__(self, engine: Engine, *, step_deadline: float) -> None:
        self._engine = engine
        self._step_deadline = step_deadline
        self._inbox: queue.SimpleQueue[Request | str | None] = queue.SimpleQueue()
        self._deliver: Deliver | None = None
        self._stopping = threading.Event()
        self._dead = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._thread.start()

    def submit(self, request: Request) -> None:
        if self._dead or self._stopping.is_set():
            raise EngineError("the engine has stopped")
        self._inbox.put(request)

    def abort(self, request_id: str) -> None:
        self._inbox.put(request_id)

    def stats(self) -> EngineStats:
        """ready: the thread lives, and work pending implies a step within the step deadline."""
        stats = self._engine.stats()
        since = self._busy_since
        stuck = since is not None and stats.now - since > self._step_deadline
        ready = self._thread.is_alive() and not self._stopping.is_set() and not stuck
        return EngineStats(**{name: getattr(stats, name) for name in stats.__slots__} | {"ready": ready})

    def expert_loads(self) -> ExpertLoads:
        return self._engine.expert_loads()

    def close(self, timeout: float) -> None:
        self._stopping.set()
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                log.error("the engine did not stop within %.1f s", timeout)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                outputs = self._take(block=not self._engine.has_work)
                if self._engine.has_work:
                    self._busy_since = self._engine.clock()
                    outputs += self._engine.step()
                self._busy_since = None
                self._send(outputs)
        except Exception:
            log.exception("the engine thread failed")
        finally:
            self._dead = True
            self._send(self._take(block=False, refuse=EngineError("the engine has stopped")))
            unfinished = list(self._engine.scheduler.requests)
            ends = [self._engine.abort(id, EngineError("the engine has stopped")) for id in unfinished]
            self._send([end for end in ends if end is not None])
            self._engine.close()

    def _send(self, outputs: list[StepOutput]) -> None:
        if outputs and self._deliver is not None:
            self._deliver(outputs)

    def _take(self, *, block: bool, refuse: MoebiusError | None = None) -> list[StepOutput]:
        """Apply all that lies in the inbox; wait for something first when there is no other work."""
        outputs: list[StepOutput] = []
        while True:
            try:
                item = self._inbox.get(block, _IDLE_SECONDS)
            except queue.Empty:
                return outputs
            block = False
            if isinstance(item, Request):
                outputs += self._admit(item, refuse)
            elif isinstance(item, str):
                ended = self._engine.abort(item)
                outputs += [ended] if ended else []

    def _admit(self, request: Request, refuse: MoebiusError | None) -> list[StepOutput]:
        try:
            if refuse is not None:
                raise refuse
            self._engine.add(request)
        except MoebiusError as error:
            return [StepOutput(request.id, finish_reason=FinishReason.ERROR, error=error)]
        return []
