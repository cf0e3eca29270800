"""A front's processes as a whole: none is left where one of them cannot begin."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moebius.cluster import engines
from moebius.cluster.engines import EngineProcesses
from moebius.engine import child, wire
from moebius.engine.client import StepOutput
from moebius.engine.config import EngineConfig
from moebius.errors import EngineError, OverloadError, WeightsError
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams


class Loading:
    """A process that loads until somebody ends it; `error` is what it fails with at once."""

    rows = None
    state = "the engine's process was ended by its test"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.killed = threading.Event()
        self.killed_in_time = False
        self.died: Callable[[Any], None] = lambda process: None

    def launch(self, message: wire.Launch, planned: object) -> Any:
        if self.error is not None:
            raise self.error
        self.killed_in_time = self.killed.wait(10)
        raise EngineError("it was killed before the model was loaded")

    def kill(self) -> None:
        self.killed.set()


class Hosts:
    """The second rank is on a host that does not come."""

    nodes = (1, 1)

    def name(self, rank: int) -> str:
        return f"rank {rank}"

    def start(self, rank: int) -> Any:
        raise EngineError("node 1 has not come back within 60 s")

    def launch(self, message: wire.Launch, rank: int, loaded: object) -> wire.Launch:
        return message


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Loading]:
    """Those that will be started early, in this order."""
    processes: list[Loading] = []
    left = iter(processes)
    monkeypatch.setattr(engines, "EngineProcess", lambda key=None: next(left))
    return processes


def launch(directory: Path, ranks: int) -> wire.Launch:
    return wire.Launch(str(directory), EngineConfig(ranks=ranks), bytes(32), frozenset())


def test_a_rank_whose_host_does_not_come_ends_those_that_load(
    tiny_model: Path, made: list[Loading]
) -> None:
    made.append(Loading())
    with (
        pytest.raises(EngineError, match="node 1 has not come back"),
        EngineProcesses(1) as processes,
    ):
        processes.launch(launch(tiny_model, 2), hosts=Hosts())  # type: ignore[arg-type]
    assert made[0].killed_in_time


def test_what_the_first_one_fails_with_is_the_error_of_all(
    tiny_model: Path, made: list[Loading]
) -> None:
    made += [Loading(), Loading(WeightsError("model.safetensors is short"))]
    with (
        pytest.raises(WeightsError, match=r"model\.safetensors is short"),
        EngineProcesses(2) as processes,
    ):
        processes.launch(launch(tiny_model, 2))
    assert made[0].killed_in_time and made[1].killed.is_set()


def test_processes_that_were_started_for_nothing_are_ended(made: list[Loading]) -> None:
    made += [Loading(), Loading()]
    with EngineProcesses(2):
        pass
    assert all(each.killed.is_set() for each in made)


def test_the_front_of_a_stopped_engine_refuses_what_has_no_room_there(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says by itself who has left its queue; stopped, it says nothing and refuses nothing."""
    monkeypatch.setattr(child, "_STOPPED_SECONDS", 60.0)  # else it would soon be another one
    config = EngineConfig(
        max_num_seqs=1, max_queue_requests=2, kv_cache_memory_bytes=2**20, max_model_len=512
    )
    message = wire.Launch(str(tiny_model), config, bytes(32), frozenset())
    heard: dict[str, StepOutput] = {}
    with EngineProcesses(1) as processes:
        client = processes.launch(message)
        client.start(lambda outputs: heard.update({each.request_id: each for each in outputs}))
        limits = client.info.limits

        def submit(id: str, max_tokens: int) -> None:
            params = SamplingParams(max_tokens=max_tokens)
            now = time.monotonic()
            client.submit(EngineRequest.create(id, [1, 2, 3], params, limits, arrival=now))

        for id in ("first", "second", "third"):
            submit(id, 3)
            until(lambda id=id: id in heard)  # each of them has left the queue
        (process,) = processes.processes
        os.kill(process.pid, signal.SIGSTOP)
        try:
            for id in ("a", "b"):
                assert client.refusal("") is None
                submit(id, 3)
            assert client.refusal("") is not None
            submit("c", 3)
            error = heard["c"].error
            assert isinstance(error, OverloadError) and "2 of 2 requests" in str(error)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        until(lambda: client.refusal("") is None)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
