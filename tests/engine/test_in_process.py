"""The engine on its own thread: every submitted request ends exactly once, whatever happens to
it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.test_engine import ask, engine, prompts, tokens
from moebius.engine.client import StepOutput
from moebius.engine.in_process import InProcessClient
from moebius.errors import EngineError, OverloadError, RequestError
from moebius.request.finish import FinishReason


class Collector:
    def __init__(self) -> None:
        self.outputs: dict[str, list[StepOutput]] = {}
        self.changed = threading.Condition()

    def __call__(self, outputs: list[StepOutput]) -> None:
        with self.changed:
            for output in outputs:
                self.outputs.setdefault(output.request_id, []).append(output)
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout=20)

    def ended(self, id: str) -> bool:
        return bool(self.outputs.get(id)) and self.outputs[id][-1].finish_reason is not None


@pytest.fixture
def client(tiny_model: Path) -> InProcessClient:
    return InProcessClient(
        engine(tiny_model, max_queue_requests=40, max_num_seqs=4), step_deadline=5.0
    )


def test_requests_from_many_threads_all_end_once(client: InProcessClient) -> None:
    collector = Collector()
    client.start(collector)
    many = prompts(30, seed=2)

    def submit(part: int) -> None:
        for i in range(part, 30, 3):
            client.submit(ask(client._engine, str(i), many[i]))

    threads = [threading.Thread(target=submit, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    collector.wait(lambda: all(collector.ended(str(i)) for i in range(30)))
    client.close(5)
    for steps in collector.outputs.values():
        assert len(tokens(steps)) == 8
        assert sum(s.finish_reason is not None for s in steps) == 1
    assert client._engine.scheduler.drained


def test_abort_and_refusal_come_back_as_outputs(client: InProcessClient) -> None:
    collector = Collector()
    long = [ask(client._engine, f"long{i}", [1, 2, 3], max_tokens=400) for i in range(60)]
    for request in long:
        client.submit(request)
    client.start(collector)
    collector.wait(lambda: any(tokens(s) for s in collector.outputs.values()))
    refused = [
        s
        for steps in collector.outputs.values()
        for s in steps
        if isinstance(s.error, OverloadError)
    ]
    assert len(refused) >= 10 and refused[0].error.retry_after > 0  # type: ignore[union-attr]
    for request in long:
        client.abort(request.id)
    client.abort("never heard of")
    collector.wait(lambda: all(collector.ended(r.id) for r in long))
    reasons = {steps[-1].finish_reason for steps in collector.outputs.values()}
    assert reasons <= {FinishReason.ABORT, FinishReason.ERROR}
    assert client.stats().ready and client.stats().running == 0
    client.close(5)


def test_close_ends_what_is_unfinished_and_refuses_the_rest(client: InProcessClient) -> None:
    collector = Collector()
    client.start(collector)
    client.submit(ask(client._engine, "open", [1, 2, 3], max_tokens=500))
    collector.wait(lambda: "open" in collector.outputs)
    client.close(5)
    assert isinstance(collector.outputs["open"][-1].error, EngineError)
    assert not client.stats().ready
    with pytest.raises(EngineError, match="has stopped"):
        client.submit(ask(client._engine, "after", [1]))


def test_a_dead_engine_ends_every_request_and_is_not_ready(
    client: InProcessClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the id that its clients are told an operator finds the cause in the log."""
    collector = Collector()

    def die(now: float) -> None:
        raise RuntimeError("scheduler broke")

    monkeypatch.setattr(client._engine.scheduler, "plan", die)
    client.start(collector)
    client.submit(ask(client._engine, "victim", [1, 2, 3]))
    collector.wait(lambda: collector.ended("victim"))
    error = collector.outputs["victim"][-1].error
    assert isinstance(error, EngineError) and error.error_id
    (record,) = [each for each in caplog.records if error.error_id in each.getMessage()]
    assert "RuntimeError" in record.getMessage()
    client._thread.join(5)
    assert not client.stats().ready


def test_a_stuck_step_is_not_ready(
    client: InProcessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client._step_deadline = 0.05
    release, honest = threading.Event(), client._engine.step

    def stuck() -> list[StepOutput]:
        release.wait(10)
        return honest()

    monkeypatch.setattr(client._engine, "step", stuck)
    collector = Collector()
    client.start(collector)
    assert client.stats().ready
    client.submit(ask(client._engine, "slow", [1, 2, 3], max_tokens=1))
    time.sleep(0.3)
    assert not client.stats().ready
    release.set()
    collector.wait(lambda: collector.ended("slow"))
    assert client.stats().ready
    client.close(5)


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
    assert [type(collector.outputs[id][-1].error) for id in ("first", "late")] == [EngineError] * 2
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


@pytest.mark.case("B8")
def test_outputs_of_a_step_that_broke_the_engine_are_not_lost(
    client: InProcessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal is decided in the turn in which the step fails: its request ends, too."""
    released = threading.Event()
    released.set()
    monkeypatch.setattr(client._engine, "step", dies_when(released))
    collector = Collector()
    good = [
        ask(client._engine, f"good{i}", [1]) for i in range(41)
    ]  # one more than the queue takes
    for request in good:
        client.submit(request)
    client.start(collector)
    collector.wait(lambda: all(collector.ended(request.id) for request in good))
    assert all(len(steps) == 1 for steps in collector.outputs.values())


@pytest.mark.case("B8")
def test_an_engine_is_started_once_and_not_after_its_end(
    tiny_model: Path, client: InProcessClient
) -> None:
    first = Collector()
    client.start(first)
    with pytest.raises(EngineError, match="started once"):
        client.start(Collector())
    client.submit(ask(client._engine, "a", [1, 2, 3], max_tokens=2))
    first.wait(lambda: first.ended("a"))  # the outputs still go to the first
    client.close(5)
    never = InProcessClient(engine(tiny_model), step_deadline=5.0)
    never.close(1)
    with pytest.raises(EngineError, match="has stopped"):
        never.start(Collector())
    with pytest.raises(EngineError, match="has stopped"):
        never.submit(ask(never._engine, "b", [1]))


@pytest.mark.case("B8")
def test_requests_end_though_a_step_never_does(
    client: InProcessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, honest = threading.Event(), client._engine.step

    def stuck() -> list[StepOutput]:
        release.wait(20)
        return honest()

    monkeypatch.setattr(client._engine, "step", stuck)
    collector = Collector()
    client.start(collector)
    client.submit(ask(client._engine, "stuck", [1, 2, 3], max_tokens=1))
    while client._busy_since is None:
        time.sleep(0.001)
    client.close(0.01)
    assert isinstance(collector.outputs["stuck"][-1].error, EngineError)
    release.set()
    client._thread.join(20)
    assert len(collector.outputs["stuck"]) == 1, "it has ended: nothing comes after"


@pytest.mark.case("B8")
def test_an_id_in_use_is_refused_without_harm_to_its_owner(client: InProcessClient) -> None:
    client.submit(ask(client._engine, "same", [1, 2, 3], max_tokens=3))
    with pytest.raises(RequestError, match="'same' is in use"):
        client.submit(ask(client._engine, "same", [4, 5, 6]))
    collector = Collector()
    client.start(collector)
    collector.wait(lambda: collector.ended("same"))
    assert len(tokens(collector.outputs["same"])) == 3
    client.submit(ask(client._engine, "same", [1, 2, 3], max_tokens=3))  # free again
    collector.wait(lambda: len(tokens(collector.outputs["same"])) == 6)
    client.close(5)
