"""The engine on its callers' threads: what is asked in the middle of a step waits for its end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from engine.test_engine import ask, engine, tokens
from moebius.engine.client import StepOutput
from moebius.engine.inline import InlineClient
from moebius.errors import ContextLengthError, EngineError, OverloadError, RequestError
from moebius.request.finish import FinishReason


class Heard:
    """A client and what it delivered, by request."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.engine = engine(directory, **options)
        self.client = InlineClient(self.engine)
        self.outputs: dict[str, list[StepOutput]] = {}
        self.client.start(self.deliver)

    def deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def run(self, wanted: Callable[[], bool] = lambda: True) -> None:
        while self.client.advance(wanted):
            pass


@pytest.fixture
def heard(tiny_model: Path) -> Heard:
    return Heard(tiny_model, max_num_seqs=2, max_queue_requests=3)


def test_nothing_is_computed_but_in_advance(heard: Heard, tiny_model: Path) -> None:
    one = heard.engine
    heard.client.submit(ask(one, "a", [1, 2, 3]))
    assert heard.client.stats().waiting == 1 and heard.outputs == {}
    assert heard.client.advance(lambda: True)
    assert len(tokens(heard.outputs["a"])) == 1
    assert heard.client.advance(lambda: False), "nobody wants a step: none is made"
    assert len(tokens(heard.outputs["a"])) == 1
    heard.run()
    assert heard.outputs["a"][-1].finish_reason is FinishReason.LENGTH
    assert not heard.client.advance(lambda: True), "no work is left"
    other = engine(tiny_model)
    other.take(ask(other, "a", [1, 2, 3]))
    expected = [output for _ in range(8) for output in other.step()]
    assert tokens(heard.outputs["a"]) == tokens(expected)


def test_refusals_and_aborts_are_outputs(heard: Heard) -> None:
    one = heard.engine
    for i in range(5):
        heard.client.submit(ask(one, str(i), [1, 2, 3]))
    assert [type(heard.outputs[i][-1].error) for i in ("3", "4")] == [OverloadError] * 2
    heard.client.abort("0")
    assert heard.outputs["0"][-1].finish_reason is FinishReason.ABORT
    heard.client.abort("never heard of")
    with pytest.raises(RequestError, match="'1' is in use"):
        heard.client.submit(ask(one, "1", [4]))
    heard.run()
    assert len(tokens(heard.outputs["1"])) == len(tokens(heard.outputs["2"])) == 8
    heard.client.submit(ask(one, "1", [4]))  # free again
    heard.run()
    assert one.scheduler.drained


def test_what_can_never_run_is_refused_by_an_output(tiny_model: Path) -> None:
    small = Heard(
        tiny_model, max_num_seqs=4, max_num_batched_tokens=8, enable_chunked_prefill=False
    )
    small.client.submit(ask(small.engine, "long", [1] * 20))
    assert isinstance(small.outputs["long"][-1].error, ContextLengthError)


