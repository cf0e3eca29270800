"""EngineClient without a thread: whoever waits for outputs makes the steps that bring them."""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from moebius.engine.client import EngineInfo, EngineStats, ExpertLoads, StepOutput
from moebius.engine.engine import Engine
from moebius.engine.faults import failed, failure
from moebius.engine.interrupts import Uninterrupted
from moebius.errors import EngineError, MoebiusError, RequestError
from moebius.schedule.engine_request import EngineRequest

Deliver = Callable[[list[StepOutput]], None]


class InlineClient:
    """Runs `engine` on its callers' threads, one at a time; it works only inside `advance`.

    Ctrl-C waits until a call here is done, which is a step at most: then the engine is whole for
    whoever goes on.

    A caller's iterator may be closed by Python's garbage collector in the middle of anything, a
    step among it. So what is asked goes through an inbox, which is taken when nothing else uses the
    engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._deliver: Deliver | None = None
        self._lock = threading.RLock()
        self._inbox: deque[EngineRequest | str] = deque()
        self._unfinished: dict[str, None] = {}
        self._busy = False
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def start(self, deliver: Deliver) -> None:
        """Take `deliver` for all that comes. EngineError the second time, and once closed."""
        with self._lock:
            self._require_running()
            if self._deliver is not None:
                raise EngineError("the engine was started before; it is started once")
            self._deliver = deliver

    def submit(self, request: EngineRequest) -> None:
        with Uninterrupted(), self._lock:
            self._require_running()
            if request.id in self._unfinished:
                raise RequestError(
                    f"request id {request.id!r} is in use; ids must be unique", param="request_id"
                )
            self._unfinished[request.id] = None
            self._inbox.append(request)
            self._use(list)

    def abort(self, request_id: str) -> None:
        with Uninterrupted():
            self._inbox.append(request_id)
            with self._lock:
                self._use(list)

    def advance(self, wanted: Callable[[], bool]) -> bool:
        """Make a step. False where the engine has no work."""
        with Uninterrupted(), self._lock:
            if not wanted():
                return True
            if not self._engine.has_work:
                return False
            self._use(self._engine.step)
            return True

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def expert_loads(self) -> ExpertLoads:
        return self._engine.expert_loads()

    def close(self, timeout: float) -> None:
        """Stop, once the step under way is done; it is not waited for longer than `timeout`."""
        with Uninterrupted():
            if not self._lock.acquire(timeout=timeout):
                raise EngineError(f"the engine did not stop within {timeout:.1f} s")
            try:
                self._stop()
            finally:
                self._lock.release()

    def _require_running(self) -> None:
        if self._closed:
            raise EngineError("the engine has stopped")

    def _use(self, work: Callable[[], list[StepOutput]]) -> None:
        """Do some work with the engine, then what came into the inbox, and deliver the outputs.

        Nothing where this very thread is in the middle of it: then the inbox is taken on its way
        out.
        """
        if self._busy:
            return
        self._busy = True
        outputs: list[StepOutput] = []
        try:
            outputs += work()
        finally:
            outputs += self._take()
            self._busy = False
            self._send(outputs)

    def _take(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, EngineRequest):
                outputs += self._engine.take(item)
            else:
                outputs += self._engine.drop(item)
        return outputs

    def _send(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self._unfinished.pop(output.request_id, None)
        if not outputs or self._deliver is None:
            return
        try:
            self._deliver(outputs)
        except Exception as error:
            self._give_up(outputs, failure("delivering a step's outputs", error))

    def _give_up(self, outputs: list[StepOutput], error: MoebiusError) -> None:
        """What was not delivered leaves a gap, so its requests end."""
        assert self._deliver is not None
        for request_id in {output.request_id: None for output in outputs}:
            self._engine.drop(request_id)
            self._unfinished.pop(request_id, None)
            with suppress(Exception):  # the log has the first of them
                self._deliver([failed(request_id, error)])

    def _stop(self) -> None:
        if self._closed:
            return
        self._closed = True
        for request_id in self._unfinished:
            self._engine.drop(request_id)
        error = EngineError("the engine has stopped")
        self._send([failed(request_id, error) for request_id in list(self._unfinished)])
        self._engine.close()
