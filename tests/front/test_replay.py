"""Requests over engines that die: every one ends once, with the tokens it would have had anyway."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from front.mortal_engine import MortalEngine, answer, ask
from moebius.engine.client import StepOutput
from moebius.errors import EngineError, MoebiusError, RequestError, WeightsError
from moebius.front.replay import ReplayClient
from moebius.front.restarts import RestartBudget
from moebius.request.finish import FinishReason


class House:
    """A ReplayClient, its engines, and all that its clients hear."""

    def __init__(
        self, count: int = 1, most_restarts: int = 1000, *, together: bool = False, **engine: Any
    ) -> None:
        self.options = engine
        self.engines: list[MortalEngine] = []
        self.heard: dict[str, list[StepOutput]] = {}
        self.reason: list[MoebiusError] = []
        self.before_launch: Callable[[int], None] = lambda number: None
        self.client = ReplayClient(
            self._launch,
            count,
            stepped=self._stepped if together else None,
            budget=RestartBudget(most_restarts),
            on_give_up=self.reason.append,
        )
        self.client.start(self._hear)

    def _stepped(self) -> bool:
        return True

    def _launch(self, number: int, lost: Callable[[MoebiusError], None]) -> MortalEngine:
        self.before_launch(number)
        engine = MortalEngine(number, lost, **self.options)
        self.engines.append(engine)
        return engine

    def _hear(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            steps = self.heard.setdefault(output.request_id, [])
            assert not steps or steps[-1].finish_reason is None, "heard of after its end"
            steps.append(output)

    def living(self) -> list[MortalEngine]:
        return [each for each in self.engines if not each.dead]

    def step(self) -> None:
        for engine in list(self.living()):
            engine.step()

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            self.step()
            time.sleep(0.0005)

    def until_aborted(self, id: str) -> None:
        """Until the engines know, which is when no step of theirs is needed for it."""
        deadline = time.monotonic() + 20
        while any(id in engine.rows for engine in self.engines):
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    def ended(self, id: str) -> StepOutput | None:
        steps = self.heard.get(id)
        return steps[-1] if steps and steps[-1].finish_reason is not None else None

    def tokens(self, id: str) -> list[int]:
        return [token for step in self.heard.get(id, []) for token in step.token_ids]


def finish(house: House, *requests: Any) -> None:
    house.until(lambda: all(house.ended(each.id) for each in requests))


def test_a_request_goes_on_where_its_engine_was_lost() -> None:
    house = House()
    request = ask("a")
    house.client.submit(request)
    house.step()
    house.step()
    house.engines[0].die()
    finish(house, request)
    assert house.tokens("a") == answer(request)
    again = house.engines[1].taken[0]
    assert list(again.output_ids) == answer(request)[:2] and again.seed == request.seed
    stats = house.client.stats()
    assert (stats.restarts, stats.replayed, stats.ready) == (1, 1, True)


def test_what_was_told_once_is_not_told_again() -> None:
    """Prompt scores, when it was scheduled, and what the prefix cache held."""
    house = House()
    request = ask("abcdefg", prompt_logprobs=1)
    house.client.submit(request)
    for _ in range(3):
        house.step()
    house.engines[0].die()
    finish(house, request)
    steps = house.heard[request.id]
    scored = [entry.token_id for step in steps for entry in step.prompt_logprobs]
    assert scored == list(request.prompt_ids[1:])
    assert {step.num_cached_tokens for step in steps if step.token_ids} == {0}


def test_an_idle_engine_that_is_lost_is_started_again() -> None:
    house = House()
    house.engines[0].die()
    house.until(lambda: len(house.living()) == 1)
    house.client.submit(ask("later"))
    finish(house, ask("later"))
    assert house.tokens("later") == answer(ask("later"))


def test_requests_that_come_meanwhile_wait_and_are_served() -> None:
    house = House()
    started = threading.Event()
    house.before_launch = lambda number: bool(started.wait(10)) and None
    house.engines[0].die()
    assert not house.client.stats().ready
    house.client.submit(ask("early"))
    with pytest.raises(RequestError, match="in use"):
        house.client.submit(ask("early"))
    house.client.submit(ask("dropped"))
    assert house.client.stats().waiting == 2
    house.client.abort("dropped")
    house.until(lambda: house.ended("dropped") is not None)
    assert house.heard["dropped"][-1].finish_reason is FinishReason.ABORT
    started.set()
    finish(house, ask("early"))
    assert house.tokens("early") == answer(ask("early"))
    assert [each.id for each in house.engines[1].taken] == ["early"]


def test_an_abort_that_its_engine_did_not_live_to_hear() -> None:
    house = House()
    house.client.submit(ask("a"))
    house.step()
    house.client.abort("a")
    house.until_aborted("a")
    house.engines[0].die()
    last = house.ended("a")
    assert last is not None and last.finish_reason is FinishReason.ABORT
    house.until(lambda: len(house.living()) == 1)
    assert not house.living()[0].taken


def test_an_abort_by_a_finaliser_waits_for_nothing() -> None:
    """Garbage may be collected by a thread that is in the middle of this client, with its lock."""
    house = House()
    house.client.submit(ask("a"))
    house.step()

    def collect() -> None:
        with house.client._lock:
            house.client.abort("a")

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    house.until_aborted("a")
    house.until(lambda: house.ended("a") is not None)
    assert house.heard["a"][-1].finish_reason is FinishReason.ABORT


def test_what_no_engine_can_be_given_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others that waited with it are given out."""
    house = House()
    started = threading.Event()
    house.before_launch = lambda number: bool(started.wait(10)) and None
    house.engines[0].die()
    honest = MortalEngine.submit

    def submit(engine: MortalEngine, request: Any) -> None:
        if request.id == "bad":
            raise ValueError("no frame can hold it")
        if request.id == "wrong":
            raise RequestError("its id is in use")
        honest(engine, request)

    monkeypatch.setattr(MortalEngine, "submit", submit)
    for id in ("bad", "wrong", "good"):
        house.client.submit(ask(id))
    started.set()
    finish(house, ask("bad"), ask("wrong"), ask("good"))
    bad, wrong = house.heard["bad"][-1].error, house.heard["wrong"][-1].error
    assert isinstance(bad, EngineError) and bad.error_id and isinstance(wrong, RequestError)
    assert house.tokens("good") == answer(ask("good"))
    assert house.client.stats().ready


