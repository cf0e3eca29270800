"""A front's processes as a whole: none is left where one of them cannot begin."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moebius.cluster import engines
from moebius.cluster.engines import EngineProcesses
from moebius.engine import wire
from moebius.engine.config import EngineConfig
from moebius.errors import EngineError, WeightsError


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
