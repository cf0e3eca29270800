"""Experts that move between ranks under load: all at the same step, or none, and no bit changes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.collector import Collector
from engine.test_engine import ask, engine, prompts, tokens
from moebius.engine.config import EngineConfig
from moebius.engine.expert_share import ExpertShare
from moebius.engine.in_process import InProcessClient
from moebius.engine.load import exchange_spec, load_engine, prepare
from moebius.engine.moves import ExpertMoves
from moebius.engine.rank import RankEngine
from moebius.errors import MoebiusError, WeightsError
from moebius.moe.placement import LayerPlacement, Placement
from moebius.parallel.exchange import Epoch
from moebius.parallel.shared_memory import Segment, SharedMemoryExchange

CONFIG = EngineConfig(kv_cache_memory_bytes=2**20, max_model_len=512, threads=1, ranks=2)
EXPERTS = {0: 4, 1: 4}


class Two:
    """Two ranks, which share tiny_model's experts."""

    def __init__(self, directory: Path) -> None:
        self.moved: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
        self.failed: list[tuple[int, int, MoebiusError]] = []
        self.changed = threading.Condition()
        self.number = 0
        self.heard = Collector()
        prepared = [prepare(directory, CONFIG, ExpertShare(rank, 2)) for rank in range(2)]
        self.engines = [load_engine(directory, CONFIG, prepared=each) for each in prepared]
        self.clients = [InProcessClient(each, step_deadline=20) for each in self.engines]
        spec = exchange_spec(prepared[0])
        epoch = Epoch("two", 1)
        with Segment(spec, epoch, cores=1) as segment:
            members = [
                SharedMemoryExchange(segment.place, spec, rank, epoch, timeout=20)
                for rank in range(2)
            ]
        for rank, member in enumerate(members):
            self.watch(rank)
            self.clients[rank].start(self.heard)
            self.do(rank, lambda rank=rank, member=member: self.rank(rank).join(member, 0))  # type: ignore[misc]

    def rank(self, rank: int) -> RankEngine:
        found = self.engines[rank]
        assert isinstance(found, RankEngine)
        return found

    def moves(self, rank: int) -> ExpertMoves:
        found = self.rank(rank).moves
        assert found is not None
        return found

    def watch(self, rank: int) -> None:
        def moved(number: int) -> None:
            with self.changed:
                self.moved[rank].append((number, self.engines[rank].stats().steps))
                self.changed.notify_all()

        def failed(number: int, error: MoebiusError) -> None:
            with self.changed:
                self.failed.append((rank, number, error))
                self.changed.notify_all()

        self.moves(rank).moved = moved
        self.moves(rank).failed = failed

    def do(self, rank: int, work: Callable[[], None]) -> None:
        self.clients[rank].between_steps(work)

    def ask(self, number: int, placement: Placement | None) -> None:
        held = {} if placement is None else placement.held
        for rank in range(2):
            self.do(rank, lambda rank=rank: self.moves(rank).ask(number, held))  # type: ignore[misc]

    def submit(self, rank: int, request: Any) -> None:
        self.number += 1
        number = self.number
        self.clients[rank].submit(request)
        for other in range(2):
            self.do(other, lambda other=other: self.rank(other).hear(number))  # type: ignore[misc]

    def until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 20)

    def arrived(self, number: int) -> bool:
        return all(each and each[-1][0] == number for each in self.moved.values())


@pytest.fixture
def two(tiny_model: Path) -> Iterator[Two]:
    made = Two(tiny_model)
    yield made
    for client in made.clients:
        client.close(5)


def any_placement(chance: random.Random) -> Placement:
    layers = {}
    for layer, count in EXPERTS.items():
        order = chance.sample(range(count), count)
        cut = chance.randrange(1, count)
        spare = chance.sample(range(count), chance.randrange(3))
        held = (order[:cut] + [e for e in spare if e not in order[:cut]], order[cut:])
        layers[layer] = LayerPlacement(count, (tuple(held[0]), tuple(held[1])))
    return Placement(layers)


