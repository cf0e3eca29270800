"""What a front refuses by itself is what its engine would have refused: no more, and no less."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import count

import pytest

from front.mortal_engine import MortalEngine, ask
from front.scheduled_engine import LIMITS, ScheduledEngine
from moebius.engine.client import StepOutput
from moebius.errors import EngineError, MoebiusError, OverloadError
from moebius.front.assignment import Room
from moebius.front.replay import ReplayClient
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.request.share import Share
from schedule.making import make_scheduler

ACCOUNTS = ("", "crowd", "crowd", "crowd", "one", "two")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0002)


@dataclass(frozen=True)
class Sizes:
    """Of a random engine."""

    seats: int
    blocks: int
    queue: int
    tokens: int


class Pair:
    """A front and an engine in step: whatever the front has sent has come, and so has whatever the
    engine has said."""

    def __init__(self, seed: int, engines: int = 1) -> None:
        self.rng = random.Random(seed)
        sizes = Sizes(
            seats=self.rng.randint(2, 5),
            blocks=self.rng.choice([11, 11, 24]),  # with 11 there is preemption
            queue=self.rng.randint(1, 12),
            tokens=self.rng.choice([40, 120, 10**6]),
        )
        self.sizes = sizes
        self.now = 100.0
        self.engines: list[ScheduledEngine] = []
        self.ended: dict[str, StepOutput] = {}
        self.unfinished: set[str] = set()
        self.told: dict[str, OverloadError] = {}
        self.preemptions = 0
        self.expired = 0
        self.ids = (f"r{number:05}" for number in count())
        room = Room(sizes.queue, sizes.tokens)
        self.client = ReplayClient(self.launch, engines, room=room)
        self.client.start(self.hear)

    def launch(self, number: int, lost: Callable[[MoebiusError], None]) -> ScheduledEngine:
        scheduler = make_scheduler(
            blocks=self.sizes.blocks,
            seqs=self.sizes.seats,
            budget=16,
            length=40,
            max_queue_requests=self.sizes.queue,
            max_queue_tokens=self.sizes.tokens,
        )
        self.engines.append(ScheduledEngine(number, lost, scheduler, self.rng))
        return self.engines[-1]

    def hear(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            assert output.for_client, "clients are not told of places"
            if output.finish_reason is not None:
                self.ended[output.request_id] = output
                self.unfinished.discard(output.request_id)

    def request(self, short: bool = False) -> EngineRequest:
        """short: of one token, and nobody's."""
        account = "" if short else self.rng.choice(ACCOUNTS)
        length = 1 if short else self.rng.choice([1, 2, 5, 11])
        return EngineRequest.create(
            next(self.ids),
            [self.rng.randrange(1000) for _ in range(length)],
            SamplingParams(max_tokens=self.rng.choice([1, 12, 25, 25])),
            LIMITS,
            arrival=self.now,
            priority=self.rng.choice([0, 0, 0, -5, 5]),
            deadline=self.now + self.rng.choice([1.0, 3.0, *[1000.0] * 8]),
            share=Share(account, self.rng.choice([1.0, 3.0]) if account else 1.0),
        )

    def submit(self, request: EngineRequest) -> None:
        """Where the front refuses, the engine is given the request all the same, as a probe."""
        (engine,) = self.engines
        early = self.client.refusal(request.share.account)
        self.unfinished.add(request.id)
        self.client.submit(request)
        if request.id not in self.ended:
            assert early is None, "what is refused unread is refused when it is read"
            assert engine.inbox[-1] is request
            return
        error = self.ended[request.id].error
        assert isinstance(error, OverloadError)
        self.told[request.id] = error
        engine.probes.add(request.id)
        engine.inbox.append(request)

    def abort(self) -> None:
        if not self.unfinished:
            return
        request_id = self.rng.choice(sorted(self.unfinished))
        self.client.abort(request_id)
        until(lambda: any(request_id in engine.aborted for engine in self.engines))

    def plan(self) -> None:
        self.now += self.rng.choice([0.01, 0.3, 1.0])
        for engine in self.engines:
            before = engine.scheduler.preemptions
            engine.plan(self.now)
            self.preemptions += engine.scheduler.preemptions - before
            self.expired += len(engine._plan.expired) if engine._plan is not None else 0

    def compute(self) -> None:
        for engine in self.engines:
            engine.compute()

    def act(self) -> None:
        """Something may happen while a step is planned, while it is computed, or behind it."""
        for half in (self.plan, self.compute):
            for _ in range(self.rng.choice([0, 0, 1, 1, 2, 6])):
                if self.rng.random() < 0.15:
                    self.abort()
                else:
                    self.submit(self.request())
            half()


