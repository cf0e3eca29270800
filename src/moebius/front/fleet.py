"""Engines by number, each started again when it is lost, as often as that helps."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from typing import Protocol

from moebius.engine.client import (
    EngineClient,
    EngineInfo,
    EngineStats,
    ExpertLoads,
    StepOutput,
)
from moebius.engine.faults import failure, say
from moebius.errors import ConfigError, EngineError, MoebiusError
from moebius.front.restarts import RestartBudget
from moebius.front.sums import add_loads, add_stats, counters_of, totals_of

log = logging.getLogger(__name__)

Lost = Callable[[MoebiusError], None]
Launch = Callable[[int, Lost], EngineClient]
"""Starts engine number i and returns once it is loaded, or raises MoebiusError. The engine calls
`Lost` once, from any thread and after its last output, when it cannot go on: its unfinished
requests get no further output."""

_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 8.0


class Owner(Protocol):
    """Who hears of a fleet. The first two are called under its lock, and must call nobody."""

    def came(self, number: int) -> None:
        """Engine `number` is there."""

    def went(self, number: int) -> None:
        """Engine `number` is lost, and says nothing more."""

    def changed(self) -> None:
        """One of both has happened; without the lock."""

    def heard(self, number: int, life: int, outputs: list[StepOutput]) -> None:
        """This life of an engine, see `is_now`, says this; without the lock."""

    def given_up(self, reason: EngineError) -> None:
        """No engine is started any more; without the lock."""


class Fleet:
    """`count` engines, all loaded when this returns. Raises what `launch` raises.

    lock   guards which engines there are; its owner's other state, too
    """

    def __init__(
        self, launch: Launch, count: int, budget: RestartBudget, lock: threading.Lock
    ) -> None:
        self.restarts = 0
        self._launch = launch
        self._budget = budget
        self._lock = lock
        self._owner: Owner | None = None
        self._ended = threading.Event()
        self._engines: list[EngineClient | None] = [None] * count
        # How many engines a number had before this one: what an earlier one says is old.
        self._lives = [0] * count
        # When it came, on the monotonic clock.
        self._since = [0.0] * count
        self._early_loss: MoebiusError | None = None
        # What those that are gone have counted.
        self._past = EngineStats()
        self._past_loads = ExpertLoads()
        self._loading = True
        self._launch_all()

    @property
    def ended(self) -> bool:
        """It was closed, or given up."""
        return self._ended.is_set()

    @property
    def whole(self) -> bool:
        return all(engine is not None for engine in self._engines)

    def __iter__(self) -> Iterator[EngineClient]:
        return (engine for engine in self._engines if engine is not None)

    def __getitem__(self, number: int) -> EngineClient:
        engine = self._engines[number]
        assert engine is not None, "a request's engine is there, or the request waits"
        return engine

    def is_now(self, number: int, life: int) -> bool:
        """Whether this life of an engine is the present one; under the lock."""
        return self._lives[number] == life

    def start(self, owner: Owner) -> None:
        """Start them, under the lock."""
        self._owner = owner
        for number, engine in enumerate(self._engines):
            if engine is not None:
                self._begin(number, engine)

    def stats(self) -> EngineStats:
        """All engines' together, under the lock; counters go on where lost engines' ended."""
        return add_stats([engine.stats() for engine in self], self._past)

    def expert_loads(self) -> ExpertLoads:
        """All engines' together, without the lock; totals go on where lost engines' ended."""
        with self._lock:
            engines = list(self)
            past = self._past_loads
        return add_loads([*(engine.expert_loads() for engine in engines), past])

    def close(self, timeout: float) -> None:
        """Stop all engines. None is started any more."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._ended.set()
            engines = list(self)
        for engine in engines:
            engine.close(max(deadline - time.monotonic(), 0.0))

    def _launch_all(self) -> None:
        """Start all engines at the same time. Where one does not come, the others go."""
        count = len(self._engines)
        failures: list[BaseException] = []
        pool = ThreadPoolExecutor(count)
        starts = [
            pool.submit(self._launch, number, partial(self._lose, number, 0))
            for number in range(count)
        ]
        try:
            for start in as_completed(starts):
                error = start.exception()
                if error is not None:
                    failures.append(error)
        finally:
            pool.shutdown(wait=False)  # Ctrl-C waits for no model to be loaded
        for number, start in enumerate(starts):
            if start.exception() is None:
                self._engines[number] = start.result()
                self._since[number] = time.monotonic()
        with self._lock:
            self._loading = False
            if self._early_loss is not None:
                failures.append(self._early_loss)
        if failures:
            self.close(0.0)
            raise failures[0]
        self.info: EngineInfo = self[0].info

    def _begin(self, number: int, engine: EngineClient) -> None:
        """Let an engine work; under the lock."""
        owner = self._owner
        if owner is None:
            return
        with suppress(EngineError):  # it is lost already, which is told as soon as the lock is free
            engine.start(partial(owner.heard, number, self._lives[number]))
        owner.came(number)

    def _lose(self, number: int, life: int, reason: MoebiusError) -> None:
        """An engine is gone. A thread starts the next one."""
        with self._lock:
            if self._loading:
                self._early_loss = reason
            if self._loading or self.ended or self._lives[number] != life:
                return
            self._lives[number] += 1
            old = self._engines[number]
            self._engines[number] = None
            lasted = 0.0 if old is None else time.monotonic() - self._since[number]
            if old is not None:
                self._past = add_stats([counters_of(old.stats())], self._past)
                self._past_loads = add_loads([self._past_loads, totals_of(old.expert_loads())])
                if self._owner is not None:
                    self._owner.went(number)
        say(log.error, "engine %d is lost: %s", number, reason)
        if self._owner is not None:
            self._owner.changed()
        threading.Thread(
            target=self._restart,
            args=(number, life + 1, old, lasted, reason),
            name="restart",
            daemon=True,
        ).start()

    def _restart(
        self,
        number: int,
        life: int,
        old: EngineClient | None,
        lasted: float,
        reason: MoebiusError,
    ) -> None:
        """Start an engine again, as often as the budget allows."""
        if old is not None:
            with suppress(Exception):  # it is gone; what it leaves is not worth more
                old.close(0.0)
        pause = 0.0
        while not self._ended.wait(pause):
            pause = min(max(2 * pause, _PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
            with self._lock:
                allowed = self._budget.spend(lasted)
            if not allowed:
                self._give_up(reason)
                return
            lasted = 0.0
            try:
                engine = self._launch(number, partial(self._lose, number, life))
                self._check_same(engine)
            except MoebiusError as error:
                reason = error
            except Exception as error:
                reason = failure("starting an engine", error)
            else:
                self._welcome(number, life, engine)
                return
            say(log.error, "engine %d does not start: %s", number, reason)

    def _check_same(self, engine: EngineClient) -> None:
        """ConfigError where an engine would answer otherwise than the lost one."""
        for name in ("fingerprint", "limits", "eos_ids", "block_size", "prefix_caching"):
            now = getattr(engine.info, name)
            before = getattr(self.info, name)
            if now != before:
                engine.close(0.0)
                raise ConfigError(
                    f"the engine that was started again has another {name}, {now}, than the one "
                    f"before, {before}; the model's files or this machine have changed meanwhile"
                )

    def _welcome(self, number: int, life: int, engine: EngineClient) -> None:
        """A new engine takes the place of a lost one, unless it is lost, or not wanted, already."""
        with self._lock:
            wanted = not self.ended and self._lives[number] == life
            if wanted:
                self._engines[number] = engine
                self._since[number] = time.monotonic()
                self.restarts += 1
                self._begin(number, engine)
        if not wanted:
            engine.close(0.0)
            return
        say(log.warning, "engine %d runs again", number)
        if self._owner is not None:
            self._owner.changed()

    def _give_up(self, reason: MoebiusError) -> None:
        with self._lock:
            if self.ended:
                return
            self._ended.set()
        error = EngineError(
            f"engines were started {self._budget.most} times in a row and finished no request; the "
            f"last one ended so: {reason}"
        )
        say(log.critical, "%s", error)
        if self._owner is not None:
            self._owner.given_up(error)
