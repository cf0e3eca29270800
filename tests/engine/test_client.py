"""What holds for every EngineClient: each submitted request ends exactly once, whatever happens to
the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.clients import KINDS, OF_ONE_ENGINE, Served
from engine.clients import served as served_as
from engine.collector import Collector
from engine.test_engine import ask, engine, prompts, tokens
from engine.test_in_process import dies_when
from moebius.engine.client import StepOutput
from moebius.errors import EngineError, OverloadError, RequestError
from moebius.request.finish import FinishReason


@pytest.fixture(params=KINDS)
def served(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Served]:
    one = engine(tiny_model, max_queue_requests=40, max_num_seqs=4)
    with served_as(one, request.param) as found:
        yield found


@pytest.fixture(params=OF_ONE_ENGINE)
def threaded(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Served]:
    """Clients whose engine has a thread, and no other one after it."""
    one = engine(tiny_model, max_queue_requests=40, max_num_seqs=4)
    with served_as(one, request.param) as found:
        yield found


def eventually(condition: Callable[[], bool]) -> None:
    """What an engine elsewhere says of itself may be some tenths of a second old."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_requests_from_many_threads_all_end_once(served: Served) -> None:
    collector = Collector()
    served.client.start(collector)
    many = prompts(30, seed=2)

    def submit(part: int) -> None:
        for i in range(part, 30, 3):
            served.client.submit(ask(served.engine, str(i), many[i]))

    threads = [threading.Thread(target=submit, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    collector.wait(lambda: all(collector.ended(str(i)) for i in range(30)))
    served.client.close(5)
    for steps in collector.outputs.values():
        assert len(tokens(steps)) == 8
        assert sum(s.finish_reason is not None for s in steps) == 1
    assert served.engine.scheduler.drained


def test_abort_and_refusal_come_back_as_outputs(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request gets far before it is aborted, however late this thread comes to that."""
    collector = Collector()
    honest = served.engine.step

    def step() -> list[StepOutput]:
        if served.engine.stats().generation_tokens == 0:
            return honest()
        time.sleep(0.001)
        return []

    monkeypatch.setattr(served.engine, "step", step)
    long = [ask(served.engine, f"long{i}", [1, 2, 3], max_tokens=400) for i in range(60)]
    for request in long:
        served.client.submit(request)
    served.client.start(collector)
    collector.wait(lambda: any(tokens(s) for s in collector.outputs.values()))

    def refused() -> list[OverloadError]:
        lasts = [steps[-1].error for steps in collector.outputs.values()]
        return [error for error in lasts if isinstance(error, OverloadError)]

    collector.wait(lambda: len(refused()) >= 10)
    assert all(error.retry_after > 0 for error in refused())
    for request in long:
        served.client.abort(request.id)
    served.client.abort("never heard of")
    collector.wait(lambda: all(collector.ended(r.id) for r in long))
    reasons = {steps[-1].finish_reason for steps in collector.outputs.values()}
    assert reasons <= {FinishReason.ABORT, FinishReason.ERROR}
    eventually(lambda: served.client.stats().ready and served.client.stats().running == 0)
    served.client.close(5)


def test_close_ends_what_is_unfinished_and_refuses_the_rest(served: Served) -> None:
    collector = Collector()
    served.client.start(collector)
    served.client.submit(ask(served.engine, "open", [1, 2, 3], max_tokens=500))
    collector.wait(lambda: "open" in collector.outputs)
    served.client.close(5)
    assert isinstance(collector.outputs["open"][-1].error, EngineError)
    assert not served.client.stats().ready
    with pytest.raises(EngineError, match="has stopped"):
        served.client.submit(ask(served.engine, "after", [1]))


def test_a_dead_engine_ends_every_request_and_is_not_ready(
    threaded: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the id that its clients are told an operator finds the cause in the log."""
    collector = Collector()

    def die(now: float) -> None:
        raise RuntimeError("scheduler broke")

    monkeypatch.setattr(threaded.engine.scheduler, "plan", die)
    threaded.client.start(collector)
    threaded.client.submit(ask(threaded.engine, "victim", [1, 2, 3]))
    collector.wait(lambda: collector.ended("victim"))
    error = collector.outputs["victim"][-1].error
    assert isinstance(error, EngineError) and error.error_id
    (record,) = [each for each in caplog.records if error.error_id in each.getMessage()]
    assert "RuntimeError" in record.getMessage()
    threaded.wait_until_stopped()
    eventually(lambda: not threaded.client.stats().ready)


def test_a_stuck_step_is_not_ready(threaded: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    threaded.runs._step_deadline = 0.05
    release, honest = threading.Event(), threaded.engine.step

    def stuck() -> list[StepOutput]:
        release.wait(10)
        return honest()

    monkeypatch.setattr(threaded.engine, "step", stuck)
    collector = Collector()
    threaded.client.start(collector)
    assert threaded.client.stats().ready
    threaded.client.submit(ask(threaded.engine, "slow", [1, 2, 3], max_tokens=1))
    eventually(lambda: not threaded.client.stats().ready)
    release.set()
    collector.wait(lambda: collector.ended("slow"))
    eventually(lambda: threaded.client.stats().ready)
    threaded.client.close(5)


@pytest.mark.case("B8")
def test_outputs_of_a_step_that_broke_the_engine_are_not_lost(
    threaded: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal is decided in the turn in which the step fails: its request ends, too."""
    released = threading.Event()
    released.set()
    monkeypatch.setattr(threaded.engine, "step", dies_when(released))
    collector = Collector()
    good = [
        ask(threaded.engine, f"good{i}", [1]) for i in range(41)
    ]  # one more than the queue takes
    for request in good:
        threaded.client.submit(request)
    threaded.client.start(collector)
    collector.wait(lambda: all(collector.ended(request.id) for request in good))
    assert all(len(steps) == 1 for steps in collector.outputs.values())


@pytest.mark.case("B8")
def test_requests_end_though_a_step_never_does(
    threaded: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, honest = threading.Event(), threaded.engine.step

    def stuck() -> list[StepOutput]:
        release.wait(20)
        return honest()

    monkeypatch.setattr(threaded.engine, "step", stuck)
    collector = Collector()
    threaded.client.start(collector)
    threaded.client.submit(ask(threaded.engine, "stuck", [1, 2, 3], max_tokens=1))
    while threaded.runs._busy_since is None:
        time.sleep(0.001)
    threaded.client.close(0.01)
    assert isinstance(collector.outputs["stuck"][-1].error, EngineError)
    release.set()
    threaded.wait_until_stopped()
    assert len(collector.outputs["stuck"]) == 1, "it has ended: nothing comes after"


@pytest.mark.case("B8")
def test_an_id_in_use_is_refused_without_harm_to_its_owner(served: Served) -> None:
    served.client.submit(ask(served.engine, "same", [1, 2, 3], max_tokens=3))
    with pytest.raises(RequestError, match="'same' is in use"):
        served.client.submit(ask(served.engine, "same", [4, 5, 6]))
    collector = Collector()
    served.client.start(collector)
    collector.wait(lambda: collector.ended("same"))
    assert len(tokens(collector.outputs["same"])) == 3
    served.client.submit(ask(served.engine, "same", [1, 2, 3], max_tokens=3))  # free again
    collector.wait(lambda: len(tokens(collector.outputs["same"])) == 6)
    served.client.close(5)


@pytest.mark.case("B8")
def test_an_engine_is_started_once_and_not_after_its_end(tiny_model: Path, served: Served) -> None:
    first = Collector()
    served.client.start(first)
    with pytest.raises(EngineError, match="started once"):
        served.client.start(Collector())
    served.client.submit(ask(served.engine, "a", [1, 2, 3], max_tokens=2))
    first.wait(lambda: first.ended("a"))  # the outputs still go to the first
    served.client.close(5)
    for again in (
        lambda: served.client.start(Collector()),
        lambda: served.client.submit(ask(served.engine, "b", [1])),
    ):
        with pytest.raises(EngineError, match="has stopped"):
            again()


def test_one_that_was_never_started_ends_too(served: Served) -> None:
    served.client.submit(ask(served.engine, "a", [1]))
    served.client.close(1)
    with pytest.raises(EngineError, match="has stopped"):
        served.client.start(Collector())
    assert not served.client.stats().ready


def test_what_cannot_be_delivered_ends_its_request_and_no_other(served: Served) -> None:
    """It leaves a gap."""
    collector = Collector()

    def deliver(outputs: list[StepOutput]) -> None:
        if any(output.request_id == "bad" and output.token_ids for output in outputs):
            raise ValueError("out of luck")
        collector(outputs)

    served.client.start(deliver)
    served.client.submit(ask(served.engine, "bad", [1, 2, 3], max_tokens=400))
    collector.wait(lambda: collector.ended("bad"))
    error = collector.outputs["bad"][-1].error
    assert isinstance(error, EngineError) and error.error_id is not None
    served.client.submit(ask(served.engine, "good", [1, 2, 3], max_tokens=3))
    collector.wait(lambda: collector.ended("good"))
    assert len(tokens(collector.outputs["good"])) == 3
    eventually(lambda: served.client.stats().running == 0)


def test_what_the_engine_knows_of_itself_is_told(served: Served) -> None:
    collector = Collector()
    served.client.start(collector)
    assert served.client.info == served.engine.info
    served.client.submit(ask(served.engine, "a", list(range(1, 41)), max_tokens=4))
    collector.wait(lambda: collector.ended("a"))
    loads = served.client.expert_loads()
    assert loads == served.engine.expert_loads() and loads.steps == 4
    eventually(lambda: served.client.stats().steps == 4)
    stats = served.client.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.step_tokens_sum) == (40, 4, 43)
    assert not served.client.advance(lambda: True), "it makes its steps itself"