def alone(directory: Path, requests: dict[str, list[int]], max_tokens: int) -> dict[str, list[int]]:
    one = engine(directory)
    client = InProcessClient(one, step_deadline=20)
    heard = Collector()
    client.start(heard)
    for id, prompt in requests.items():
        client.submit(ask(one, id, prompt, max_tokens=max_tokens))
    heard.wait(lambda: all(map(heard.ended, requests)))
    client.close(5)
    return {id: tokens(heard.outputs[id]) for id in requests}


def test_no_token_changes_while_experts_move_and_all_switch_at_one_step(
    two: Two, tiny_model: Path
) -> None:
    requests = {str(i): prompt for i, prompt in enumerate(prompts(6, seed=8))}
    expected = alone(tiny_model, requests, 300)
    for id, prompt in requests.items():
        two.submit(int(id) % 2, ask(two.engines[0], id, prompt, max_tokens=300))
    chance = random.Random(5)
    number = 0
    while number < 3 or not all(map(two.heard.ended, requests)):
        number += 1
        placement = any_placement(chance)
        two.ask(number, placement)
        two.until(lambda: two.arrived(number) or all(map(two.heard.ended, requests)))  # noqa: B023
    two.heard.wait(lambda: all(map(two.heard.ended, requests)))
    assert {id: tokens(two.heard.outputs[id]) for id in requests} == expected
    some = min(map(len, two.moved.values()))
    assert some >= 3
    assert two.moved[0][:some] == two.moved[1][:some], "the same placements, after as many steps"


def test_nobody_switches_before_all_can(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are made meanwhile."""
    slow = threading.Event()
    loader = two.moves(1)._loader
    bring = loader.bring_experts
    monkeypatch.setattr(loader, "bring_experts", lambda *a: slow.wait(20) and bring(*a))
    two.ask(1, Placement.linear(EXPERTS, 2, spare=2))
    two.submit(0, ask(two.engines[0], "a", [1, 2, 3], max_tokens=40))
    two.heard.wait(lambda: two.heard.ended("a"))
    assert two.moves(0).number == two.moves(1).number == 0
    slow.set()
    two.submit(1, ask(two.engines[0], "b", [4, 5], max_tokens=400))
    two.until(lambda: two.arrived(1))
    two.heard.wait(lambda: two.heard.ended("b"))
    for rank in range(2):
        assert two.moves(rank).placement == Placement.linear(EXPERTS, 2, spare=2)


def test_what_one_rank_cannot_have_no_rank_switches_to(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A move of nothing takes its place."""
    error = WeightsError("model.safetensors shrank while it was loaded")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(two.moves(1)._loader, "bring_experts", fail)
    two.ask(1, Placement.linear(EXPERTS, 2, spare=1))
    two.until(lambda: bool(two.failed))
    assert two.failed == [(1, 1, error)]
    monkeypatch.undo()
    two.ask(2, None)
    two.submit(0, ask(two.engines[0], "a", [1, 2, 3], max_tokens=400))
    two.until(lambda: two.arrived(2))
    assert [number for number, _ in two.moved[0]] == [2]
    assert two.moves(0).placement == Placement.linear(EXPERTS, 2)


def test_a_later_move_takes_the_place_of_one_that_is_not_made(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = threading.Event()
    loader = two.moves(1)._loader
    bring = loader.bring_experts
    monkeypatch.setattr(loader, "bring_experts", lambda *a: slow.wait(20) and bring(*a))
    two.ask(1, Placement.linear(EXPERTS, 2, spare=2))
    deadline = time.monotonic() + 10
    while two.moves(0)._arrived.empty():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    later = any_placement(random.Random(1))
    two.ask(2, later)
    slow.set()
    two.submit(0, ask(two.engines[0], "a", [1, 2, 3], max_tokens=400))
    two.until(lambda: two.arrived(2))
    assert [number for number, _ in two.moved[0]] == [number for number, _ in two.moved[1]] == [2]
    assert two.moves(0).placement == two.moves(1).placement == later
