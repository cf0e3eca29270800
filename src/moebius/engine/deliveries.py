"""What a client of an engine keeps of each request: that it was taken, and has not ended yet."""

import threading
from collections.abc import Callable
from contextlib import suppress

from moebius.engine.client import Deliver, StepOutput
from moebius.engine.faults import failed, failure
from moebius.errors import EngineError, MoebiusError
from moebius.request.engine_request import in_use

_STOPPED = "the engine has stopped"


class Deliveries:
    """Requests from when they are taken to when their last output was delivered, each exactly once.

    "Taken" and "stopped" exclude each other: whoever stops finds every request that `take` did not
    refuse.

    drop   ends a request in the engine, because its outputs reach nobody
    """

    def __init__(self, drop: Callable[[str], object]) -> None:
        self._drop = drop
        self._deliver: Deliver | None = None
        self._unfinished: dict[str, None] = {}
        # A finaliser may ask for something in the middle of anything here, on the same thread.
        self._lock = threading.RLock()
        self._cause: EngineError | None = None

    @property
    def stopped(self) -> bool:
        return self._cause is not None

    @property
    def started(self) -> bool:
        return self._deliver is not None

    def start(self, deliver: Deliver, begin: Callable[[], None] = lambda: None) -> None:
        """From now on deliver, and begin. EngineError the second time, and once stopped."""
        with self._lock:
            self._require_running()
            if self._deliver is not None:
                raise EngineError("the engine was started before; it is started once")
            self._deliver = deliver
            begin()

    def take(self, request_id: str, hand_over: Callable[[], None]) -> None:
        """Take a request, and hand it over. EngineError once stopped, RequestError for the id of an
        unfinished one."""
        with self._lock:
            self._require_running()
            if request_id in self._unfinished:
                raise in_use(request_id)
            self._unfinished[request_id] = None
            try:
                hand_over()
            except BaseException:
                del self._unfinished[request_id]
                raise

    def refuse(self, output: StepOutput) -> None:
        """Deliver the only output of a request that was not taken."""
        if self._deliver is not None:
            self._deliver([output])

    def while_running(self, act: Callable[[], None]) -> None:
        """Do it unless stopped."""
        with self._lock:
            if not self.stopped:
                act()

    def stop(self, cause: EngineError | None = None) -> None:
        """Take nothing from now on. The first cause, if any, is what `end_all` tells."""
        with self._lock:
            self._cause = self._cause or cause or EngineError(_STOPPED)

    def end_all(self) -> None:
        """End what is unfinished with the cause of the stop."""
        error = self._cause or EngineError(_STOPPED)
        self.send([failed(request_id, error) for request_id in list(self._unfinished)])

    def send(self, outputs: list[StepOutput]) -> None:
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
            self._drop(request_id)
            with self._lock:
                self._unfinished.pop(request_id, None)
            with suppress(Exception):  # the log has the first of them
                self._deliver([failed(request_id, error)])

    def _require_running(self) -> None:
        if self.stopped:
            raise EngineError(_STOPPED)
