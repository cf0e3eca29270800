"""One engine for several readers on their own threads: whoever needs an output makes a step, and
each step's outputs go to whoever asked for them."""

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from moebius.engine.client import StepOutput
from moebius.engine.engine import Engine
from moebius.engine.interrupts import Uninterrupted
from moebius.schedule.request import Request


class Sessions:
    """Shares `engine` among sessions, which may be open at the same time and be read in any order.

    An iterator may be closed by Python's garbage collector in the middle of anything, a step among
    it. So aborts are noted, and carried out when nothing else uses the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._owners: dict[str, Session] = {}
        self._lock = threading.RLock()
        self._busy = False
        self._to_abort: deque[str] = deque()

    def open(self) -> "Session":
        return Session(self)

    def add(self, request: Request, owner: "Session") -> None:
        def queue() -> None:
            self.engine.add(request)
            self._owners[request.id] = owner

        self._use(queue)

    def abort(self, request_id: str) -> None:
        """End a request; its owner hears no more of it."""
        if self._owners.pop(request_id, None) is None:
            return
        self._to_abort.append(request_id)
        with self._lock:
            if not self._busy:
                self._use(lambda: None)

    def outputs_for(self, session: "Session") -> list[StepOutput]:
        """What waits for the session; where nothing does, what a step brings."""
        with self._lock:
            if not session.inbox and self.engine.has_work:
                self._use(self._step)
            outputs, session.inbox = session.inbox, []
        return outputs

    def _step(self) -> None:
        for output in self.engine.step():
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue
            owner.inbox.append(output)
            if output.finish_reason is not None:
                self._owners.pop(output.request_id, None)

    def _use(self, call: Callable[[], None]) -> None:
        with self._lock:
            assert not self._busy, "the engine is in use on this thread"
            self._busy = True
            try:
                call()
            finally:
                while self._to_abort:
                    self.engine.abort(self._to_abort.popleft())
                self._busy = False


class Session:
    """One reader's requests. `with` aborts those that are unfinished on the way out.

    Ctrl-C waits until a call here is done, which is a step at most: then the engine is whole for
    whoever goes on.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._requests: set[str] = set()
        self.inbox: list[StepOutput] = []

    def add(self, request: Request) -> None:
        """Queue a request. Raises what Engine.add raises."""
        with Uninterrupted():
            self._sessions.add(request, self)
            self._requests.add(request.id)

    def abort(self, request_id: str) -> None:
        """End a request; what it has waiting here is still handed out."""
        with Uninterrupted():
            self._requests.discard(request_id)
            self._sessions.abort(request_id)

    def outputs(self) -> list[StepOutput]:
        """The next outputs of this session's requests; empty where a step brought it none, or where
        no work is left."""
        with Uninterrupted():
            outputs = self._sessions.outputs_for(self)
            self._requests.difference_update(
                o.request_id for o in outputs if o.finish_reason is not None
            )
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with Uninterrupted():
            for request_id in list(self._requests):
                self.abort(request_id)
