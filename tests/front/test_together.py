"""Engines that share experts: a request at one may end another, and is found out all the same."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from typing import Any

import pytest

from front.mortal_engine import MortalEngine, answer, ask
from front.test_replay import House, finish
from moebius.errors import EngineError
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason


class Group(House):
    """Engines that make a step only where all are there. What ends one is computed at another."""

    def __init__(self, count: int = 2, most_restarts: int = 5, **engine: Any) -> None:
        self.count = count
        self.made_step = False
        super().__init__(count, most_restarts, together=True, **engine)

    def _launch(self, number: int, lost: Any) -> MortalEngine:
        made = super()._launch(number, lost)
        made.others = lambda: [each for each in self.living() if each is not made]
        return made

    def step(self) -> None:
        living = self.living()
        if len(living) == self.count:
            self.made_step = True
            super().step()

    def _stepped(self) -> bool:
        found = self.made_step
        self.made_step = False
        return found

    def at(self, number: int) -> MortalEngine:
        return next(each for each in self.living() if each.number == number)


def at_work(house: Group) -> bool:
    """All are there, and one at least was given something."""
    return house.client.stats().ready and bool(in_flight(house))


def in_flight(house: Group) -> list[str]:
    return [id for engine in house.living() for id in engine.rows]


@pytest.mark.parametrize("count", [2, 3])
def test_a_request_that_ends_another_engine_fails_alone(count: int) -> None:
    """Those that the lost engine had are innocent, and keep their tokens; so is the engine that
    computes the culprit, which keeps running."""
    house = Group(count, poison={"poison": 2})
    requests = [ask("poison", 9), *(ask("i" * n, 9) for n in range(1, 2 * count))]
    for request in requests:
        house.client.submit(request)
    finish(house, *requests)
    for request in requests[1:]:
        assert house.tokens(request.id) == answer(request)
    last = house.ended("poison")
    assert last is not None and isinstance(last.error, EngineError)
    assert "nothing else to do" in str(last.error)
    assert house.tokens("poison") == answer(ask("poison", 9))[:2]
    # Two losses among others, then one with it alone.
    assert sum(each.dead for each in house.engines) == 3
    assert not house.reason
    house.client.submit(ask("after"))
    finish(house, ask("after"))
    assert house.tokens("after") == answer(ask("after"))


def test_a_suspect_is_alone_in_the_whole_group() -> None:
    house = Group()
    requests = [ask("a" * n, 30) for n in range(1, 7)]
    for request in requests:
        house.client.submit(request)
    house.step()
    for _ in range(2):
        house.until(lambda: at_work(house))
        house.step()
        house.at(1).die()
    most = 0
    seen: set[str] = set()
    while len(seen) < len(requests):
        house.until(lambda: at_work(house))
        now = in_flight(house)
        if not seen.issuperset(now):
            most = max(most, len(now))
        seen.update(now)
        house.step()
    assert most == 1
    finish(house, *requests)
    for request in requests:
        assert house.tokens(request.id) == answer(request)


def test_nothing_that_comes_later_is_given_out_beside_a_suspect() -> None:
    house = Group(poison={"poison": 1})
    for request in (ask("poison", 5), ask("a", 9)):
        house.client.submit(request)
    house.until(lambda: sum(each.dead for each in house.engines) == 2)
    house.client.submit(ask("late", 3))
    finish(house, ask("poison"), ask("a"), ask("late"))
    assert house.tokens("a") == answer(ask("a", 9))
    assert house.tokens("late") == answer(ask("late", 3))
    last = house.ended("late")
    assert last is not None and last.finish_reason is FinishReason.LENGTH


def test_a_group_that_never_makes_a_step_ends_though_requests_were_alone_in_it() -> None:
    """Each of them could be what ends engines, were it not that nothing else comes of them."""
    house = Group(most_restarts=3)
    requests: list[EngineRequest] = []
    while not house.reason:
        assert sum(each.dead for each in house.engines) < 20
        request = ask("a" * (1 + len(requests)))
        with suppress(EngineError):  # it was given up in this moment
            house.client.submit(request)
            requests.append(request)
        house.until(lambda: bool(house.reason) or at_work(house))
        if not house.reason:
            house.at(0).die()
    assert "3 times in a row" in str(house.reason[0])
    assert all(house.ended(each.id) for each in requests)


def test_a_request_that_was_told_to_come_back_can_be_aborted() -> None:
    house = Group()
    for request in (ask("a", 50), ask("bb", 50)):
        house.client.submit(request)
    house.step()
    for _ in range(2):
        house.until(lambda: house.client.stats().ready)
        house.step()
        house.at(1).die()
    flights = list(house.client._assignment)
    for flight in flights:
        house.client.abort(flight.id)
    while not all(flight.unwanted for flight in flights):  # another thread does it
        time.sleep(0.0005)
    finish(house, ask("a"), ask("bb"))
    for id in ("a", "bb"):
        last = house.ended(id)
        assert last is not None and last.finish_reason is FinishReason.ABORT


def test_engines_that_are_lost_at_once_make_nobody_a_suspect() -> None:
    """As those of a host whose link is cut: no request can have ended more than the first."""
    house = Group(3)
    requests = [ask("a" * n, 40) for n in range(1, 9)]
    for request in requests:
        house.client.submit(request)
    house.step()
    for number in range(3):
        house.at(number).die()
    house.until(lambda: at_work(house))
    flights = [house.client._assignment.get(request.id) for request in requests]
    assert [flight and flight.losses for flight in flights] == [1] * 8
    finish(house, *requests)
    for request in requests:
        assert house.tokens(request.id) == answer(request)


@pytest.mark.parametrize("seed", range(6))
def test_random_losses(seed: int) -> None:
    """Every request ends, those that end engines with an error, and the others with their tokens
    but where an engine was killed by chance while one was alone."""
    chance = random.Random(seed)
    poison = {f"p{i}": chance.randrange(1, 6) for i in range(chance.randrange(3))}
    house = Group(chance.choice([2, 3]), most_restarts=1000, poison=poison)
    ids = [f"r{i}" for i in range(12)] + list(poison)
    chance.shuffle(ids)
    requests = {id: ask(id, 4 + len(id) * 3) for id in ids}
    left = list(requests.values())
    accused: set[str] = set()
    rounds = 0
    while left or any(house.ended(id) is None for id in ids):
        for _ in range(chance.randrange(3)):
            if left:
                house.client.submit(left.pop())
        if chance.random() < 0.03 and rounds < 300 and len(house.living()) == house.count:
            running = in_flight(house)
            accused |= set(running) if len(running) == 1 else set()
            chance.choice(house.living()).die()
        house.step()
        time.sleep(0.0002)
        rounds += 1
        assert rounds < 60_000, [id for id in ids if house.ended(id) is None]
    for id, request in requests.items():
        last = house.ended(id)
        assert last is not None
        if last.finish_reason is FinishReason.LENGTH:
            assert house.tokens(id) == answer(request) and id not in poison
        else:
            assert id in poison or id in accused
            assert house.tokens(id) == answer(request)[: len(house.tokens(id))]
