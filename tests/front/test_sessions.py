"""Several readers of one engine: each hears its own requests and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moebius.engine.client import Deliver, StepOutput
from moebius.errors import EngineError
from moebius.front.sessions import Session, Sessions
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams, ServingLimits


class Client:
    """Each step gives every request a token; the third ends it."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.aborted: list[str] = []
        self.refuse: Exception | None = None

    def start(self, deliver: Deliver) -> None:
        self.deliver = deliver

    def submit(self, request: EngineRequest) -> None:
        if self.refuse:
            raise self.refuse
        self.running[request.id] = 0

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if self.running.pop(request_id, None) is not None:
            self.deliver([StepOutput(request_id, finish_reason=FinishReason.ABORT)])

    def advance(self, wanted: Callable[[], bool]) -> bool:
        if not self.running:
            return False
        outputs = []
        for id in list(self.running):
            self.running[id] += 1
            last = self.running[id] == 3
            outputs.append(
                StepOutput(
                    id, (self.running[id],), finish_reason=FinishReason.LENGTH if last else None
                )
            )
            if last:
                del self.running[id]
        self.deliver(outputs)
        return True


def ask(id: str) -> EngineRequest:
    return EngineRequest.create(id, [1], SamplingParams(), ServingLimits(10, 100), arrival=0.0)


def heard(session: Session) -> list[tuple[str, tuple[int, ...]]]:
    return [(output.request_id, output.token_ids) for output in session.outputs()]


def test_what_one_readers_step_brings_another_waits_for_it() -> None:
    sessions = Sessions(Client())  # type: ignore[arg-type]
    with sessions.open() as first, sessions.open() as second:
        first.submit(ask("a"))
        second.submit(ask("b"))
        assert heard(first) == [("a", (1,))]
        assert heard(first) == [("a", (2,))]
        assert [heard(second) for _ in range(3)] == [[("b", (1,))], [("b", (2,))], [("b", (3,))]]
        assert heard(first) == [("a", (3,))]
        assert heard(first) == [], "no work is left"


def test_a_reader_that_leaves_aborts_its_own_and_hears_no_more() -> None:
    client = Client()
    sessions = Sessions(client)  # type: ignore[arg-type]
    kept = sessions.open()
    kept.submit(ask("kept"))
    with sessions.open() as left:
        left.submit(ask("done"))
        for _ in range(3):
            left.outputs()
        left.submit(ask("gone"))
    assert client.aborted == ["gone"]
    assert left.inbox.empty() and [id for id, _ in heard(kept)] == ["kept"]


def test_a_request_that_the_client_refuses_has_no_owner() -> None:
    client = Client()
    client.refuse = EngineError("the engine has stopped")
    sessions = Sessions(client)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="has stopped"), sessions.open() as session:
        session.submit(ask("a"))
    assert client.aborted == []