def both_agree(pair: Pair) -> None:
    """What was refused, and what was told about it, at both ends."""
    (engine,) = pair.engines
    assert not engine.probes & set(engine.scheduler.requests), "refused, and the engine takes it"
    refused = {id: e for id, e in engine.refused.items() if isinstance(e, OverloadError)}
    for request_id, error in refused.items():
        assert request_id in pair.told, "the engine refuses it, and the front has not seen that"
        assert str(pair.told[request_id]) == str(error)


@cache
def run(seed: int) -> Pair:
    pair = Pair(seed)
    for _ in range(100):
        pair.act()
        both_agree(pair)
    return pair


SEEDS = range(16)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_front_refuses_what_its_engine_would(seed: int) -> None:
    pair = run(seed)
    to_come = {item.id for item in pair.engines[0].inbox if isinstance(item, EngineRequest)}
    assert set(pair.told) <= set(pair.engines[0].refused) | to_come


def test_random_pairs_refuse_preempt_and_expire() -> None:
    """Else the test above would say little."""
    pairs = [run(seed) for seed in SEEDS]
    refused = sum(len(pair.told) for pair in pairs)
    preempted = sum(pair.preemptions for pair in pairs)
    expired = sum(pair.expired for pair in pairs)
    assert refused > 500 and preempted > 20 and expired > 50


def test_both_tell_the_same_time_to_wait() -> None:
    """By the drain that each has measured."""
    found = []
    for pair in map(run, SEEDS):
        for request_id, told in pair.told.items():
            error = pair.engines[0].refused.get(request_id)
            if isinstance(error, OverloadError):
                found.append((told.retry_after, error.retry_after))
    assert len(found) > 500 and len({ours for ours, _ in found}) > 50
    close = [ours for ours, theirs in found if ours == pytest.approx(theirs, rel=0.2)]
    assert len(close) > 0.95 * len(found), (len(close), len(found))


def test_a_refusal_needs_no_step() -> None:
    """The engine is at its first step all the while; nobody tells the front anything."""
    engine: list[MortalEngine] = []

    def launch(number: int, lost: Callable[[MoebiusError], None]) -> MortalEngine:
        engine.append(MortalEngine(number, lost))
        return engine[-1]

    client = ReplayClient(launch, room=Room(requests=3))
    heard: list[StepOutput] = []
    client.start(heard.extend)
    for id in ("a", "bb", "ccc"):
        client.submit(ask(id))
    assert client.refusal("") is not None
    client.submit(ask("dddd"))
    (refused,) = heard
    assert isinstance(refused.error, OverloadError) and refused.request_id == "dddd"
    assert len(engine[0].taken) == 3
    client.close(1)


def test_what_was_aborted_leaves_room_at_once() -> None:
    """The engine hears of the abort before it hears of the next request."""
    pair = Pair(1)
    (engine,) = pair.engines
    while pair.client.refusal("") is None:
        pair.submit(pair.request(short=True))
    waiting = sorted(pair.unfinished)[0]
    pair.client.abort(waiting)
    until(lambda: waiting in engine.aborted)
    request = pair.request(short=True)
    pair.submit(request)
    assert engine.inbox[-2:] == [waiting, request] and request.id not in pair.told


def test_an_engine_with_room_is_enough() -> None:
    """Of two engines one is full: a request that would go to it is refused, as by itself; but
    nothing is refused before it is known where it goes."""
    pair = Pair(3, engines=2)
    queue = pair.sizes.queue
    for _ in range(2 * queue):
        assert pair.client.refusal("") is None
        pair.client.submit(pair.request(short=True))
    assert pair.client.refusal("") is not None
    given = [sum(isinstance(item, EngineRequest) for item in e.inbox) for e in pair.engines]
    assert given == [queue, queue]
    pair.engines[0].plan(pair.now)
    assert pair.client.refusal("") is None, "some of the first one's run now"


def test_where_engines_are_lost_nothing_is_refused_for_a_queue_that_is_gone() -> None:
    pair = Pair(5)
    while pair.client.refusal("") is None:
        pair.submit(pair.request(short=True))
    assert len(pair.engines) == 1
    pair.sizes = Sizes(seats=4, blocks=64, queue=pair.sizes.queue, tokens=pair.sizes.tokens)
    pair.engines[0].lost(EngineError("ended by its test"))
    until(lambda: len(pair.engines) == 2 and bool(pair.engines[1].inbox))
    assert pair.client.refusal("") is not None, "the next one has as many"
    pair.engines[1].plan(pair.now)
    assert pair.client.refusal("") is None
