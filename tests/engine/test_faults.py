"""Whatever fails in code that serves one request, or only watches: the engine goes on and every
request ends.

A function raises at its n-th call, for the first few of those that four requests of a few tokens
come to, and some of the others.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from covering import rest
from engine.collector import Collector
from engine.test_engine import ask, engine, make, prompts, tokens
from moebius.engine import constraints, prompt_scores
from moebius.engine import engine as loop
from moebius.engine.engine import Engine
from moebius.engine.in_process import InProcessClient
from moebius.engine.outputs import Outputs
from moebius.engine.runner import Runner
from moebius.engine.trace import TraceWriter, replay
from moebius.errors import EngineError
from moebius.request.engine_request import EngineRequest
from moebius.schedule.scheduler import Scheduler
from moebius.schedule.waiting import WaitingQueue

pytestmark = pytest.mark.case("B6")


class RaisesAt:
    """Stands for a function and raises at its n-th call, counted from 1."""

    def __init__(self, honest: Callable[..., Any], n: int, error: BaseException) -> None:
        self.honest = honest
        self.n = n
        self.error = error
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.n:
            raise self.error
        return self.honest(*args, **kwargs)

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)


def work(one: Engine) -> list[EngineRequest]:
    """A greedy request, a drawn one, one with log-probabilities of its prompt, and one to be
    aborted."""
    greedy, drawn, scored, gone = prompts(4, seed=3, low=5, high=20)
    return [
        ask(one, "greedy", greedy, max_tokens=3),
        ask(one, "drawn", drawn, max_tokens=3, temperature=1.0, seed=1),
        ask(one, "scored", scored, max_tokens=2, prompt_logprobs=1, logprobs=1),
        ask(one, "gone", gone, max_tokens=400),
    ]


def serve(
    client: InProcessClient, collector: Collector, *, quiet: Callable[[], None] = lambda: None
) -> None:
    """Everything that is asked ends, once; then (after `quiet`) the engine serves a later request
    as ever."""
    client.start(collector)
    asked = work(client._engine)
    for request in asked:
        client.submit(request)
    collector.wait(lambda: "gone" in collector.outputs)
    client.abort("gone")
    collector.wait(lambda: all(collector.ended(request.id) for request in asked))
    for request in asked:
        assert (
            sum(output.finish_reason is not None for output in collector.outputs[request.id]) == 1
        )
    quiet()
    client.submit(ask(client._engine, "after", [1, 2, 3], max_tokens=2))
    collector.wait(lambda: collector.ended("after"))
    assert len(tokens(collector.outputs["after"])) == 2
    assert client.stats().ready
    client.close(5)


PER_REQUEST: list[tuple[Any, str]] = [
    (Engine, "add"),
    (Engine, "abort"),
    (Scheduler, "add"),
    (Scheduler, "_check_can_run"),
    (WaitingQueue, "check_room"),
    (WaitingQueue, "push"),
    (Engine, "_score"),
    (Outputs, "news"),
    (constraints, "sample"),
    (prompt_scores, "token_logprobs"),
    (loop, "build_batch"),
    (Runner, "execute"),
    (Runner, "logits"),
    (TraceWriter, "add"),
    (TraceWriter, "plan"),
    (TraceWriter, "update"),
    (TraceWriter, "abort"),
    (TraceWriter, "fail"),
    (TraceWriter, "close"),
]


@pytest.mark.parametrize("calls", [(1, 2, 3, 4, 6, 9, 12), rest(range(1, 13))], ids=len)
@pytest.mark.parametrize(("owner", "name"), PER_REQUEST, ids=[name for _, name in PER_REQUEST])
def test_an_error_at_the_nth_call_never_ends_the_engine(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    calls: Sequence[int],
) -> None:
    honest = getattr(owner, name)
    for n in calls:  # the aborted request makes as many calls as there is time for
        one = engine(tiny_model, trace=str(tmp_path / "trace.jsonl"))
        monkeypatch.setattr(owner, name, fault := RaisesAt(honest, n, ValueError("out of luck")))
        client, fired = InProcessClient(one, step_deadline=60.0), True

        def quiet(fault: RaisesAt = fault, n: int = n) -> None:
            nonlocal fired
            fired, fault.n = fault.calls >= n, 0

        serve(client, Collector(), quiet=quiet)
        monkeypatch.setattr(owner, name, honest)
        if not fired:
            break


SECRET = "the prompt that nobody may log"


@pytest.mark.parametrize(
    ("owner", "name"), [one for one in PER_REQUEST if one != (TraceWriter, "fail")], ids=str
)
def test_what_fails_is_logged_without_a_word_of_the_exception(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: Any,
    name: str,
) -> None:
    """Under the id that the client is told, with the places it came from."""
    one = engine(tiny_model, trace=str(tmp_path / "trace.jsonl"))
    fault = RaisesAt(getattr(owner, name), 1, ValueError(SECRET))
    monkeypatch.setattr(owner, name, fault)
    collector = Collector()
    with caplog.at_level(logging.DEBUG):
        serve(InProcessClient(one, step_deadline=60.0), collector)
    assert fault.calls and "ValueError" in caplog.text
    assert SECRET not in caplog.text and not any(record.exc_info for record in caplog.records)
    ended = [steps[-1].error for id, steps in collector.outputs.items() if id != "gone"]
    ids = {error.error_id for error in ended if isinstance(error, EngineError)}
    assert all(id is not None and id in caplog.text for id in ids)


def test_an_engine_thread_that_fails_is_logged_without_a_word_of_the_exception(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Scheduler, "plan", RaisesAt(Scheduler.plan, 1, ValueError(SECRET)))
    client, collector = InProcessClient(engine(tiny_model), step_deadline=60.0), Collector()
    client.start(collector)
    client.submit(ask(client._engine, "a", [1, 2, 3], max_tokens=2))
    collector.wait(lambda: collector.ended("a"))
    client.close(5)
    assert (
        "the engine thread failed" in caplog.text
        and "ValueError" in caplog.text
        and "in _turn" in caplog.text
    )
    assert SECRET not in caplog.text


def test_scoring_that_fails_ends_its_own_request_only(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Collector()
    serve(InProcessClient(engine(tiny_model), step_deadline=60.0), expected)
    monkeypatch.setattr(Engine, "_score", RaisesAt(Engine._score, 1, ValueError("out of luck")))
    collector = Collector()
    serve(InProcessClient(engine(tiny_model), step_deadline=60.0), collector)
    assert isinstance(collector.outputs["scored"][-1].error, EngineError)
    assert "out of luck" not in str(collector.outputs["scored"][-1].error)
    for id in ("greedy", "drawn"):
        assert tokens(collector.outputs[id]) == tokens(expected.outputs[id])


def test_a_reader_that_raises_loses_its_requests_and_no_others(tiny_model: Path) -> None:
    """What was not delivered leaves a gap in its requests' outputs, so these end; the next ones are
    served."""
    for n in range(1, 8):
        collector = Collector()
        fault = RaisesAt(collector, n, ValueError("out of luck"))
        client = InProcessClient(engine(tiny_model), step_deadline=60.0)
        client.start(fault)
        asked = work(client._engine)[:3]
        for request in asked:
            client.submit(request)
        collector.wait(
            lambda collector=collector, asked=asked: all(collector.ended(r.id) for r in asked)
        )
        for request in asked:
            steps = collector.outputs[request.id]
            whole = len(tokens(steps)) == request.max_tokens
            assert whole != isinstance(steps[-1].error, EngineError)
        client.submit(ask(client._engine, "after", [1, 2, 3], max_tokens=2))
        collector.wait(lambda collector=collector: collector.ended("after"))
        client.close(5)


def test_a_log_handler_that_raises_does_not_end_the_engine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    handler, logger = Broken(), logging.getLogger("moebius")
    logger.addHandler(handler)
    try:
        for owner, name in (
            (Scheduler, "add"),
            (loop, "build_batch"),
            (TraceWriter, "plan"),
            (Outputs, "news"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(
                    owner, name, RaisesAt(getattr(owner, name), 2, ValueError("out of luck"))
                )
                one = engine(tiny_model, trace=str(tmp_path / "trace.jsonl"))
                serve(InProcessClient(one, step_deadline=60.0), Collector())
    finally:
        logger.removeHandler(handler)


def test_a_full_disk_ends_the_trace_with_a_warning_and_serving_goes_on(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    expected, collector = Collector(), Collector()
    serve(InProcessClient(engine(tiny_model), step_deadline=60.0), expected)
    one = engine(tiny_model, trace="/dev/full")
    serve(InProcessClient(one, step_deadline=60.0), collector)
    for id in ("greedy", "drawn", "scored"):
        assert tokens(collector.outputs[id]) == tokens(expected.outputs[id])
    warnings = [
        record.getMessage() for record in caplog.records if "tracing stops" in record.getMessage()
    ]
    assert len(warnings) == 1 and "No space left on device" in warnings[0]


def test_what_was_traced_before_the_disk_was_full_can_be_replayed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.jsonl"
    monkeypatch.setattr(
        TraceWriter, "update", RaisesAt(TraceWriter.update, 3, OSError(errno.ENOSPC, "no space"))
    )
    serve(InProcessClient(engine(tiny_model, trace=str(path)), step_deadline=60.0), Collector())
    report = replay(path)
    assert report.difference is None and report.steps >= 3


def test_ctrl_c_in_a_step_leaves_an_engine_that_can_go_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = engine(tiny_model), engine(tiny_model)
    other.add(make(other, "a", [1, 2, 3]))
    expected = [token for _ in range(8) for step in other.step() for token in step.token_ids]
    monkeypatch.setattr(one.runner, "execute", RaisesAt(one.runner.execute, 3, KeyboardInterrupt()))
    one.add(make(one, "a", [1, 2, 3]))
    got: list[int] = []
    interrupts = 0
    while one.has_work:
        try:
            got += [token for step in one.step() for token in step.token_ids]
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1 and got == expected