def test_what_is_asked_in_the_middle_of_a_step_waits_for_its_end(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the garbage collector may do, on the very thread that computes."""
    one, honest = heard.engine, heard.engine.runner.execute
    during: list[int] = []

    def meddled(inputs: Any) -> Any:
        if not during:
            heard.client.abort("a")
            heard.client.submit(ask(one, "b", [7, 8]))
            during.append(len(one.scheduler.requests))
        return honest(inputs)

    monkeypatch.setattr(one.runner, "execute", meddled)
    heard.client.submit(ask(one, "a", [1, 2, 3]))
    heard.client.advance(lambda: True)
    assert during == [1], "neither had happened yet"
    assert heard.outputs["a"][-1].finish_reason is FinishReason.ABORT
    heard.run()
    assert len(tokens(heard.outputs["b"])) == 8 and one.scheduler.drained


def test_a_step_that_another_thread_has_made_is_not_made_again(heard: Heard) -> None:
    """Both wait for the engine; the second finds that what it waits for is there."""
    one = heard.engine
    heard.client.submit(ask(one, "a", [1, 2, 3], max_tokens=100))
    ready = threading.Barrier(2)

    def advance() -> None:
        ready.wait(10)
        heard.client.advance(lambda: "a" not in heard.outputs)

    threads = [threading.Thread(target=advance) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(tokens(heard.outputs["a"])) == 1
    assert one.stats().steps == 1


def test_nobody_who_asks_waits_for_another_threads_step(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that makes the step takes it; a reader waits for its own outputs, not for its
    turn."""
    one = heard.engine
    honest = one.runner.execute
    under_way, release, asked = threading.Event(), threading.Event(), threading.Event()

    def slow(inputs: Any) -> Any:
        under_way.set()
        assert release.wait(20)
        return honest(inputs)

    def ask_for_more() -> None:
        heard.client.submit(ask(one, "b", [4, 5, 6], max_tokens=1))
        heard.client.abort("a")
        assert heard.client.advance(lambda: False)
        asked.set()

    monkeypatch.setattr(one.runner, "execute", slow)
    heard.client.submit(ask(one, "a", [1, 2, 3]))
    stepping = threading.Thread(target=heard.client.advance, args=(lambda: True,))
    stepping.start()
    assert under_way.wait(20)
    asking = threading.Thread(target=ask_for_more)
    asking.start()
    in_time = asked.wait(10)
    release.set()
    stepping.join(20)
    asking.join(20)
    assert in_time and heard.outputs["a"][-1].finish_reason is FinishReason.ABORT
    heard.run()
    assert len(tokens(heard.outputs["b"])) == 1 and one.scheduler.drained


def test_a_closed_engine_ends_what_is_open_and_takes_no_more(heard: Heard) -> None:
    one = heard.engine
    heard.client.submit(ask(one, "open", [1, 2, 3], max_tokens=50))
    heard.client.advance(lambda: True)
    heard.client.close(5)
    last = heard.outputs["open"][-1]
    assert last.finish_reason is FinishReason.ERROR and "has stopped" in str(last.error)
    assert one.scheduler.drained
    for again in (
        lambda: heard.client.submit(ask(one, "after", [1])),
        lambda: heard.client.start(heard.deliver),
    ):
        with pytest.raises(EngineError, match="has stopped"):
            again()
    heard.client.close(5)
    assert sum(output.finish_reason is not None for output in heard.outputs["open"]) == 1


def test_what_a_reader_raises_over_ends(tiny_model: Path) -> None:
    one = engine(tiny_model)
    client = InlineClient(one)
    outputs: list[StepOutput] = []

    def deliver(step: list[StepOutput]) -> None:
        if len(outputs) == 2:
            outputs.append(StepOutput("raised"))
            raise ValueError("out of luck")
        outputs.extend(step)

    client.start(deliver)
    client.submit(ask(one, "a", [1, 2, 3]))
    while client.advance(lambda: True):
        pass
    assert isinstance(outputs[-1].error, EngineError) and "out of luck" not in str(
        outputs[-1].error
    )
    assert len(outputs) == 4 and one.scheduler.drained
    client.submit(ask(one, "a", [1, 2, 3]))
    while client.advance(lambda: True):
        pass
    assert len(tokens(outputs)) == 2 + 8


def test_it_is_started_once(heard: Heard) -> None:
    with pytest.raises(EngineError, match="started once"):
        heard.client.start(heard.deliver)


def test_requests_end_though_a_step_that_another_thread_makes_does_not(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine stops when the step is done; what it brings is for nobody any more."""
    one, honest = heard.engine, heard.engine.runner.execute
    under_way, release = threading.Event(), threading.Event()

    def slow(inputs: Any) -> Any:
        under_way.set()
        release.wait(20)
        return honest(inputs)

    monkeypatch.setattr(one.runner, "execute", slow)
    heard.client.submit(ask(one, "a", [1, 2, 3]))
    thread = threading.Thread(target=heard.client.advance, args=(lambda: True,))
    thread.start()
    assert under_way.wait(20)
    heard.client.close(0.01)
    assert "has stopped" in str(heard.outputs["a"][-1].error)
    assert not heard.client.stats().ready
    release.set()
    thread.join(20)
    assert len(heard.outputs["a"]) == 1, "it has ended: nothing comes after"
    assert one.scheduler.drained and not heard.client.advance(lambda: True)


def test_who_closes_it_in_the_middle_of_a_step_has_it_stopped_after_it(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a finaliser may, on the very thread that computes."""
    one, honest = heard.engine, heard.engine.runner.execute

    def closing(inputs: Any) -> Any:
        heard.client.close(5)
        assert len(one.scheduler.requests) == 1, "the step still needs it"
        return honest(inputs)

    monkeypatch.setattr(one.runner, "execute", closing)
    heard.client.submit(ask(one, "a", [1, 2, 3]))
    heard.client.advance(lambda: True)
    assert len(tokens(heard.outputs["a"])) == 1, "what the step has brought is not lost"
    assert "has stopped" in str(heard.outputs["a"][-1].error)
    assert one.scheduler.drained and not heard.client.advance(lambda: True)


class CallsAt:
    """Traces the client, and makes a call at its n-th line, on the thread that is there: as the
    garbage collector may."""

    def __init__(self, n: int, call: Callable[[], None]) -> None:
        self.n, self.lines, self._call = n, 0, call

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        return self.line if frame.f_code.co_filename.endswith("engine/inline.py") else None

    def line(self, frame: FrameType, event: str, arg: object) -> Any:
        self.lines += event == "line"
        if self.lines == self.n:
            self.lines += 1
            self._call()
        return self.line


def advanced(one: Heard, trace: CallsAt) -> int:
    """Make a step; how many lines of the client that took."""
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        one.client.advance(lambda: True)
    finally:
        sys.settrace(before)
    return trace.lines


@pytest.mark.parametrize("way", ["abort", "close"])
def test_what_a_finaliser_asks_at_any_line_is_done_when_the_step_is(
    tiny_model: Path, way: str
) -> None:
    """None has to wait for a next step, which may never come."""
    n = 0
    lines = 1
    while n <= lines:
        one = Heard(tiny_model, max_num_seqs=2)
        one.client.submit(ask(one.engine, "a", [1, 2, 3]))
        calls = {
            "abort": partial(one.client.abort, "a"),
            "close": partial(one.client.close, 1),
        }
        found = advanced(one, CallsAt(n, calls[way]))
        if n == 0:
            lines = found
        else:
            assert one.engine.scheduler.drained, f"at line {n}"
            reasons = [output.finish_reason is not None for output in one.outputs["a"]]
            assert reasons == [*[False] * (len(reasons) - 1), True], f"at line {n}"
        n += 1


def test_an_engine_that_fails_ends_every_request_once(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the step alone: what it has half written, others would go on from."""
    one = heard.engine
    for id in ("a", "b", "c"):
        heard.client.submit(ask(one, id, [1, 2, 3]))

    def breaks(now: float) -> None:
        raise RuntimeError("the scheduler broke")

    monkeypatch.setattr(one.scheduler, "plan", breaks)
    assert heard.client.stats().ready
    assert heard.client.advance(lambda: True)
    for id in ("a", "b", "c"):
        (last,) = heard.outputs[id]
        assert isinstance(last.error, EngineError) and last.error.error_id in str(last.error)
    assert one.scheduler.drained and not heard.client.stats().ready
    with pytest.raises(EngineError, match="has stopped"):
        heard.client.submit(ask(one, "d", [4]))


def test_what_is_asked_before_the_start_is_answered_after_it(tiny_model: Path) -> None:
    one = engine(tiny_model, max_num_seqs=2, max_queue_requests=3)
    client = InlineClient(one)
    for i in range(4):
        client.submit(ask(one, str(i), [1, 2, 3]))
    assert not client.stats().ready and not client.advance(lambda: True)
    outputs: list[StepOutput] = []
    client.start(outputs.extend)
    assert [type(output.error) for output in outputs] == [OverloadError] and client.stats().ready
    while client.advance(lambda: True):
        pass
    assert len(tokens(outputs)) == 3 * 8


def test_one_that_never_started_is_closed_with_what_it_has(tiny_model: Path) -> None:
    one = engine(tiny_model)
    client = InlineClient(one)
    client.submit(ask(one, "a", [1, 2, 3]))
    client.close(1)
    assert one.scheduler.drained
    with pytest.raises(EngineError, match="has stopped"):
        client.start(lambda outputs: None)
