"""The engine on its own thread: every submitted request ends exactly once, whatever happens to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.test_engine import engine, make, prompts, tokens
from moebius.engine.client import StepOutput
from moebius.engine.in_process import InProcessClient
from moebius.errors import EngineError, OverloadError
from moebius.schedule.request import FinishReason


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
    return InProcessClient(engine(tiny_model, max_queue_requests=40, max_num_seqs=4), step_deadline=5.0)


def test_requests_from_many_threads_all_end_once(client: InProcessClient) -> None:
    collector = Collector()
    client.start(collector)
    many = prompts(30, seed=2)

    def submit(part: int) -> None:
        for i in range(part, 30, 3):
            client.submit(make(client._engine, str(i), many[i]))

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
    long = [make(client._engine, f"long{i}", [1, 2, 3], max_tokens=400) for i in range(60)]
    for request in long:
        client.submit(request)
    client.start(collector)
    collector.wait(lambda: any(tokens(s) for s in collector.outputs.values()))
    refused = [s for steps in collector.outputs.values() for s in steps if isinstance(s.error, OverloadError)]
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
    client.submit(make(client._engine, "open", [1, 2, 3], max_tokens=500))
    collector.wait(lambda: "open" in collector.outputs)
    client.close(5)
    assert isinstance(collector.outputs["open"][-1].error, EngineError)
    assert not client.stats().ready
    with pytest.raises(EngineError, match="has stopped"):
        client.submit(make(client._engine, "after", [1]))


def test_a_dead_engine_ends_every_request_and_is_not_ready(
    client: InProcessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = Collector()

    def die(now: float) -> None:
        raise RuntimeError("scheduler broke")

    monkeypatch.setattr(client._engine.scheduler, "plan", die)
    client.start(collector)
    client.submit(make(client._engine, "victim", [1, 2, 3]))
    collector.wait(lambda: collector.ended("victim"))
    assert isinstance(collector.outputs["victim"][-1].error, EngineError)
    client._thread.join(5)
    assert not client.stats().ready


def test_a_stuck_step_is_not_ready(client: InProcessClient, monkeypatch: pytest.MonkeyPatch) -> None:
    client._step_deadline = 0.05
    release, honest = threading.Event(), client._engine.step

    def stuck() -> list[StepOutput]:
        release.wait(10)
        return honest()

    monkeypatch.setattr(client._engine, "step", stuck)
    collector = Collector()
    client.start(collector)
    assert client.stats().ready
    client.submit(make(client._engine, "slow", [1, 2, 3], max_tokens=1))
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