def test_one_that_ends_engines_fails_alone_and_the_others_keep_their_tokens() -> None:
    house = House(poison={"poison": 2})
    requests = [ask("a", 9), ask("poison", 9), ask("bb", 9), ask("ccc", 3)]
    for request in requests:
        house.client.submit(request)
    finish(house, *requests)
    for request in requests:
        if request.id != "poison":
            assert house.tokens(request.id) == answer(request)
    last = house.ended("poison")
    assert last is not None and isinstance(last.error, EngineError)
    assert "nothing else to do" in str(last.error)
    assert house.tokens("poison") == answer(ask("poison", 9))[:2]
    # Two losses with all of them, then one with it alone.
    assert [each.dead for each in house.engines] == [True, True, True, False]
    assert house.engines[2].most_at_once == 1


def test_suspects_are_tried_one_at_a_time_and_cleared_beyond_the_place_of_their_loss() -> None:
    house = House()
    requests = [ask("a", 30), ask("bb", 30), ask("ccc", 30)]
    for request in requests:
        house.client.submit(request)
    house.step()
    for lost in range(2):
        house.engines[lost].die()
        house.until(lambda lost=lost: len(house.engines) == lost + 2)  # type: ignore[misc]
    third = house.engines[2]
    house.until(lambda: len(third.taken) >= 3)
    assert [each.id for each in third.taken[:3]] == ["a", "bb", "ccc"]
    seen_alone = third.taken[:3]
    assert all(len(each.output_ids) == 1 for each in seen_alone)
    house.client.submit(ask("new", 5))
    finish(house, *requests, ask("new", 5))
    for request in requests:
        assert house.tokens(request.id) == answer(request)


def test_replayed_requests_that_find_the_queue_full_wait_for_room() -> None:
    house = House(most=2)
    requests = [ask("a"), ask("bb")]
    for request in requests:
        house.client.submit(request)
    house.step()
    gate = threading.Event()
    house.before_launch = lambda number: bool(gate.wait(10)) and None
    house.options = {"most": 1}
    house.engines[0].die()
    gate.set()
    finish(house, *requests)
    for request in requests:
        assert house.tokens(request.id) == answer(request)


def test_engines_that_die_for_nothing_are_not_started_for_ever() -> None:
    house = House(most_restarts=3)

    def broken(number: int) -> None:
        raise WeightsError("the file is gone")

    house.before_launch = broken
    house.client.submit(ask("a"))
    house.engines[0].die()
    house.until(lambda: bool(house.reason))
    assert "3 times" in str(house.reason[0]) and "the file is gone" in str(house.reason[0])
    last = house.ended("a")
    assert last is not None and isinstance(last.error, EngineError)
    with pytest.raises(EngineError, match="stopped"):
        house.client.submit(ask("b"))


