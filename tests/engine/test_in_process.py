"""The engine on a thread of its own, beside what tests/engine/test_client.py says of all clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.collector import Collector
from engine.test_engine import ask, engine
from moebius.engine.client import StepOutput
from moebius.engine.in_process import InProcessClient
from moebius.errors import EngineError, EngineLostError


@pytest.fixture
def client(tiny_model: Path) -> InProcessClient:
    return InProcessClient(
        engine(tiny_model, max_queue_requests=40, max_num_seqs=4), step_deadline=5.0
    )


def test_an_idle_engine_sleeps(client: InProcessClient) -> None:
    client.start(Collector())
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    client.close(5)


class SlowInbox:
    """An inbox in which a request's arrival waits until `before` has happened."""

    def __init__(self, inbox: Any, before: Callable[[], object]) -> None:
        self._inbox = inbox
        self._before = before

    def put(self, item: Any) -> None:
        self._before()
        self._inbox.put(item)

    def get(self, *args: Any) -> Any:
        return self._inbox.get(*args)


def dies_when(released: threading.Event) -> Callable[[], list[StepOutput]]:
    def step() -> list[StepOutput]:
        released.wait(20)
        raise RuntimeError("the engine broke")

    return step


@pytest.mark.case("B8")
def test_a_submit_while_the_engine_dies_is_answered(
    client: InProcessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is found good, then the engine dies and looks into its inbox for the last time,
    then it is put there.

    Where both exclude each other the engine waits for it instead, and the hook for nothing.
    """
    released = threading.Event()
    monkeypatch.setattr(client._engine, "step", dies_when(released))
    collector = Collector()
    client.start(collector)
    client.submit(ask(client._engine, "first", [1, 2, 3]))
    while client._busy_since is None:
        time.sleep(0.001)

    def engine_dies() -> None:
        released.set()
        client._thread.join(1)

    monkeypatch.setattr(client, "_inbox", SlowInbox(client._inbox, engine_dies))
    client.submit(ask(client._engine, "late", [1, 2, 3]))
    collector.wait(lambda: collector.ended("first") and collector.ended("late"))
    assert [type(collector.outputs[id][-1].error) for id in ("first", "late")] == [
        EngineLostError
    ] * 2
    client._thread.join(5)
    with pytest.raises(EngineError, match="has stopped"):
        client.submit(ask(client._engine, "after", [1]))


@pytest.mark.case("B8")
def test_a_dead_engine_takes_nothing_and_keeps_nothing(
    client: InProcessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    released.set()
    monkeypatch.setattr(client._engine, "step", dies_when(released))
    collector = Collector()
    client.start(collector)
    client.submit(ask(client._engine, "victim", [1, 2, 3]))
    client._thread.join(20)
    assert collector.ended("victim")
    client.abort("victim")
    assert client._inbox.empty(), "nobody will ever read it"
    for again in (
        lambda: client.submit(ask(client._engine, "after", [1])),
        lambda: client.start(Collector()),
    ):
        with pytest.raises(EngineError, match="has stopped"):
            again()
    client.close(1)
    assert sum(output.finish_reason is not None for output in collector.outputs["victim"]) == 1
