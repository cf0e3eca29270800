"""One engine for several readers: each gets the outputs of its own requests."""

import queue
from contextlib import suppress
from types import TracebackType
from typing import Self

from moebius.engine.client import EngineClient, StepOutput
from moebius.engine.interrupts import Uninterrupted
from moebius.request.engine_request import EngineRequest

_WAIT_SECONDS = 0.1


class Sessions:
    """Shares an engine, which it starts, among sessions that may be open at the same time."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self._owners: dict[str, Session] = {}
        client.start(self._deliver)

    def open(self) -> "Session":
        return Session(self)

    def submit(self, request: EngineRequest, owner: "Session") -> None:
        self._owners[request.id] = owner
        try:
            self.client.submit(request)
        except BaseException:
            self._owners.pop(request.id, None)
            raise

    def abort(self, request_id: str) -> None:
        """End a request; its owner hears no more of it."""
        if self._owners.pop(request_id, None) is not None:
            self.client.abort(request_id)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        found: dict[Session, list[StepOutput]] = {}
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is not None:
                found.setdefault(owner, []).append(output)
                if output.finish_reason is not None:
                    self._owners.pop(output.request_id, None)
        for owner, its_own in found.items():
            owner.inbox.put(its_own)


class Session:
    """One reader's requests. `with` aborts those that are unfinished on the way out."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._requests: set[str] = set()
        # A queue that a finaliser may use in the middle of anything.
        self.inbox: queue.SimpleQueue[list[StepOutput]] = queue.SimpleQueue()

    def submit(self, request: EngineRequest) -> None:
        """Hand over a request; every outcome of it is among the outputs.

        Ctrl-C waits until that is done: else it may be the engine's or not, and nobody's to abort.
        """
        with Uninterrupted():
            self._requests.add(request.id)
            self._sessions.submit(request, self)

    def abort(self, request_id: str) -> None:
        """End a request; what it has waiting here is still handed out."""
        self._requests.discard(request_id)
        self._sessions.abort(request_id)

    def outputs(self) -> list[StepOutput]:
        """The next outputs of this session's requests.

        Empty where a step brought it none, where no work is left, or, of an engine that runs
        elsewhere, after a moment's silence.
        """
        with suppress(queue.Empty):
            return self._heard(self.inbox.get_nowait())
        advanced = self._sessions.client.advance(self.inbox.empty)
        with suppress(queue.Empty):
            return self._heard(self.inbox.get(not advanced, _WAIT_SECONDS))
        return []

    def _heard(self, outputs: list[StepOutput]) -> list[StepOutput]:
        ended = (output.request_id for output in outputs if output.finish_reason is not None)
        self._requests.difference_update(ended)
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with Uninterrupted():
            for request_id in list(self._requests):
                self.abort(request_id)