def test_finished_requests_renew_the_budget() -> None:
    house = House(most_restarts=2)
    for i in range(6):
        request = ask(f"r{i}")
        house.client.submit(request)
        finish(house, request)
        house.living()[-1].die()
        house.until(lambda: bool(house.living()))
    assert not house.reason


def test_an_engine_that_lasted_may_be_started_again() -> None:
    """How long starting takes does not count: a large model is not started for ever, either."""
    budget = RestartBudget(most=2, seconds=10)
    assert [budget.spend(9.9), budget.spend(0.0), budget.spend(9.9)] == [True, True, False]
    assert [budget.spend(10.0), budget.spend(0.0), budget.spend(0.0)] == [True, True, False]
    budget.finished()
    assert budget.spend(0.0)


def test_an_engine_that_every_request_ends_is_given_up() -> None:
    """Each of them is found to be at fault; no request has been answered for that."""
    house = House(most_restarts=5, poison={f"p{i}": 1 for i in range(4)})
    for i in range(4):
        house.client.submit(ask(f"p{i}"))
        house.until(lambda i=i: house.ended(f"p{i}") is not None)  # type: ignore[misc]
    house.until(lambda: bool(house.reason))
    lasts = [str(house.heard[f"p{i}"][-1].error) for i in range(4)]
    assert all("nothing else to do" in last for last in lasts[:3]) and "5 times" in lasts[3]
    # Three restarts for each, of which one counts: for the fourth there is but one.
    assert len(house.engines) == 1 + 3 + 3 + 3 + 1


def test_one_that_ends_engines_and_is_asked_for_again_does_not_end_the_server() -> None:
    """As clients do after an error, where nobody else asks for anything."""
    house = House(most_restarts=5, poison={f"p{i}": 1 for i in range(3)})
    for i in range(3):
        house.client.submit(ask(f"p{i}"))
        house.until(lambda i=i: house.ended(f"p{i}") is not None)  # type: ignore[misc]
    house.client.submit(ask("good"))
    finish(house, ask("good"))
    assert house.tokens("good") == answer(ask("good")) and not house.reason


def test_closing_ends_what_waits_and_starts_nothing() -> None:
    house = House()
    gate = threading.Event()
    house.before_launch = lambda number: bool(gate.wait(10)) and None
    house.client.submit(ask("a"))
    house.engines[0].die()
    house.client.close(1)
    gate.set()
    last = house.ended("a")
    assert last is not None and isinstance(last.error, EngineError)
    house.until(lambda: len(house.engines) == 1 or house.engines[1].closed)
    assert not house.client.stats().ready


def test_counters_go_on_over_losses() -> None:
    house = House()
    house.client.submit(ask("a"))
    house.step()
    house.step()
    before = house.client.stats().generation_tokens
    house.engines[0].die()
    house.until(lambda: house.client.stats().ready)
    assert house.client.stats().generation_tokens >= before > 0
    assert house.client.stats().total_blocks == 9


@pytest.mark.parametrize("seed", range(8))
def test_random_losses(seed: int) -> None:
    """One to three engines, killed at random, some by requests: nothing is lost or repeated."""
    chance = random.Random(seed)
    poison = {f"p{i}": chance.randrange(8) for i in range(chance.randrange(3))}
    house = House(chance.choice([1, 2, 3]), poison=poison, most=chance.choice([4, 1000]))
    ids = [f"r{i}" for i in range(25)] + list(poison)
    chance.shuffle(ids)
    requests = {id: ask(id, 4 + len(id) * 3) for id in ids}
    aborted = set(chance.sample([id for id in ids if id not in poison], 3))
    left = list(requests.values())
    accused: set[str] = set()
    rounds = 0
    while left or any(house.ended(id) is None for id in ids):
        for _ in range(chance.randrange(3)):
            if left:
                house.client.submit(left.pop())
        if chance.random() < 0.05 and rounds < 300 and house.living():
            victim = chance.choice(house.living())
            # The engine's end may then seem to be the doing of the one request that it had.
            accused |= set(victim.rows) if len(victim.rows) == 1 else set()
            victim.die()
        if chance.random() < 0.05 and aborted:
            house.client.abort(chance.choice(sorted(aborted)))
        house.step()
        time.sleep(0.0002)
        rounds += 1
        assert rounds < 60_000, [id for id in ids if house.ended(id) is None]
    for id, request in requests.items():
        last = house.ended(id)
        assert last is not None
        tokens = house.tokens(id)
        if last.finish_reason is FinishReason.LENGTH:
            assert tokens == answer(request)
        else:
            assert id in poison or id in aborted or id in accused or "full" in str(last.error)
            assert tokens == answer(request)[: len(tokens)]
