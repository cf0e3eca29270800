"""An engine's process that is watched: when it counts as stuck, and how its loss is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

import pytest

from moebius.cluster import launched
from moebius.cluster.launched import LaunchedEngine
from moebius.engine import wire
from moebius.engine.client import EngineStats
from moebius.engine.config import EngineConfig
from moebius.errors import MoebiusError

LAUNCH = wire.Launch("/a/model", EngineConfig(), bytes(32), frozenset())


class Engine:
    """A process and its client at once; `ready` is what it says each time that it is looked at."""

    rows = None
    state = "the engine's process was ended by its test"
    silent_for = 3.5

    def __init__(self, ready: Iterator[bool]) -> None:
        self.looks = 0
        self.ended = threading.Event()
        self.died: Callable[[Any], None] = lambda process: None
        self._ready = ready

    def launch(self, message: wire.Launch, planned: object) -> Engine:
        return self

    def start(self, deliver: object) -> None:
        pass

    def stats(self) -> EngineStats:
        self.looks += 1
        return EngineStats(ready=next(self._ready))

    def end(self) -> None:
        self.died(self)
        self.ended.set()

    def close(self, timeout: float) -> None:
        self.ended.set()


def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[MoebiusError]:
    """What its loss is told with. A second of patience are four looks."""
    monkeypatch.setattr(launched, "_LOOK_SECONDS", 0.25 / 64)
    monkeypatch.setattr(launched, "_PATIENCE_SECONDS", 1.0 / 64)
    told: list[MoebiusError] = []
    one = LaunchedEngine(LAUNCH, told.append, process=engine)  # type: ignore[arg-type]
    one.start(lambda outputs: None)
    return told


def test_one_that_stays_stuck_is_ended_and_its_loss_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(repeat(False))
    told = watched(engine, monkeypatch)
    assert engine.ended.wait(20)
    assert engine.looks == 4
    (error,) = told
    assert "it was stuck and is ended: nothing was heard of it for 3.5 s" in str(error)


def test_one_that_comes_back_in_time_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hiccups = [False, False, False, True] * 5
    engine = Engine(chain(hiccups, repeat(False)))
    told = watched(engine, monkeypatch)
    assert engine.ended.wait(20)
    assert engine.looks == len(hiccups) + 4 and len(told) == 1


def test_one_that_ends_by_itself_is_lost_for_the_reason_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(repeat(True))
    told = watched(engine, monkeypatch)
    engine.died(engine)
    (error,) = told
    assert str(error) == "the engine's process was ended by its test"
    assert not engine.ended.is_set()
